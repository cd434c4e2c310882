"""The shape of a new draft, from its target's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_batch.drafters import DraftConfig, MarkovHeadType
from dspark_batch.errors import EngineError


def evenly_tapped(num_target_layers: int, num_taps: int = 5) -> tuple[int, ...]:
    """Taps at even distances from layer 1 to the last but one; the last is never tapped.

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
            target_layer_ids=target_layer_ids or evenly_tapped(target["num_hidden_layers"]),
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
    except ValueError as error:
        raise EngineError(f"draft config: {error}") from error
