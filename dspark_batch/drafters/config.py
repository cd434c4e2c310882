"""A draft's `config.json` as DeepSpec publishes it: what training writes and export reads.

The keys are flat, but for `rope_parameters`. `hidden_size` and `vocab_size` are the target's. A
reduced draft vocabulary adds `draft_vocab_size`, as vLLM and speculators name it. Other layouts
(`layouts`) are turned into these keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from dspark_batch.errors import EngineError

MarkovHeadType = Literal["vanilla", "gated", "rnn"]
MARKOV_HEADS: tuple[str, ...] = get_args(MarkovHeadType)
ARCHITECTURE = "Qwen3DSparkModel"

# Settings under which the network is another one than the graph.
_REFUSED: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("attention_bias", bool),
    ("mlp_bias", bool),
    ("is_causal", bool),
    ("causal", bool),
    ("use_sliding_window", bool),
    ("layer_types", lambda kinds: any(kind != "full_attention" for kind in kinds or ())),
    ("attention_mode", lambda mode: mode not in (None, "gqa", "mha")),
    ("projector_type", lambda kind: kind not in (None, "dspark")),
    ("topk_context", bool),
    ("draft_adapter_rank", bool),
    ("enable_moe_block", bool),
    ("hidden_size_per_layer_input", bool),
    ("quantization_config", bool),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Geometry of a draft. `markov_rank=0` means no Markov head; then no confidence feature of it.

    `target_layer_ids` counts as DeepSpec does: `i` is the output of decoder layer `i`, -1 the
    embedding output.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    """None where the checkpoint does not say."""
    markov_rank: int
    markov_head_type: MarkovHeadType = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    draft_vocab_size: int | None = None
    qk_norm: bool = True
    embedding_scale: float = 1.0
    """Factor on the shared embedding, where the target has one (Gemma)."""
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: int = 2048
    num_anchors: int = 512
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the values do not go together."""
        if self.markov_rank == 0 and self.uses_markov_confidence:
            raise ValueError("confidence_head_with_markov needs markov_rank > 0; set it to false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if self.markov_head_type not in MARKOV_HEADS:
            known = ", ".join(MARKOV_HEADS)
            raise ValueError(f"markov_head_type {self.markov_head_type!r}; known: {known}")
        ids = self.target_layer_ids
        if list(ids) != sorted(set(ids)) or not ids or ids[0] < -1:
            raise ValueError(f"target_layer_ids must increase from -1 on, not {list(ids)}")
        if self.num_target_layers is not None and ids[-1] >= self.num_target_layers:
            raise ValueError(
                f"target_layer_ids {list(ids)} go beyond {self.num_target_layers} layers"
            )

    @classmethod
    def parsed(cls, config: Mapping[str, Any]) -> Self:
        """From the published keys.

        Raises:
            KeyError: a key is missing.
            ValueError: a value is not supported.
        """
        for key, is_other in _REFUSED:
            if is_other(config.get(key)):
                raise ValueError(f"{key} {config[key]!r} is not supported for a draft")
        rank, confident = int(config["markov_rank"]), bool(config["enable_confidence_head"])
        vocab_size, mask_token_id = int(config["vocab_size"]), int(config["mask_token_id"])
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id {mask_token_id} is not in 0..{vocab_size - 1}")
        layers = config.get("num_target_layers")
        return cls(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=int(config["num_attention_heads"]),
            num_key_value_heads=int(config["num_key_value_heads"]),
            head_dim=int(config["head_dim"]),
            vocab_size=vocab_size,
            block_size=int(config["block_size"]),
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(int(i) for i in config["target_layer_ids"]),
            num_target_layers=None if layers is None else int(layers),
            markov_rank=rank,
            markov_head_type=config["markov_head_type"] if rank else "vanilla",
            enable_confidence_head=confident,
            confidence_head_with_markov=bool(
                config["confidence_head_with_markov"]
                if confident
                else config.get("confidence_head_with_markov", False)
            ),
            draft_vocab_size=config.get("draft_vocab_size"),
            qk_norm=bool(config.get("qk_norm", True)),
            embedding_scale=float(config.get("embedding_scale", 1.0)),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_parameters=dict(config["rope_parameters"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            num_anchors=int(config.get("num_anchors", 512)),
            eos_token_id=config.get("eos_token_id"),
        )

    @property
    def uses_markov_confidence(self) -> bool:
        """Whether the confidence head reads the Markov embedding of the previous token."""
        return self.enable_confidence_head and self.confidence_head_with_markov

    @property
    def num_draft_ids(self) -> int:
        """Rows of the draft's head: the reduced vocabulary, or the target's."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def feature_size(self) -> int:
        """Width of the context features of one position: tapped layers times the hidden size."""
        return len(self.target_layer_ids) * self.hidden_size

    def as_json(self, *, dtype: str) -> dict[str, Any]:
        """The published keys; `dtype` is the one of the tensors beside it."""
        return {
            "architectures": [ARCHITECTURE],
            "attention_bias": False,
            "block_size": self.block_size,
            "confidence_head_with_markov": self.confidence_head_with_markov,
            **(
                {} if self.draft_vocab_size is None else {"draft_vocab_size": self.draft_vocab_size}
            ),
            "dtype": dtype,
            "enable_confidence_head": self.enable_confidence_head,
            "eos_token_id": self.eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "markov_head_type": self.markov_head_type,
            "markov_rank": self.markov_rank,
            "mask_token_id": self.mask_token_id,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_anchors": self.num_anchors,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            **({} if self.qk_norm else {"qk_norm": False}),
            **({} if self.embedding_scale == 1.0 else {"embedding_scale": self.embedding_scale}),
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope_parameters,
            "target_layer_ids": list(self.target_layer_ids),
            "tie_word_embeddings": False,
            "vocab_size": self.vocab_size,
        }


def config_from_json(path: Path) -> DraftConfig:
    """Read the `config.json` of a checkpoint in DeepSpec's own layout.

    Raises:
        EngineError: the file is not there, lacks a key, or has a value that is not supported.
    """
    try:
        return DraftConfig.parsed(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise EngineError(f"cannot read the draft config {path}: {error}") from error
    except KeyError as error:
        raise EngineError(f"the draft config {path} lacks the key {error.args[0]!r}") from error
    except ValueError as error:
        raise EngineError(f"draft config {path}: {error}") from error
