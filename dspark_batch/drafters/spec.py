"""What a draft is, as data: read from the `config.json` of its checkpoint (DeepSpec's keys)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_batch.errors import EngineError
from dspark_batch.models.spec import RopeSpec, rope_from_parameters

MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """A draft's shape, read from its checkpoint's `config.json`."""

    block_size: int
    vocab_size: int
    """The target's; the draft's own may be smaller."""
    mask_token_id: int
    taps: tuple[int, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    markov_rank: int
    markov_head: str | None
    confidence_head: bool
    confidence_with_markov: bool
    rope: RopeSpec


def draft_spec(config: Mapping[str, Any]) -> DraftSpec:
    """Read a DeepSpec `config.json`.

    Raises:
        EngineError: a required key is missing, or a value that no graph exists for.
    """
    try:
        rank = int(config["markov_rank"])
        head = str(config["markov_head_type"]) if rank else None
        if head is not None and head not in MARKOV_HEADS:
            known = ", ".join(MARKOV_HEADS)
            raise EngineError(f"draft config: markov_head_type {head!r}; known: {known}")
        confidence = bool(config["enable_confidence_head"])
        with_markov = confidence and bool(config["confidence_head_with_markov"])
        if with_markov and not rank:
            raise EngineError("draft config: confidence_head_with_markov needs markov_rank > 0")
        block_size, vocab_size = int(config["block_size"]), int(config["vocab_size"])
        mask_token_id = int(config["mask_token_id"])
        if block_size < 1:
            raise EngineError(f"draft config: block_size {block_size} drafts nothing")
        if not 0 <= mask_token_id < vocab_size:
            raise EngineError(
                f"draft config: mask_token_id {mask_token_id} is not in 0..{vocab_size - 1}"
            )
        return DraftSpec(
            block_size=block_size,
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            taps=tuple(int(i) for i in config["target_layer_ids"]),
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=int(config["num_attention_heads"]),
            num_kv_heads=int(config["num_key_value_heads"]),
            head_dim=int(config["head_dim"]),
            epsilon=float(config["rms_norm_eps"]),
            markov_rank=rank,
            markov_head=head,
            confidence_head=confidence,
            confidence_with_markov=with_markov,
            rope=rope_from_parameters(
                config["rope_parameters"],
                head_dim=int(config["head_dim"]),
                max_positions=int(config["max_position_embeddings"]),
            ),
        )
    except KeyError as missing:
        raise EngineError(f"draft config.json lacks {missing}") from missing
    except ValueError as problem:
        raise EngineError(f"draft config.json: {problem}") from problem


def check_taps(spec: DraftSpec, *, num_target_layers: int) -> None:
    """Refuse taps that the target cannot serve.

    Raises:
        EngineError: not strictly increasing, or outside -1 .. layers - 1.
    """
    taps = list(spec.taps)
    in_range = all(-1 <= i < num_target_layers for i in taps)
    if not taps or sorted(set(taps)) != taps or not in_range:
        raise EngineError(
            f"draft config.json: target_layer_ids {taps} must be strictly increasing in "
            f"-1..{num_target_layers - 1} (the target has {num_target_layers} layers)"
        )
