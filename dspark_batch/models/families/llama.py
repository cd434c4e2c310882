"""Llama: the plain decoder (Llama 2 and 3, SmolLM2, Mistral without sliding windows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_batch.models import DecoderSpec, LayerSpec, activation, rope_from_parameters


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec of a config with `model_type: llama`."""
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ValueError(f"{name} is not supported")
    head_dim = config["head_dim"]
    layer = LayerSpec(
        rope_from_parameters(
            config["rope_parameters"],
            head_dim=head_dim,
            max_positions=config["max_position_embeddings"],
        ),
        num_kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
    )
    return DecoderSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        layers=(layer,) * config["num_hidden_layers"],
        epsilon=config["rms_norm_eps"],
        activation=activation(config["hidden_act"]),
        tied_head=bool(config["tie_word_embeddings"]),
        max_positions=config["max_position_embeddings"],
    )
