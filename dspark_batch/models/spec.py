"""`DecoderSpec`: all that the graph and the reference need to know about a decoder, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary frequencies `[d/2]` (fp32), and a factor on cos and sin (of YaRN, otherwise 1)."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0

    def tables(self, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin, each `[length, d/2]` fp32."""
        frequencies = np.asarray(self.inverse_frequencies, dtype=np.float32)
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention of one layer."""

    rope: RopeSpec
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Newest keys that a query sees in a sliding layer, counting its own; None: all keys."""
    keys_as_values: bool = False
    """No value projection: values are the raw key projection (Gemma 4)."""
    shares_with: int | None = None
    """Layer whose keys and values this one reads (Gemma 4); None: it has its own."""

    @property
    def projections(self) -> str:
        """Which of q, k and v the layer computes, as a string."""
        if self.shares_with is not None:
            return "q"
        return "qk" if self.keys_as_values else "qkv"


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer. The fields with a default are what families differ in."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    epsilon: float
    activation: str = "silu"
    qk_norm: bool = False
    """RMSNorm over each head's query and key before RoPE (Qwen3, Gemma)."""
    v_norm: bool = False
    """RMSNorm without a weight over each head's value (Gemma 4)."""
    sandwich_norms: bool = False
    """Norms also after attention and after the MLP (Gemma)."""
    norm_offset: float = 0.0
    """Added to every norm weight (Gemma 3 stores w - 1)."""
    layer_scalar: bool = False
    """Each layer's output is multiplied by a stored number (Gemma 4)."""
    layer_input_size: int = 0
    """Width of the per-layer inputs, which are made from the tokens (Gemma 4); 0: none."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor on query times key; None: head_dim ** -0.5."""
    logit_cap: float | None = None
    """Soft cap of the logits: cap * tanh(logit / cap); None: no cap."""
    tied_head: bool = False
    """The output head is the embedding table."""
    max_positions: int = 2048

    def scale(self, layer: LayerSpec) -> float:
        """Factor on query times key in a layer."""
        return self.attention_scale or layer.head_dim**-0.5

    def group(self, layer: LayerSpec) -> int:
        """Query heads per key/value head."""
        return self.num_heads // layer.num_kv_heads

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(key/value heads, head size) of each layer that has keys and values of its own."""
        return tuple(
            (layer.num_kv_heads, layer.head_dim)
            for layer in self.layers
            if layer.shares_with is None
        )


_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(name: str) -> str:
    """`DecoderSpec.activation` for a config's name. Raises ValueError for an unsupported one."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported")
    return _ACTIVATIONS[name]


def rope_from_parameters(
    parameters: Mapping[str, Any], *, head_dim: int, max_positions: int
) -> RopeSpec:
    """RoPE of one `rope_parameters` dict: default, linear, proportional, llama3 or YaRN.

    Raises ValueError for any other `rope_type`: the default in its place would be silently wrong.
    """
    theta = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    share = float(parameters.get("partial_rotary_factor") or 1.0)
    powers = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = 1.0 / theta**powers
    factor = float(parameters.get("factor", 1.0) or 1.0)
    if kind == "proportional":  # the lowest frequencies do not rotate at all
        frequencies[int(share * head_dim // 2) :] = 0.0
        return _rope(frequencies / factor)
    if share != 1.0:
        raise ValueError(f"rope_parameters.partial_rotary_factor {share} is not supported")
    if kind == "default":
        return _rope(frequencies)
    if kind == "linear":
        return _rope(frequencies / factor)
    original = float(parameters.get("original_max_position_embeddings") or max_positions)
    if kind == "llama3":
        return _rope(_llama3(frequencies, parameters, factor=factor, original=original))
    if kind == "yarn":
        return _yarn(frequencies, parameters, theta=theta, factor=factor, original=original)
    raise ValueError(f"rope_parameters.rope_type {kind!r} is not supported")


def _rope(frequencies: NDArray[np.float64], attention_factor: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(float(f) for f in frequencies), attention_factor)


def _llama3(
    frequencies: NDArray[np.float64],
    parameters: Mapping[str, Any],
    *,
    factor: float,
    original: float,
) -> NDArray[np.float64]:
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn(
    frequencies: NDArray[np.float64],
    parameters: Mapping[str, Any],
    *,
    theta: float,
    factor: float,
    original: float,
) -> RopeSpec:
    """YaRN (Peng et al. 2023, section 3.2 and Eq. 22 for the attention factor)."""
    dim = 2 * len(frequencies)

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = correction(float(parameters.get("beta_fast") or 32))
    high = correction(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")

        def amount(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention_factor = amount(mscale) / amount(all_dim) if mscale and all_dim else amount(1.0)
    return _rope(blended, float(attention_factor))
