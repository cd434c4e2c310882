"""The target in torch: `models.reference` in batches, on any device, with a cache to decode from.

Products are taken in the dtype of the weights; the residual stream, norms and rotations are fp32.
Symbols: b rows, n new positions, C cached positions, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models import DecoderSpec, LayerSpec, RopeSpec
from dspark_batch.models.weights import ReadTensor


class KeysValues:
    """Keys and values of b rows, up to `capacity` positions each.

    A position is written before a query may see it, so what padding left behind has no weight.
    """

    def __init__(self, layers: dict[int, Tensor]) -> None:
        """`[2, b, heads, capacity, size]` of each layer that has keys and values of its own."""
        self._layers = layers

    @classmethod
    def empty(
        cls,
        spec: DecoderSpec,
        num_rows: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Room for rows of a target. Zeros, as even without weight a NaN would spread."""
        return cls(
            {
                i: torch.zeros(
                    (2, num_rows, layer.num_kv_heads, capacity, layer.head_dim),
                    device=device,
                    dtype=dtype,
                )
                for i, layer in enumerate(spec.layers)
                if layer.shares_with is None
            }
        )

    @staticmethod
    def num_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
        """Memory of one position of one row."""
        return 2 * dtype.itemsize * sum(heads * size for heads, size in spec.cache_shapes)

    def rows(self, rows: slice) -> KeysValues:
        """A view of some rows."""
        return KeysValues({i: pair[:, rows] for i, pair in self._layers.items()})

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those at the indices `[k]`."""
        for i in self._layers:  # one after another: only one layer is in memory twice
            self._layers[i] = self._layers[i][:, rows]

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, *, positions: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Write rows `[b, heads, n, size]` at `positions [b, n]`; all that lies before `end`."""
        pair = self._layers[layer]
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        # The advanced indices come first in the result: [b, n, heads, size].
        pair[0][rows, :, positions] = keys.transpose(1, 2)
        pair[1][rows, :, positions] = values.transpose(1, 2)
        return pair[0, :, :, :end], pair[1, :, :, :end]


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a pass gives, fp32."""

    normed: Tensor
    """[b, n, d] input of the head."""
    streams: dict[int, Tensor]
    """[b, n, d] residual stream after each tapped layer (-1: the embedding)."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of a layer, the ones that share an input side by side; norms with their offset."""

    spec: LayerSpec
    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    norms: dict[str, Tensor]
    scalar: Tensor | None
    input_gate: Tensor | None
    input_projection: Tensor | None


