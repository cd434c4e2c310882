"""The reference of the target graph: plain NumPy in fp32, without a cache.

It shares only the spec and the weights with the graph. An export compares the two; tests compare
both with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.spec import DecoderSpec, LayerSpec, RopeSpec
from dspark_batch.models.weights import ReadTensor

Array = NDArray[np.float32]
Observe = Callable[[str, Array, Sequence[NDArray[Any]]], None]
_BLOCK = 2**24  # elements of a weight that are converted to fp32 at a time


@dataclass(frozen=True, slots=True)
class Forward:
    """Result for one sequence of T tokens."""

    normed: Array
    """[T, hidden] input of the head."""
    streams: dict[int, Array]
    """[T, hidden] residual stream after each tapped layer (-1: the embedding)."""
    head: Callable[[Array], Array]
    """From `[T, hidden]` to logits `[T, V]`."""

    @property
    def logits(self) -> Array:
        """[T, V], computed at each access: for many tokens they are large."""
        return self.head(self.normed)


def forward(
    spec: DecoderSpec,
    read: ReadTensor,
    sequences: Sequence[Sequence[int]],
    *,
    taps: Sequence[int] = (),
    observe: Observe = lambda name, x, matrices: None,
) -> list[Forward]:
    """Run the decoder over each sequence on its own. Weights are read when needed and not kept.

    `observe(name, x, matrices)` is called for each linear layer: with its input `[tokens, in]` and
    the weights `[out, in]`, as stored, that are applied to it.
    """
    decoder = _Decoder(spec, read, sequences, observe=observe)
    streams = {}
    for i, stream in decoder.streams():
        if i in taps:
            streams[i] = decoder.split(stream)
    normed = decoder.normed(stream)
    observe("lm_head", normed, [head_weight(spec, read)])

    def head(x: Array) -> Array:
        return logits(spec, head_weight(spec, read), x)

    return [
        Forward(row, {i: parts[r] for i, parts in streams.items()}, head)
        for r, row in enumerate(decoder.split(normed))
    ]


def head_weight(spec: DecoderSpec, read: ReadTensor) -> NDArray[Any]:
    """Weight `[V, hidden]` of the head, as stored."""
    return read(f"{'model.embed_tokens' if spec.tied_head else 'lm_head'}.weight")


def logits(spec: DecoderSpec, weight: NDArray[Any], normed: Array) -> Array:
    """[T, V] from the head's weight and its input `[T, hidden]`."""
    return cap(product(normed, weight), spec.logit_cap)


