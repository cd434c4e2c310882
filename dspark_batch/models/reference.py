"""The slow twin of the decoder graph: whole sequences, no cache, plain NumPy in fp32.

It shares the spec and the weights with the graph and nothing else: no block, no index, no cache.
The export compares the two, and tests compare both with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.spec import DecoderSpec, LayerSpec

Array = NDArray[np.float32]
Tensor = Callable[[str], NDArray[Any]]
Observe = Callable[[str, Array, Sequence[Array]], None]


@dataclass(frozen=True, slots=True)
class Forward:
    """`logits` [T, V] and the residual stream after each layer: -1 (embedding) .. layers - 1."""

    logits: Array
    streams: dict[int, Array]


def forward(
    spec: DecoderSpec,
    tensor: Tensor,
    sequences: Sequence[Sequence[int]],
    *,
    observe: Observe = lambda name, x, matrices: None,
) -> list[Forward]:
    """Run the decoder over each sequence by itself; reads every weight once and keeps none.

    `observe(name, x, matrices)` sees the input `[tokens, in]` of every linear layer, and the
    weights `[out, in]` that are applied to it.
    """

    def weight(name: str) -> Array:
        return np.asarray(tensor(f"{name}.weight"), dtype=np.float32)

    ends = np.cumsum([len(ids) for ids in sequences])
    every = [token for ids in sequences for token in ids]
    x = weight("model.embed_tokens")[every] * np.float32(spec.embedding_scale)
    streams = {-1: x}
    for i, layer in enumerate(spec.layers):
        name = f"model.layers.{i}"
        y = _norm(spec, weight, f"{name}.input_layernorm", x)
        parts = np.split(y, ends[:-1])
        y = _attention(spec, layer, weight, f"{name}.self_attn", parts, observe)
        if spec.sandwich_norms:
            y = _norm(spec, weight, f"{name}.post_attention_layernorm", y)
        x = x + y
        before = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
        y = _norm(spec, weight, f"{name}.{before}", x)
        gate_up = [weight(f"{name}.mlp.{p}_proj") for p in ("gate", "up")]
        observe(f"{name}.mlp.gate_up_proj", y, gate_up)
        y = _activate(spec.activation, y @ gate_up[0].T) * (y @ gate_up[1].T)
        down = weight(f"{name}.mlp.down_proj")
        observe(f"{name}.mlp.down_proj", y, [down])
        y = y @ down.T
        if spec.sandwich_norms:
            y = _norm(spec, weight, f"{name}.post_feedforward_layernorm", y)
        x = x + y
        streams[i] = x
    head = weight("model.embed_tokens" if spec.tied_head else "lm_head")
    x = _norm(spec, weight, "model.norm", x)
    observe("lm_head", x, [head])
    logits = np.split(x @ head.T, ends[:-1])
    return [
        Forward(row, {i: np.split(stream, ends[:-1])[r] for i, stream in streams.items()})
        for r, row in enumerate(logits)
    ]


def _norm(spec: DecoderSpec, weight: Callable[[str], Array], name: str, x: Array) -> Array:
    variance = np.mean(np.square(x, dtype=np.float32), axis=-1, keepdims=True)
    scaled = x / np.sqrt(variance + np.float32(spec.epsilon))
    return np.asarray(scaled * (weight(name) + np.float32(spec.norm_offset)), dtype=np.float32)


def _activate(kind: str, x: Array) -> Array:
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-x)), dtype=np.float32)
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), dtype=np.float32)


def _attention(
    spec: DecoderSpec,
    layer: LayerSpec,
    weight: Callable[[str], Array],
    name: str,
    sequences: Sequence[Array],
    observe: Observe,
) -> Array:
    """Attention of each sequence `[T, hidden]` within itself; all of them joined again."""
    x = np.concatenate(sequences)
    ends = np.cumsum([len(part) for part in sequences])[:-1]
    positions = np.concatenate([np.arange(len(part)) for part in sequences])

    qkv = [weight(f"{name}.{p}_proj") for p in "qkv"]
    observe(f"{name}.qkv_proj", x, qkv)
    q, k, v = ((x @ matrix.T).reshape(len(x), -1, spec.head_dim) for matrix in qkv)
    if spec.qk_norm:
        q, k = _norm(spec, weight, f"{name}.q_norm", q), _norm(spec, weight, f"{name}.k_norm", k)
    cos, sin = layer.rope.tables(int(positions.max()) + 1)
    q, k = _rotate(q, cos[positions], sin[positions]), _rotate(k, cos[positions], sin[positions])
    mixed = [
        _mix(spec, layer, *parts)
        for parts in zip(np.split(q, ends), np.split(k, ends), np.split(v, ends), strict=True)
    ]
    flat = np.concatenate(mixed).reshape(len(x), -1)
    out = weight(f"{name}.o_proj")
    observe(f"{name}.o_proj", flat, [out])
    return np.asarray(flat @ out.T, dtype=np.float32)


def _mix(spec: DecoderSpec, layer: LayerSpec, q: Array, k: Array, v: Array) -> Array:
    """Causal softmax attention of one sequence, head by head: `[T, heads, d]`."""
    age = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    seen = (age >= 0) & (age < (layer.window or len(q)))
    mixed = np.empty_like(q)
    for head in range(spec.num_heads):
        group = head // spec.group
        scores = np.where(seen, q[:, head] @ k[:, group].T * np.float32(spec.scale), -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[:, head] = (probs / probs.sum(axis=-1, keepdims=True)) @ v[:, group]
    return mixed


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
