"""Gemma 4 (text): Gemma 3 with other head sizes in full layers, normed values, shared keys.

Per-layer inputs (E2B, E4B) are supported, mixtures of experts are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_batch.models import DecoderSpec, LayerSpec, rope_from_parameters
from dspark_batch.models.families import llama


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec of a config with `model_type: gemma4_text` or `gemma4_unified_text`."""
    if config.get("enable_moe_block"):
        raise ValueError("enable_moe_block (a mixture of experts) is not supported")
    if config.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention 'all' is not supported")
    layer_input_size = config["hidden_size_per_layer_input"] or 0
    if layer_input_size and config["vocab_size_per_layer_input"] < config["vocab_size"]:
        raise ValueError("vocab_size_per_layer_input is smaller than vocab_size")
    parameters = config["rope_parameters"]
    plain = llama.spec(
        {
            **config,
            "hidden_act": config["hidden_activation"],
            "rope_parameters": parameters["sliding_attention"],
        }
    )
    sliding = replace(plain.layers[0], window=config["sliding_window"])
    full = replace(
        sliding,
        rope=rope_from_parameters(
            parameters["full_attention"],
            head_dim=config["global_head_dim"],
            max_positions=config["max_position_embeddings"],
        ),
        num_kv_heads=config["num_global_key_value_heads"],
        head_dim=config["global_head_dim"],
        window=None,
        keys_as_values=bool(config["attention_k_eq_v"]),
    )
    kinds = {"full_attention": full, "sliding_attention": sliding}
    return replace(
        plain,
        family="gemma4",
        layers=_with_sharing([kinds[kind] for kind in config["layer_types"]], config),
        qk_norm=True,
        v_norm=True,
        sandwich_norms=True,
        layer_scalar=True,
        layer_input_size=layer_input_size,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_scale=1.0,
        logit_cap=config.get("final_logit_softcapping"),
    )


def _with_sharing(layers: list[LayerSpec], config: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Let each of the last `num_kv_shared_layers` read the keys and values of an earlier layer.

    That is the last layer of the same kind that has keys and values of its own.
    """
    first = len(layers) - (config.get("num_kv_shared_layers") or 0)
    newest = {layer: i for i, layer in enumerate(layers[:first])}
    if missing := set(layers[first:]) - set(newest):
        raise ValueError(
            f"num_kv_shared_layers {len(layers) - first} leaves no earlier layer to share with for "
            f"{len(missing)} of the kinds in layer_types"
        )
    return (
        *layers[:first],
        *(replace(layer, shares_with=newest[layer]) for layer in layers[first:]),
    )
