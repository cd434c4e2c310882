"""Gemma 3 (text): scaled embeddings, four norms a layer, sliding windows with their own RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_batch.models import llama
from dspark_batch.models.spec import DecoderSpec, LayerSpec, rope_from_parameters


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`DecoderSpec` of a `model_type: gemma3_text` config."""
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        raise ValueError("soft caps are not supported for gemma3")
    parameters = config["rope_parameters"]
    ropes = {
        kind: rope_from_parameters(
            parameters[kind],
            head_dim=config["head_dim"],
            max_positions=config["max_position_embeddings"],
        )
        for kind in ("full_attention", "sliding_attention")
    }
    windows = {"full_attention": None, "sliding_attention": config["sliding_window"]}
    plain = {**config, "rope_parameters": parameters["full_attention"]}
    return replace(
        llama.spec(plain),
        family="gemma3",
        layers=tuple(LayerSpec(ropes[kind], windows[kind]) for kind in config["layer_types"]),
        activation="gelu_tanh",
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=1.0,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )
