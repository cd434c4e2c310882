"""Gemma 3 (text): scaled embeddings, four norms per layer, sliding windows with their own RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_batch.models import DecoderSpec, rope_from_parameters
from dspark_batch.models.families import llama


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec of a config with `model_type: gemma3_text`."""
    # No published model caps its attention scores, and transformers would ignore the cap.
    for name in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if config.get(name):
            raise ValueError(f"{name} is not supported")
    parameters = config["rope_parameters"]
    plain = llama.spec(
        {
            **config,
            "hidden_act": config["hidden_activation"],
            "rope_parameters": parameters["full_attention"],
        }
    )
    full = plain.layers[0]
    rope = rope_from_parameters(
        parameters["sliding_attention"],
        head_dim=full.head_dim,
        max_positions=config["max_position_embeddings"],
    )
    kinds = {
        "full_attention": full,
        "sliding_attention": replace(full, rope=rope, window=config["sliding_window"]),
    }
    return replace(
        plain,
        family="gemma3",
        layers=tuple(kinds[kind] for kind in config["layer_types"]),
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=1.0,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        logit_cap=config.get("final_logit_softcapping"),
    )
