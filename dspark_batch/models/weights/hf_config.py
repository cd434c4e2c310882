"""Model configs in one layout: that of transformers 5, whatever version wrote the file.

Files differ in three ways, of which no model family should have to know:

- rotary parameters are nested in `rope_parameters`; before transformers 5 they were `rope_theta`
  and `rope_scaling`
- a file may leave out keys that have the default of their configuration class
- a config may lie inside another: the text model of a multimodal model, the layers of a
  speculators draft
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from dspark_batch.errors import EngineError

_GEMMA_PATTERN = 6  # every sixth layer is a full one, the others are sliding
_GLOBAL_HEAD_DIM = 512

# Defaults of the configuration classes of transformers, by `model_type`; a file may leave out any
# of these keys. Sizes are not guessed, except for Gemma 3, whose published files do lack them.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen3": {
        "hidden_act": "silu",
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "gemma4_text": {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "sliding_window": 512,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": 262144,
        "final_logit_softcapping": None,
    },
}
# The same text model under another name, without per-layer inputs.
_DEFAULTS["gemma4_unified_text"] = _DEFAULTS["gemma4_text"] | {
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
}
_GEMMA4 = ("gemma4_text", "gemma4_unified_text")

_DEFAULT_THETA = 10_000.0

_DEFAULT_ROPE: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "gemma4_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
        },
    },
}
_DEFAULT_ROPE["gemma4_unified_text"] = _DEFAULT_ROPE["gemma4_text"]

# These scale relative to the length that the model was pretrained with.
_NEEDS_ORIGINAL_LENGTH = frozenset({"llama3", "yarn", "longrope"})

# Keys of a multimodal config that apply to the text model inside it.
_OUTER_KEYS = (
    "architectures",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "transformers_version",
)


def normalized_config(raw: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """A copy of `raw` in the layout of transformers 5. Unknown keys stay.

    `rope_parameters` is always there: one dict, for Gemma one per layer type. Where missing,
    `head_dim` and `num_key_value_heads` are filled in from the other sizes, and `layer_types` for
    Qwen3 and Gemma. The text model of a multimodal config is unwrapped, and the outer `model_type`
    kept as `outer_model_type`.

    Raises:
        EngineError: there is no `model_type`, or layers differ in an unsupported way. The message
            names `origin`, the file that `raw` was read from.
    """
    config = _text_config(dict(raw))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise EngineError(f"{origin} has no model_type, so it is not a model's config")
    if "torch_dtype" in config:
        config.setdefault("dtype", config.pop("torch_dtype"))
    for key, value in _DEFAULTS.get(model_type, {}).items():
        config.setdefault(key, value)
    _fill_attention(config)
    _fill_layer_types(config, model_type)
    if model_type in _GEMMA4 and config.get("layer_types"):
        config["layer_types"] = [*config["layer_types"][:-1], "full_attention"]
        _fill_full_attention(config, origin)
    config["rope_parameters"] = _rope_parameters(config, model_type)
    return config


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    layers = config.pop("transformer_layer_config", None)
    if isinstance(layers, dict):  # a speculators draft: its layers inside, everything else outside
        own = {key: value for key, value in config.items() if value is not None}
        return {**layers, **own, "model_type": layers.get("model_type", own.get("model_type"))}
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: config[key] for key in _OUTER_KEYS if config.get(key) is not None}
    inner = {key: value for key, value in text.items() if value is not None or key not in outer}
    return {**outer, **inner, "outer_model_type": config.get("model_type")}


def _fill_attention(config: dict[str, Any]) -> None:
    num_heads = config.get("num_attention_heads")
    if num_heads is None:
        return
    if config.get("head_dim") is None and "hidden_size" in config:
        config["head_dim"] = config["hidden_size"] // num_heads
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = num_heads


def _fill_layer_types(config: dict[str, Any], model_type: str) -> None:
    num_layers = config.get("num_hidden_layers")
    if model_type == "qwen3" and not config["use_sliding_window"]:
        config["sliding_window"] = None
    if config.get("layer_types") is not None or num_layers is None:
        return
    if model_type == "qwen3":
        first = num_layers if config["sliding_window"] is None else config["max_window_layers"]
        config["layer_types"] = [
            "sliding_attention" if layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    elif model_type in _DEFAULT_ROPE:
        pattern = config.get("sliding_window_pattern") or _GEMMA_PATTERN
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(num_layers)
        ]


def _fill_full_attention(config: dict[str, Any], origin: str) -> None:
    """Fill in `global_head_dim` and `num_global_key_value_heads`, the sizes of full layers.

    transformers 5.23 writes them as `per_layer_config` instead, overrides for each layer.
    """
    overrides, usual = config.pop("per_layer_config", None), config.get("num_key_value_heads")
    if overrides is None:
        config.setdefault("global_head_dim", _GLOBAL_HEAD_DIM)
        own = config.get("num_global_key_value_heads") if config["attention_k_eq_v"] else None
        config["num_global_key_value_heads"] = own or usual
        return
    by_layer = {int(layer): given for layer, given in overrides.items()}
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    shared = by_layer.get(full[0], {}) if full else {}
    expected = {i: shared for i in full if shared}
    if by_layer != expected or set(shared) - {"head_dim", "num_key_value_heads"}:
        raise EngineError(
            f"{origin}: per_layer_config {overrides} is not supported; it may only give all "
            "full_attention layers the same head_dim and num_key_value_heads"
        )
    config["global_head_dim"] = shared.get("head_dim", config["head_dim"])
    config["num_global_key_value_heads"] = shared.get("num_key_value_heads", usual)


def _rope_parameters(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Rotary parameters in the nested layout; removes the older keys from `config`."""
    found = config.pop("rope_parameters", None) or {}
    scaling = config.pop("rope_scaling", None)
    theta = config.pop("rope_theta", None)
    local_theta = config.pop("rope_local_base_freq", None)
    partial = config.pop("partial_rotary_factor", None)
    max_length = config.get("max_position_embeddings")

    if model_type in _DEFAULT_ROPE:
        by_type = copy.deepcopy(_DEFAULT_ROPE[model_type])
        if theta is not None:
            by_type["full_attention"]["rope_theta"] = theta
        if local_theta is not None:
            by_type["sliding_attention"]["rope_theta"] = local_theta
        for layer_type, given in (
            found if _is_nested(found) else {"full_attention": found}
        ).items():
            if given:
                # The base is the only default: a factor would belong to another rope_type.
                theta = by_type.get(layer_type, {}).get("rope_theta", _DEFAULT_THETA)
                by_type[layer_type] = {"rope_theta": theta} | given
        by_type["full_attention"] |= scaling or {}
        return {key: _rope_dict(value, max_length) for key, value in by_type.items()}

    shared: dict[str, Any] = {"rope_theta": _DEFAULT_THETA if theta is None else theta}
    if partial is not None:
        shared["partial_rotary_factor"] = partial
    if _is_nested(found):
        return {
            key: None if value is None else _rope_dict(shared | value, max_length)
            for key, value in found.items()
        }
    return _rope_dict(shared | (scaling or found), max_length)


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in parameters.values())


def _rope_dict(parameters: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    older_name = parameters.pop("type", "default")
    parameters.setdefault("rope_type", older_name)
    if parameters["rope_type"] in _NEEDS_ORIGINAL_LENGTH and max_length is not None:
        parameters.setdefault("original_max_position_embeddings", max_length)
    return parameters