def row_blocks(matrix: NDArray[Any]) -> Iterator[tuple[slice, Array]]:
    """The matrix in fp32, a block of rows at a time."""
    step = max(1, _BLOCK // matrix.shape[1])
    for begin in range(0, len(matrix), step):
        rows = slice(begin, begin + step)
        yield rows, np.asarray(matrix[rows], dtype=np.float32)


class _Decoder:
    """One pass over flattened sequences, layer by layer."""

    def __init__(
        self,
        spec: DecoderSpec,
        read: ReadTensor,
        sequences: Sequence[Sequence[int]],
        *,
        observe: Observe,
    ) -> None:
        self._spec, self._read, self._observe = spec, read, observe
        self._tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences])
        self._ends = np.cumsum([len(ids) for ids in sequences])[:-1]
        self._positions = np.concatenate([np.arange(len(ids)) for ids in sequences])
        self._shared = {layer.shares_with for layer in spec.layers}
        self._keys_values: dict[int, tuple[Array, Array]] = {}  # of the layers in _shared

    def split(self, x: Array) -> list[Array]:
        """`[T, n]` of all tokens, split by sequence."""
        return np.split(x, self._ends)

    def streams(self) -> Iterator[tuple[int, Array]]:
        """The residual stream `[T, hidden]` after the embedding (-1) and after each layer."""
        spec = self._spec
        embedded = self._rows("model.embed_tokens") * np.float32(spec.embedding_scale)
        x = embedded
        yield -1, x
        inputs = self._layer_inputs(embedded) if spec.layer_input_size else None
        for i, layer in enumerate(spec.layers):
            name = f"model.layers.{i}"
            y = self._attention(i, layer, self._norm(f"{name}.input_layernorm", x))
            if spec.sandwich_norms:
                y = self._norm(f"{name}.post_attention_layernorm", y)
            x = x + y
            y = self._mlp(name, x)
            if spec.sandwich_norms:
                y = self._norm(f"{name}.post_feedforward_layernorm", y)
            x = x + y
            if inputs is not None:
                gate = activate(spec.activation, self._apply(f"{name}.per_layer_input_gate", x))
                y = self._apply(f"{name}.per_layer_projection", gate * inputs[:, i])
                x = x + self._norm(f"{name}.post_per_layer_input_norm", y)
            if spec.layer_scalar:
                x = x * np.asarray(self._read(f"{name}.layer_scalar"), dtype=np.float32)
            yield i, x

    def normed(self, x: Array) -> Array:
        """Input of the head, from the last residual stream."""
        return self._norm("model.norm", x)

    def _weight(self, name: str) -> NDArray[Any]:
        return self._read(f"{name}.weight")

    def _rows(self, name: str) -> Array:
        return np.asarray(self._weight(name)[self._tokens], dtype=np.float32)

    def _apply(self, name: str, x: Array) -> Array:
        return product(x, self._weight(name))

    def _observed(self, name: str, x: Array, layers: Sequence[str]) -> list[Array]:
        matrices = [self._weight(layer) for layer in layers]
        self._observe(name, x, matrices)
        return [product(x, matrix) for matrix in matrices]

    def _norm(self, name: str, x: Array) -> Array:
        scale = np.asarray(self._weight(name), dtype=np.float32)
        return plain_norm(x, self._spec.epsilon) * (scale + np.float32(self._spec.norm_offset))

    def _layer_inputs(self, embedded: Array) -> Array:
        """Per-layer inputs `[T, layers, n]`."""
        spec = self._spec
        shape = (len(embedded), spec.num_layers, spec.layer_input_size)
        projected = self._apply("model.per_layer_model_projection", embedded)
        projected = (projected * np.float32(spec.hidden_size**-0.5)).reshape(shape)
        rows = self._rows("model.embed_tokens_per_layer").reshape(shape)
        rows = rows * np.float32(spec.layer_input_size**0.5)
        return (self._norm("model.per_layer_projection_norm", projected) + rows) * np.float32(
            2**-0.5
        )

    def _mlp(self, name: str, x: Array) -> Array:
        before = (
            "pre_feedforward_layernorm" if self._spec.sandwich_norms else "post_attention_layernorm"
        )
        x = self._norm(f"{name}.{before}", x)
        wide = [f"{name}.mlp.{part}_proj" for part in ("gate", "up")]
        gate, up = self._observed(f"{name}.mlp.gate_up_proj", x, wide)
        y = activate(self._spec.activation, gate) * up
        return self._observed(f"{name}.mlp.down_proj", y, [f"{name}.mlp.down_proj"])[0]

    def _attention(self, i: int, layer: LayerSpec, x: Array) -> Array:
        """Attention of each sequence within itself, `[T, hidden]`."""
        spec, name = self._spec, f"model.layers.{i}.self_attn"
        names = [f"{name}.{part}_proj" for part in layer.projections]
        parts = self._observed(f"{name}.qkv_proj", x, names)
        q, *kv = (part.reshape(len(x), -1, layer.head_dim) for part in parts)
        if spec.qk_norm:
            q = self._norm(f"{name}.q_norm", q)
        if kv:
            k, v = kv[0], kv[-1]
            if spec.qk_norm:
                k = self._norm(f"{name}.k_norm", k)
            if spec.v_norm:
                v = plain_norm(v, spec.epsilon)
            own = self._rotated(layer, k), v
            if i in self._shared:
                self._keys_values[i] = own
        else:
            assert layer.shares_with is not None
            own = self._keys_values[layer.shares_with]
        triple = (self._rotated(layer, q), *own)
        rows = zip(*(self.split(part) for part in triple), strict=True)
        mixed = np.concatenate([_mix(spec, layer, *parts) for parts in rows])
        return self._observed(f"{name}.o_proj", mixed.reshape(len(x), -1), [f"{name}.o_proj"])[0]

    def _rotated(self, layer: LayerSpec, x: Array) -> Array:
        return rotate(layer.rope, x, self._positions)


def plain_norm(x: Array, epsilon: float) -> Array:
    """RMSNorm over the last axis, without a weight."""
    variance = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(variance + np.float32(epsilon)))


def rotate(rope: RopeSpec, x: Array, positions: NDArray[np.int64]) -> Array:
    """RoPE of heads `[.., heads, d]` at positions `[..]`; a pair lies d / 2 apart."""
    cos, sin = (
        table[positions][..., None, :] for table in rope.tables(int(positions.max(initial=0)) + 1)
    )
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(scores: Array) -> Array:
    """Softmax over the last axis; -inf becomes 0."""
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(probs / probs.sum(axis=-1, keepdims=True))


def product(x: Array, matrix: NDArray[Any]) -> Array:
    """`[T, in]` times the transpose of `[out, in]`, in fp32."""
    y = np.empty((len(x), len(matrix)), np.float32)
    for rows, block in row_blocks(matrix):
        y[:, rows] = x @ block.T
    return y


def cap(x: Array, limit: float | None) -> Array:
    """limit * tanh(x / limit); None: x itself."""
    if limit is None:
        return x
    return np.asarray(limit * np.tanh(x / np.float32(limit)), dtype=np.float32)


def activate(kind: str, x: Array) -> Array:
    """`DecoderSpec.activation`: `silu`, or else `gelu_tanh`."""
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-x)), dtype=np.float32)
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), dtype=np.float32)


def _mix(spec: DecoderSpec, layer: LayerSpec, q: Array, k: Array, v: Array) -> Array:
    """Causal softmax attention of one sequence, head by head: `[T, heads, d]`."""
    age = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    seen = (age >= 0) & (age < (layer.window or len(q)))
    scale = np.float32(spec.scale(layer))
    mixed = np.empty_like(q)
    for head in range(spec.num_heads):
        group = head // spec.group(layer)
        scores = np.where(seen, q[:, head] @ k[:, group].T * scale, -np.inf)
        mixed[:, head] = softmax(scores) @ v[:, group]
    return mixed