class Decoder:
    """A target with all of its weights on one device."""

    def __init__(
        self,
        spec: DecoderSpec,
        read: ReadTensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`read` is `Weights.tensor`. Raises `EngineError` where a weight is missing."""
        self.spec, self.device, self.dtype = spec, device, dtype
        self._read: ReadTensor = read
        self._embedding = self._matrix("model.embed_tokens.weight")
        self.head = self._embedding if spec.tied_head else self._matrix("lm_head.weight")
        """[V, d]"""
        self._norm_weight = self._norm("model.norm")
        self._layers = [self._layer(i, layer) for i, layer in enumerate(spec.layers)]
        if spec.layer_input_size:
            self._input_embedding = self._matrix("model.embed_tokens_per_layer.weight")
            self._input_projection = self._matrix("model.per_layer_model_projection.weight")
            self._input_norm = self._norm("model.per_layer_projection_norm")
        self._ropes = {
            layer.rope: torch.tensor(layer.rope.inverse_frequencies, device=device)
            for layer in spec.layers
        }

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KeysValues | None = None,
        end: int | None = None,
        taps: Collection[int] = (),
    ) -> Hidden:
        """Run `tokens [b, n]`, right-padded with anything.

        Without a cache the rows begin here. With one they stand at `positions [b, n]`, and `end` is
        above all of these.
        """
        spec = self.spec
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=self.device)[None].expand_as(tokens)
        attention = _Attention(spec, self._ropes, positions, cache, end or tokens.shape[1])
        x = functional.embedding(tokens, self._embedding).float() * spec.embedding_scale
        inputs = self._layer_inputs(tokens, x) if spec.layer_input_size else None
        streams = {-1: x} if -1 in taps else {}
        for i, layer in enumerate(self._layers):
            y = self._rms(x, layer.norms["input_layernorm"])
            y = self._apply(attention(i, layer, self._apply(y, layer.qkv)), layer.output)
            if spec.sandwich_norms:
                y = self._rms(y, layer.norms["post_attention_layernorm"])
            x = x + y
            y = self._mlp(layer, x)
            if spec.sandwich_norms:
                y = self._rms(y, layer.norms["post_feedforward_layernorm"])
            x = x + y
            if inputs is not None and layer.input_gate is not None:
                assert layer.input_projection is not None
                gate = self._activate(self._apply(x, layer.input_gate))
                y = self._apply(gate * inputs[:, :, i], layer.input_projection)
                x = x + self._rms(y, layer.norms["post_per_layer_input_norm"])
            if layer.scalar is not None:
                x = x * layer.scalar
            if i in taps:
                streams[i] = x
        return Hidden(self._rms(x, self._norm_weight), streams)

    @torch.inference_mode()
    def logits(self, normed: Tensor) -> Tensor:
        """Logits `[..., V]`, fp32, of inputs of the head `[..., d]`."""
        logits, cap = self._apply(normed, self.head), self.spec.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _matrix(self, *names: str) -> Tensor:
        """Weights `[out, in]` one below the other."""
        parts = [
            torch.from_numpy(np.array(self._read(name), dtype=np.float32)).to(
                self.device, self.dtype
            )
            for name in names
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self._read(name), dtype=np.float32)).to(self.device)

    def _norm(self, name: str) -> Tensor:
        return self._vector(f"{name}.weight") + self.spec.norm_offset

    def _layer(self, i: int, layer: LayerSpec) -> _Layer:
        spec, name = self.spec, f"model.layers.{i}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if spec.sandwich_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if spec.qk_norm:
            norms += ["self_attn.q_norm"] + ["self_attn.k_norm"] * ("k" in layer.projections)
        if spec.layer_input_size:
            norms.append("post_per_layer_input_norm")
        has_input = bool(spec.layer_input_size)
        return _Layer(
            layer,
            self._matrix(*(f"{name}.self_attn.{p}_proj.weight" for p in layer.projections)),
            self._matrix(f"{name}.self_attn.o_proj.weight"),
            self._matrix(f"{name}.mlp.gate_proj.weight", f"{name}.mlp.up_proj.weight"),
            self._matrix(f"{name}.mlp.down_proj.weight"),
            {norm: self._norm(f"{name}.{norm}") for norm in norms},
            self._vector(f"{name}.layer_scalar") if spec.layer_scalar else None,
            self._matrix(f"{name}.per_layer_input_gate.weight") if has_input else None,
            self._matrix(f"{name}.per_layer_projection.weight") if has_input else None,
        )

    def _apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        y: Tensor = functional.linear(x.to(self.dtype), matrix)
        return y.float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.spec.epsilon)

    def _activate(self, x: Tensor) -> Tensor:
        if self.spec.activation == "silu":
            return functional.silu(x)
        return functional.gelu(x, approximate="tanh")

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        before = (
            "pre_feedforward_layernorm" if self.spec.sandwich_norms else "post_attention_layernorm"
        )
        gate, up = self._apply(self._rms(x, layer.norms[before]), layer.gate_up).chunk(2, dim=-1)
        return self._apply(self._activate(gate) * up, layer.down)

    def _layer_inputs(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """Per-layer inputs `[b, n, layers, size]`."""
        spec = self.spec
        shape = (*tokens.shape, spec.num_layers, spec.layer_input_size)
        projected = self._apply(embedded, self._input_projection) / math.sqrt(spec.hidden_size)
        rows = functional.embedding(tokens, self._input_embedding).float()
        rows = rows * math.sqrt(spec.layer_input_size)
        normed = self._rms(projected.view(shape), self._input_norm)
        return (normed + rows.view(shape)) * math.sqrt(0.5)


class _Attention:
    """Attention of one pass: positions, masks and rotations, which layers have in common."""

    def __init__(
        self,
        spec: DecoderSpec,
        ropes: dict[RopeSpec, Tensor],
        positions: Tensor,
        cache: KeysValues | None,
        end: int,
    ) -> None:
        self._spec, self._positions, self._cache, self._end = spec, positions, cache, end
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}
        self._givers = {layer.shares_with for layer in spec.layers}
        self._masks: dict[tuple[int | None, int], Tensor] = {}
        self._rotations = {
            rope: self._rotation(rope, frequencies) for rope, frequencies in ropes.items()
        }

    def __call__(self, i: int, layer: _Layer, projected: Tensor) -> Tensor:
        """Mixed heads `[b, n, heads * size]` from the projections `[b, n, ...]` of layer i."""
        spec, attention = self._spec, layer.spec
        kv_heads, size = attention.num_kv_heads, attention.head_dim
        b, n, _ = projected.shape
        heads = projected.view(b, n, -1, size).transpose(1, 2)  # [b, heads, n, size]
        others = [kv_heads] * (len(attention.projections) - 1)
        queries, *kv = torch.split(heads, [spec.num_heads, *others], dim=1)
        dtype = layer.qkv.dtype
        if spec.qk_norm:
            queries = self._rms(queries, layer.norms["self_attn.q_norm"])
        if kv:
            keys, values = kv[0], kv[-1]
            if spec.qk_norm:
                keys = self._rms(keys, layer.norms["self_attn.k_norm"])
            if spec.v_norm:
                values = self._rms(values, None)
            own = self._rotated(attention, keys).to(dtype), values.to(dtype)
            if self._cache is not None:
                own = self._cache.extend(i, *own, positions=self._positions, end=self._end)
            if i in self._givers:
                self._shared[i] = own
        else:
            assert attention.shares_with is not None
            own = self._shared[attention.shares_with]
        # The heads of a group stand below each other: one product against their common keys.
        queries = self._rotated(attention, queries).to(dtype)
        mixed = functional.scaled_dot_product_attention(
            queries.reshape(b, kv_heads, -1, size),
            *own,
            attn_mask=self._mask(attention.window, spec.group(attention)),
            scale=spec.scale(attention),
        )
        return mixed.reshape(b, spec.num_heads, n, size).transpose(1, 2).flatten(2)

    def _rms(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, self._spec.epsilon)

    def _rotation(self, rope: RopeSpec, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each `[b, 1, n, size / 2]`."""
        angles = self._positions[:, None, :, None].float() * frequencies
        return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor

    def _rotated(self, layer: LayerSpec, x: Tensor) -> Tensor:
        cos, sin = self._rotations[layer.rope]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _mask(self, window: int | None, group: int) -> Tensor:
        """[b, 1, group * n, C] bool: which positions a query sees."""
        if (window, group) not in self._masks:
            places = torch.arange(self._end, device=self._positions.device)
            age = self._positions[:, None, :, None] - places
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            self._masks[window, group] = seen.repeat(1, 1, group, 1)
        return self._masks[window, group]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of token ids side by side, `[b, n]`, right-padded with 0."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens.to(device)
