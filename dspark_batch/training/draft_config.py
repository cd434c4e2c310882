"""The draft's `config.json` in the layout that DeepSpec publishes: flat, `rope_parameters` nested.

`hidden_size` is the target's; `vocab_size` is the target's as well. A reduced draft vocabulary adds
`draft_vocab_size`, as vLLM and speculators name it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from dspark_batch.errors import EngineError

MarkovHeadType = Literal["vanilla", "gated", "rnn"]
ARCHITECTURE = "Qwen3DSparkModel"


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
    num_target_layers: int
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
        if self.markov_rank == 0 and self.uses_markov_confidence:
            raise EngineError(
                "draft config: confidence_head_with_markov needs markov_rank > 0; "
                "set confidence_head_with_markov to false"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise EngineError("draft config: num_key_value_heads must divide num_attention_heads")
        if self.markov_head_type not in ("vanilla", "gated", "rnn"):
            raise EngineError(f"draft config: unknown markov_head_type {self.markov_head_type!r}")
        ids = self.target_layer_ids
        if list(ids) != sorted(set(ids)) or not ids or ids[0] < -1:
            raise EngineError(f"draft config: target_layer_ids must increase from -1 on, not {ids}")
        if ids[-1] >= self.num_target_layers:
            raise EngineError(
                f"draft config: target_layer_ids {ids} go beyond {self.num_target_layers} layers"
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
    """Read a published `config.json`; a missing key is an `EngineError` that names it."""
    try:
        raw = cast("dict[str, Any]", json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the draft config {path}: {error}") from error
    if raw.get("attention_bias"):
        raise EngineError(f"{path}: attention_bias is not supported for a draft")
    try:
        rank = int(raw["markov_rank"])
        confident = bool(raw["enable_confidence_head"])
        with_markov = bool(
            raw["confidence_head_with_markov"]
            if confident
            else raw.get("confidence_head_with_markov", False)
        )
        rope = raw.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": raw["rope_theta"],
        }
        return DraftConfig(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            vocab_size=raw["vocab_size"],
            block_size=raw["block_size"],
            mask_token_id=raw["mask_token_id"],
            target_layer_ids=tuple(raw["target_layer_ids"]),
            num_target_layers=raw["num_target_layers"],
            markov_rank=rank,
            markov_head_type=raw["markov_head_type"] if rank else "vanilla",
            enable_confidence_head=confident,
            confidence_head_with_markov=with_markov,
            draft_vocab_size=raw.get("draft_vocab_size"),
            qk_norm=raw.get("qk_norm", True),
            embedding_scale=raw.get("embedding_scale", 1.0),
            rms_norm_eps=raw["rms_norm_eps"],
            rope_parameters=rope,
            max_position_embeddings=raw["max_position_embeddings"],
            num_anchors=raw.get("num_anchors", 512),
            eos_token_id=raw.get("eos_token_id"),
        )
    except KeyError as error:
        raise EngineError(f"the draft config {path} lacks the key {error.args[0]!r}") from error


def spread_layer_ids(num_target_layers: int, num_taps: int = 5) -> tuple[int, ...]:
    """Taps spread evenly from layer 1 to the last but one (the last is never tapped).

    The last but one matters: its output is the input of the layer that a draft starts from. A
    target of few layers gives all of those before its last.
    """
    if num_target_layers < num_taps + 2:
        return tuple(range(-1 if num_target_layers < 3 else 0, num_target_layers - 1))
    span = num_target_layers - 3
    return tuple(1 + round(tap * span / (num_taps - 1)) for tap in range(num_taps))


def draft_config_from_target(
    target: Mapping[str, Any],
    *,
    num_layers: int,
    block_size: int,
    markov_rank: int,
    mask_token_id: int,
    target_layer_ids: tuple[int, ...] | None = None,
    markov_head_type: MarkovHeadType = "vanilla",
    enable_confidence_head: bool = True,
    confidence_head_with_markov: bool = True,
    draft_vocab_size: int | None = None,
    intermediate_size: int | None = None,
    embedding_scale: float = 1.0,
) -> DraftConfig:
    """A draft of the target's own width, from the target's `config.json` (transformers 4 or 5).

    Where layers differ in their rotation, the draft's is that of full attention.
    """
    try:
        hidden, heads = target["hidden_size"], target["num_attention_heads"]
        rope = target.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": target["rope_theta"],
        }
        rope = rope.get("full_attention", rope)
        scaling = target.get("rope_scaling")
        if scaling:  # transformers 4; before 4.43 the kind was called `type`
            kind = scaling.get("rope_type") or scaling["type"]
            rope = {**rope, **scaling, "rope_type": kind}
            rope.pop("type", None)
        return DraftConfig(
            hidden_size=hidden,
            intermediate_size=intermediate_size or target["intermediate_size"],
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=target.get("num_key_value_heads") or heads,
            head_dim=target.get("head_dim") or hidden // heads,
            vocab_size=target["vocab_size"],
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=target_layer_ids or spread_layer_ids(target["num_hidden_layers"]),
            num_target_layers=target["num_hidden_layers"],
            markov_rank=markov_rank,
            markov_head_type=markov_head_type,
            enable_confidence_head=enable_confidence_head,
            confidence_head_with_markov=markov_rank > 0 and confidence_head_with_markov,
            draft_vocab_size=draft_vocab_size,
            embedding_scale=embedding_scale,
            rms_norm_eps=target["rms_norm_eps"],
            rope_parameters=dict(rope),
            max_position_embeddings=target["max_position_embeddings"],
            eos_token_id=target.get("eos_token_id"),
        )
    except KeyError as error:
        raise EngineError(f"the target's config lacks the key {error.args[0]!r}") from error
