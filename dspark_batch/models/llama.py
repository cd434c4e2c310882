"""Llama family: the plain decoder (Llama 2/3, SmolLM2, Mistral without windows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_batch.models.spec import DecoderSpec, LayerSpec, rope_from_parameters


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`DecoderSpec` of a `model_type: llama` config."""
    rope = rope_from_parameters(
        config["rope_parameters"],
        head_dim=config["head_dim"],
        max_positions=config["max_position_embeddings"],
    )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("attention_bias and mlp_bias are not supported")
    return DecoderSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config["head_dim"],
        layers=(LayerSpec(rope),) * config["num_hidden_layers"],
        epsilon=config["rms_norm_eps"],
        tied_head=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
    )
