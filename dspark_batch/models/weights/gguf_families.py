"""The supported GGUF architectures: tensor names and metadata keys in Hugging Face terms.

To add one, write an entry in `FAMILIES` and a function for the config keys that only it has. What
the file leaves out is left out here too: `hf_config` has the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_batch.errors import EngineError
from dspark_batch.models.weights.gguf_format import GGUFHeader, read_values

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

# Divisors of the rotary frequencies. They follow from the config, so they are not a weight.
ROPE_FACTORS = "rope_freqs.weight"
# The same in Llama 3.1 and all later ones; only the factor differs.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Gemma 3 27B is the only size whose attention scale does not follow from its head size.
_GEMMA_27B_LAYERS = 62


@dataclass(frozen=True, slots=True)
class Family:
    """How one GGUF architecture differs from the others."""

    model_type: str
    model_class: str
    layer_names: Mapping[str, str]
    """GGUF name of a layer's tensor -> Hugging Face name."""
    config: Callable[[Keys], dict[str, Any]]
    """Config keys that only this architecture has."""
    permuted: frozenset[str] = frozenset()
    """Projections whose rows the converter permuted: their rotary pairs are interleaved."""
    norm_offset: float = 0.0
    """What the converter added to every norm weight."""


class Keys:
    """Metadata under the architecture's prefix."""

    def __init__(self, header: GGUFHeader, architecture: str) -> None:
        self.header = header
        self._architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key, or the default. Floats are rounded as far as float32 allows: the file
        has 9.9999997e-06 for 1e-5."""
        value = self.header.metadata.get(f"{self._architecture}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """Value of a key that must be there and be the same for all layers."""
        value = self.get(key)
        if value is None:
            raise EngineError(f"{self.header.path} lacks {self._architecture}.{key}")
        if isinstance(value, list):
            raise EngineError(
                f"{self.header.path} varies {key} between layers, which is not supported"
            )
        return value


def config_from_metadata(header: GGUFHeader, architecture: str) -> dict[str, Any]:
    """The metadata as a Hugging Face config, not yet normalized."""
    family = FAMILIES[architecture]
    keys = Keys(header, architecture)
    num_heads = keys.need("attention.head_count")
    hidden_size = keys.need("embedding_length")
    head_dim = keys.get("attention.key_length", hidden_size // num_heads)
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise EngineError(f"{header.path} rotates only a part of each head, which is not supported")
    if "token_embd.weight" not in header.tensors:
        raise EngineError(f"{header.path} has no token embedding, so it is not a language model")
    metadata = header.metadata
    ids = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "dtype": "float32",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.need("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **ids,
        **family.config(keys),
    }


def _dense_config(keys: Keys) -> dict[str, Any]:
    """Llama and Qwen3: one rotary embedding, and biases if their tensors are there."""
    tensors = keys.header.tensors
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "rope_parameters": _rope_base(keys, "rope.freq_base")
        | (_llama3_scaling(keys) or _rope_scaling(keys)),
    }


def _gemma3_config(keys: Keys) -> dict[str, Any]:
    num_heads, head_dim = keys.need("attention.head_count"), keys.need("attention.key_length")
    is_27b = keys.need("block_count") == _GEMMA_27B_LAYERS
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        layers = {"layer_types": [("full", "sliding")[flag] + "_attention" for flag in pattern]}
    else:
        layers = {"sliding_window_pattern": pattern} if pattern else {}
    return {
        **layers,
        "sliding_window": keys.need("attention.sliding_window"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "query_pre_attn_scalar": keys.need("embedding_length") // num_heads if is_27b else head_dim,
        "rope_parameters": {
            "full_attention": _rope_base(keys, "rope.freq_base") | _rope_scaling(keys),
            "sliding_attention": _rope_base(keys, "rope.freq_base_swa"),
        },
    }


def _rope_base(keys: Keys, key: str) -> dict[str, Any]:
    base = keys.get(key)
    return {} if base is None else {"rope_theta": base}


def _rope_scaling(keys: Keys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise EngineError(
            f"{keys.header.path} scales rotary embeddings by {kind!r}, which is not supported"
        )
    parameters = {"rope_type": kind, "factor": keys.need("rope.scaling.factor")}
    length = keys.get("rope.scaling.original_context_length")
    if length is not None:
        parameters["original_max_position_embeddings"] = length
    return parameters


def _llama3_scaling(keys: Keys) -> dict[str, Any] | None:
    """Parameters of `llama3` scaling, found from the divisors in the file; None: it has none.

    Such a file has no scaling key in its metadata, so that without the divisors the model would
    silently be unscaled. The parameters found must reproduce them.
    """
    if ROPE_FACTORS not in keys.header.tensors:
        return None
    stored = read_values(keys.header, ROPE_FACTORS).astype(np.float64)
    factor = float(stored.max())
    wavelengths = 2 * np.pi * keys.need("rope.freq_base") ** (np.arange(len(stored)) / len(stored))
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(stored, 1 / ((1 - unscaled) / factor + unscaled), rtol=1e-4):
        raise EngineError(
            f"{keys.header.path} has rotary factors other than those of Llama 3, which is not "
            "supported"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _LAYER_NAMES,
        _dense_config,
        permuted=frozenset({"attn_q", "attn_k"}),
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _LAYER_NAMES | _HEAD_NORM_NAMES, _dense_config),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _LAYER_NAMES
        | _HEAD_NORM_NAMES
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        _gemma3_config,
        norm_offset=1.0,
    ),
}
