"""The target graph: a decoder with a KV cache, taps for the draft, and verification.

Sizes of a call: R rows with T tokens in all, S tokens in the longest row, N tokens whose logits
are computed; the caches have room for C tokens of each row. Inputs:

    tokens        int64 [T]             tokens of the first row, then of the second, ...
    starts        int64 [R]             number of tokens of each row that its cache holds already
    token_index   int64 [R, S]          index into `tokens` for each cell; for padding any index
    cell_index    int64 [T]             cell of each token, as row * S + s
    logit_tokens  int64 [N]             indices into `tokens`: those whose logits are computed
    past_key_i    float [R, kv, C, d]
    past_value_i  float [R, kv, C, d]

and those of `plugin.contract`. Outputs:

    num_accepted  int64 [R]
    bonus         int64 [R]
    context       float [T, taps * hidden]   residual stream after the tapped layers
    logits        fp32  [N, V]               for measurements; a run never fetches it
    present_key_i, present_value_i           the caches with the new tokens; shaped as the past

i counts the layers with keys and values of their own; kv and d may differ between them. Past and
present must be bound to the same buffers, and C >= max(starts) + S must hold: padding cells write
keys too, beyond the end of their row, where they are masked and later overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.graph import (
    DOWN_MIX,
    DTYPES,
    FLOAT,
    INT64,
    MASKED,
    STREAM_MIX,
    Activation,
    Dim,
    GraphBuilder,
    Linears,
    StoredWeight,
    activate,
    attention,
    embedding,
    fold_queries,
    folded_scores,
    plain_norm,
    rms_norm,
    rope_tables,
    rotate,
    row_product,
    rows_from_tokens,
    soft_cap,
    tokens_from_rows,
    unfold_queries,
)
from dspark_batch.models.plugin import contract, onnx_body
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.spec import DecoderSpec, LayerSpec
from dspark_batch.models.weights import ReadTensor

_TYPES = {"float32": FLOAT, "int64": INT64}


def stream_name(layer: int) -> str:
    """Name in the graph of the residual stream `[T, hidden]` after a layer (-1: the embedding)."""
    return f"stream_{layer}"


class DecoderGraph:
    """Builds the graph of one target."""

    def __init__(
        self,
        builder: GraphBuilder,
        spec: DecoderSpec,
        read: ReadTensor,
        *,
        precision: str,
        smoothing: Smoothing | None = None,
    ) -> None:
        self.b = builder
        self._smooth = smoothing or Smoothing()
        self.spec = spec
        self._read = read
        self._linears = Linears(builder, precision)
        self._masks: dict[tuple[int | None, int], str] = {}
        self._ropes: dict[object, tuple[str, str]] = {}

    def build(
        self, *, taps: Sequence[int], draft_vocab: NDArray[np.int64] | None, max_tokens: int
    ) -> None:
        """Add all nodes. `taps` are layer indices, with -1 for the embedding, as in DeepSpec.

        `draft_vocab` maps draft ids to target ids. None: there is no draft network; drafts, if
        there are any, are looked up and certain.
        """
        b, spec = self.b, self.spec
        self._tokens = b.input("tokens", INT64, ["T"])
        self._starts = b.input("starts", INT64, ["R"])
        self._token_index = b.input("token_index", INT64, ["R", "S"])
        self._cell_index = b.input("cell_index", INT64, ["T"])
        logit_tokens = b.input("logit_tokens", INT64, ["N"])
        self._max_tokens = max_tokens
        self._caches = [
            tuple(
                b.input(f"past_{kind}_{n}", b.data_type, ["R", num_kv_heads, "C", head_dim])
                for kind in ("key", "value")
            )
            for n, (num_kv_heads, head_dim) in enumerate(spec.cache_shapes)
        ]
        self._keys_values: dict[int, tuple[str, str]] = {}
        self._index_positions()
        x = self._embedded("model.embed_tokens", spec.embedding_scale)
        if spec.layer_input_size:
            self._inputs = self._layer_inputs(x)
        x = b.rename(x, stream_name(-1))
        streams = {-1: x}
        for i, layer in enumerate(spec.layers):
            x = b.rename(self._layer(i, layer, x), stream_name(i))
            streams[i] = x
        self._head(b.op("Gather", x, logit_tokens), logit_tokens)
        context = [streams[i] for i in taps]
        joined = b.op("Concat", *context, axis=1)
        b.output(joined, "context", b.data_type, ["T", len(taps) * spec.hidden_size])
        self._verify(draft_vocab)

    def head_weights(self) -> tuple[dict[str, StoredWeight], NDArray[np.float32] | None]:
        """What a draft needs to share the head: where it is stored, and its smoothing factors.

        The head's input must be divided by the factors; None: it is not smoothed.
        """
        if self._linears.precision.weight_bits is None:
            name = "model.embed_tokens" if self.spec.tied_head else "lm_head"
            return {"lm_head": self.b.stored(name)}, None
        names = ("lm_head", "lm_head.scale")
        return {name: self.b.stored(name) for name in names}, self._smooth.rows("lm_head")

    def _index_positions(self) -> None:
        b = self.b
        zero, one = b.constant(0), b.constant(1)
        num_cells = b.op("Squeeze", b.op("Shape", self._token_index, start=1, end=2))
        offsets = b.op("Unsqueeze", b.op("Range", zero, num_cells, one), b.constant([0]))
        starts = b.op("Unsqueeze", self._starts, b.constant([1]))
        self._cell_positions = b.op("Add", starts, offsets)  # [R, S]
        # A padding cell may lie beyond the end of the tables.
        last = b.constant(self._max_tokens - 1)
        self._rope_positions = b.op("Min", self._cell_positions, last)
        capacity = b.op("Squeeze", b.op("Shape", self._caches[0][0], start=2, end=3))
        keys = b.op("Range", zero, capacity, one)
        self._key_positions = b.op("Unsqueeze", keys, b.constant([0, 1]))  # [1, 1, C]

    def _mask(self, layer: LayerSpec) -> str:
        """Causal mask, inside the window of a sliding layer.

        For native attention bool `[R, 1, S, C]`; else `[R, 1, G * S, C]`, to be added to scores.
        """
        native = self._linears.precision.native_attention
        window, group = layer.window, 1 if native else self.spec.group(layer)
        if (window, group) not in self._masks:
            b, seen = self.b, self._seen(window)
            if not native:
                zero, masked = (b.constant(value, np.float32) for value in (0.0, MASKED))
                added = b.op("Where", seen, zero, masked)
                seen = b.op("Concat", *[added] * group, axis=1)
            self._masks[window, group] = b.op("Unsqueeze", seen, b.constant([1]))
        return self._masks[window, group]

    def _seen(self, window: int | None) -> str:
        """Whether a query sees a key, `[R, S, C]`."""
        b = self.b
        queries = b.op("Unsqueeze", self._cell_positions, b.constant([2]))
        seen = b.op("LessOrEqual", self._key_positions, queries)
        if window is not None:
            oldest = b.op("Sub", queries, b.constant(window - 1))
            inside = b.op("GreaterOrEqual", self._key_positions, oldest)
            seen = b.op("And", seen, inside)
        return seen

    def _rope(self, layer: LayerSpec) -> tuple[str, str]:
        if layer.rope not in self._ropes:
            tables = layer.rope.tables(self._max_tokens)
            self._ropes[layer.rope] = rope_tables(self.b, f"rope.{len(self._ropes)}", tables)
        return self._ropes[layer.rope]

    def _norm(self, x: str, name: str, *, factor: float = 1.0, feeds: str | None = None) -> str:
        """RMSNorm, times `factor`; `feeds` is the smoothed linear layer that takes the result."""
        weight = self._read(f"{name}.weight").astype(np.float32) + self.spec.norm_offset
        if feeds is not None:
            weight = self._smooth.divide(feeds, weight)
        return rms_norm(self.b, x, name, weight * np.float32(factor), self.spec.epsilon)

    def _stream(self, x: str, like: str) -> Activation:
        """`x` `[n, hidden]` as the input of linear layers; `like`: a 1-D value of length n."""
        return self._linears.activation(x, like, size=self.spec.hidden_size, mix=STREAM_MIX)

    def _matrix(self, name: str) -> NDArray[Any]:
        return self._read(f"{name}.weight").T

    def _layer(self, i: int, layer: LayerSpec, x: str) -> str:
        b, spec, name = self.b, self.spec, f"model.layers.{i}"
        attended = self._attention(i, layer, x)
        if spec.sandwich_norms:
            attended = self._norm(attended, f"{name}.post_attention_layernorm")
        x = b.op("Add", x, attended)
        before = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
        y = self._norm(x, f"{name}.{before}", feeds=f"{name}.mlp.gate_up_proj")
        y = self._mlp(f"{name}.mlp", y)
        if spec.sandwich_norms:
            y = self._norm(y, f"{name}.post_feedforward_layernorm")
        x = b.op("Add", x, y)
        if spec.layer_input_size:
            x = b.op("Add", x, self._layer_input(i, x))
        if spec.layer_scalar:
            scalar = self._read(f"{name}.layer_scalar")
            x = b.op("Mul", x, b.number(scalar.astype(np.float32)))
        return x

    def _mlp(self, name: str, x: str) -> str:
        b, linears = self.b, self._linears
        wide, narrow = f"{name}.gate_up_proj", f"{name}.down_proj"
        columns = self._smooth.divide(narrow, self._matrix(f"{name}.up_proj"))
        both = np.concatenate([self._matrix(f"{name}.gate_proj"), columns], axis=1)
        activation = self._stream(x, self._tokens)
        merged = linears.linear(wide, activation, both, self._smooth.rows(wide))
        gate, up = b.ops("Split", merged, outputs=2, axis=1, num_outputs=2)
        product = b.op("Mul", activate(b, gate, self.spec.activation), up)
        matrix = self._matrix(narrow)
        activation = linears.activation(product, self._tokens, size=len(matrix), mix=DOWN_MIX)
        return linears.linear(narrow, activation, matrix, self._smooth.rows(narrow))

    def _attention(self, i: int, layer: LayerSpec, x: str) -> str:
        b, spec, linears = self.b, self.spec, self._linears
        name, heads, size = f"model.layers.{i}.self_attn", spec.num_heads, layer.head_dim
        q = self._queries(i, layer, x)
        keys, values = self._keys_values[i if layer.shares_with is None else layer.shares_with]
        if linears.precision.native_attention:
            mixed = attention(b, q, keys, values, self._mask(layer))
        else:
            q = fold_queries(b, q, num_kv_heads=layer.num_kv_heads, head_dim=size)
            may_be_one_row = heads == layer.num_kv_heads
            scores = folded_scores(b, q, keys, head_dim=size, may_be_one_row=may_be_one_row)
            probs = b.op("Softmax", b.op("Add", scores, self._mask(layer)), axis=-1)
            mixed = row_product(b, probs, values, may_be_one_row=may_be_one_row)
            mixed = unfold_queries(b, mixed, num_heads=heads, head_dim=size)
        flat = tokens_from_rows(b, mixed, self._cell_index, width=heads * size)
        activation = linears.activation(flat, self._tokens)
        out = f"{name}.o_proj"
        return linears.linear(out, activation, self._matrix(out), self._smooth.rows(out))

    def _queries(self, i: int, layer: LayerSpec, x: str) -> str:
        """Rotated and scaled queries `[R, heads, S, d]`.

        Also writes the layer's keys and values, if it has its own, into its cache.
        """
        b, spec = self.b, self.spec
        name, heads, kv_heads = f"model.layers.{i}.self_attn", spec.num_heads, layer.num_kv_heads
        sizes = [heads, kv_heads, kv_heads][: len(layer.projections)]
        rows = rows_from_tokens(
            b,
            self._projected(i, layer, x),
            self._token_index,
            num_heads=sum(sizes),
            head_dim=layer.head_dim,
        )
        if spec.qk_norm:
            turning, *kv = b.ops("Split", rows, b.constant(sizes), outputs=len(sizes), axis=1)
            turning = self._norm(turning, f"{name}.q_norm", factor=spec.scale(layer))
            if kv:
                turning = b.op("Concat", turning, self._norm(kv[0], f"{name}.k_norm"), axis=1)
        else:
            assert layer.projections == "qkv"
            split = b.constant([heads + kv_heads, kv_heads])
            turning, *kv = b.ops("Split", rows, split, outputs=2, axis=1)
        turned = rotate(b, turning, self._rope(layer), self._rope_positions)
        if not kv:
            return turned
        q, k = b.ops("Split", turned, b.constant([heads, kv_heads]), outputs=2, axis=1)
        v = plain_norm(b, kv[-1], layer.head_dim, spec.epsilon) if spec.v_norm else kv[-1]
        self._keys_values[i] = self._cached(layer, (k, v))
        return q

    def _projected(self, i: int, layer: LayerSpec, x: str) -> str:
        """Queries and the layer's own keys and values, `[T, n * d]` for n heads in all."""
        linears, name = self._linears, f"model.layers.{i}.self_attn"
        matrices = {part: self._matrix(f"{name}.{part}_proj") for part in layer.projections}
        if not self.spec.qk_norm:  # otherwise the norm's weight has the scale
            matrices["q"] = matrices["q"] * np.float32(self.spec.scale(layer))
        if not self.spec.v_norm:
            values = self._smooth.divide_values(f"{name}.o_proj", matrices["v"], self.spec, layer)
            matrices["v"] = values
        wide = f"{name}.qkv_proj"
        x = self._norm(x, f"model.layers.{i}.input_layernorm", feeds=wide)
        merged = np.concatenate(list(matrices.values()), axis=1)
        activation = self._stream(x, self._tokens)
        return linears.linear(wide, activation, merged, self._smooth.rows(wide))

    def _cached(self, layer: LayerSpec, new: tuple[str, str]) -> tuple[str, str]:
        """Write keys and values `[R, kv, S, d]` into the next cache; returns both, `[.., C, d]`."""
        b, n = self.b, len(self._keys_values)
        shape: list[Dim] = ["R", layer.num_kv_heads, "C", layer.head_dim]
        keys, values = (
            b.output(
                b.op("TensorScatter", past, part, self._starts, axis=2),
                f"present_{kind}_{n}",
                b.data_type,
                shape,
            )
            for kind, past, part in zip(("key", "value"), self._caches[n], new, strict=True)
        )
        return keys, values

    def _embedded(self, name: str, scale: float) -> str:
        """Rows of the table `name` `[V, n]` (which may be the head as well), times `scale`."""
        b, kind = self.b, self._linears.precision.table_type
        table = b.weight(name, self._read(f"{name}.weight"), DTYPES[kind])
        rows = embedding(b, table, self._tokens, kind)
        return b.op("Mul", rows, b.number(scale)) if scale != 1.0 else rows

    def _layer_inputs(self, embedded: str) -> str:
        """Per-layer inputs `[T, layers, n]`."""
        b, spec, linears = self.b, self.spec, self._linears
        size, name = spec.layer_input_size, "model.per_layer_model_projection"
        activation = linears.activation(embedded, self._tokens)
        projected = linears.linear(name, activation, self._matrix(name))
        projected = b.op("Mul", projected, b.number(spec.hidden_size**-0.5))
        rows = self._embedded("model.embed_tokens_per_layer", size**0.5)
        shape = b.constant([0, spec.num_layers, size])
        normed = self._norm(b.op("Reshape", projected, shape), "model.per_layer_projection_norm")
        both = b.op("Add", normed, b.op("Reshape", rows, shape))
        return b.op("Mul", both, b.number(2**-0.5))

    def _layer_input(self, i: int, x: str) -> str:
        """Layer i's per-layer input, gated by the residual stream `x`: `[T, hidden]`."""
        b, linears, name = self.b, self._linears, f"model.layers.{i}"
        gate = linears.linear(
            f"{name}.per_layer_input_gate",
            linears.activation(x, self._tokens),
            self._matrix(f"{name}.per_layer_input_gate"),
        )
        own = b.op("Gather", self._inputs, b.constant(i), axis=1)
        y = linears.linear(
            f"{name}.per_layer_projection",
            linears.activation(
                b.op("Mul", activate(b, gate, self.spec.activation), own), self._tokens
            ),
            self._matrix(f"{name}.per_layer_projection"),
        )
        return self._norm(y, f"{name}.post_per_layer_input_norm")

    def _head(self, x: str, logit_tokens: str) -> None:
        b, spec, linears = self.b, self.spec, self._linears
        normed = self._norm(x, "model.norm", feeds="lm_head")
        activation = self._stream(normed, logit_tokens)
        source = "model.embed_tokens" if spec.tied_head else "lm_head"
        name = source if linears.precision.weight_bits is None else "lm_head"
        table = self._read(f"{source}.weight")
        logits = linears.head(name, activation, table, self._smooth.rows("lm_head"))
        logits = soft_cap(b, logits, spec.logit_cap)
        self._logits = b.output(logits, "logits", FLOAT, ["N", spec.vocab_size])

    def _verify(self, draft_vocab: NDArray[np.int64] | None) -> None:
        b = self.b
        b.function(onnx_body.verify_function())
        if draft_vocab is None:  # no draft logits are read: one token stands in for a vocabulary
            draft_vocab = np.zeros(1, np.int64)
        sizes = {"D": len(draft_vocab)}
        inside = {"logits": self._logits, "draft_vocab": "draft_vocab"}
        b.weight("draft_vocab", draft_vocab.astype(np.int64))
        for name in contract.FED:
            operand = contract.OPERANDS[name]
            shape = [sizes.get(size, size) for size in operand.shape]
            b.input(name, _TYPES[operand.dtype], shape)
        results = b.ops(
            contract.OP_TYPE,
            *(inside.get(name, name) for name in contract.INPUT_NAMES),
            outputs=len(contract.OUTPUTS),
            domain=contract.DOMAIN,
            **dict[str, Any](contract.ATTRIBUTES),
        )
        for result, operand in zip(results, contract.OUTPUTS, strict=True):
            b.output(result, operand.name, _TYPES[operand.dtype], operand.shape)
