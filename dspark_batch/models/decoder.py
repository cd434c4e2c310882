"""The target graph: a decoder with a KV cache, taps for the draft, and verification inside.

Inputs, for R rows with T tokens in all, S the most tokens of one row, C the cache's capacity:

    tokens        int64 [T]       flattened tokens of the call, row after row
    starts        int64 [R]       tokens of each row that the cache already holds
    token_index   int64 [R, S]    flattened token of each cell; padding points to any token
    cell_index    int64 [T]       cell (row * S + s) of each flattened token
    logit_tokens  int64 [N]       flattened tokens whose logits are computed
    past_key_i, past_value_i      float [R, kv, C, d]: bind to the same buffers as present_*

and those of `plugin.onnx_body` (N rows of logits). A cell of padding writes keys beyond its row's
length, where they are masked and later overwritten, so C >= max(starts) + S must hold. Outputs:

    num_accepted, bonus  int64 [R]
    context              float [T, taps * hidden]   residual stream after the tapped layers
    logits               float [N, V]               for measurements; a run never fetches it
    present_key_i, present_value_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.blocks import (
    MASKED,
    Linears,
    activate,
    embedding,
    fold_queries,
    folded_scores,
    rms_norm,
    rotate,
    rows_from_tokens,
    tokens_from_rows,
    unfold_queries,
)
from dspark_batch.models.graph import FLOAT, FLOAT16, INT64, Dim, GraphBuilder
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.spec import DecoderSpec, LayerSpec
from dspark_batch.plugin import onnx_body

Tensor = Callable[[str], NDArray[Any]]


class DecoderGraph:
    """Builds the graph of one target. `tensor(name)` gives a weight by Hugging Face name."""

    def __init__(
        self,
        builder: GraphBuilder,
        spec: DecoderSpec,
        tensor: Tensor,
        *,
        precision: str,
        smoothing: Smoothing | None = None,
    ) -> None:
        self.b = builder
        self._smooth = smoothing or Smoothing()
        self.spec = spec
        self._tensor = tensor
        self._linears = Linears(builder, precision)
        self._masks: dict[int | None, str] = {}
        self._ropes: dict[object, tuple[str, str]] = {}

    def build(
        self, *, taps: Sequence[int], draft_vocab: NDArray[np.int64] | None, max_tokens: int
    ) -> None:
        """Emit every node. `taps` are layer indices, -1 the embedding (DeepSpec convention).

        Without a `draft_vocab` it is an input of every call: the proposed tokens are enough.
        """
        b, spec = self.b, self.spec
        tokens = self._tokens = b.input("tokens", INT64, ["T"])
        self._starts = b.input("starts", INT64, ["R"])
        self._token_index = b.input("token_index", INT64, ["R", "S"])
        self._cell_index = b.input("cell_index", INT64, ["T"])
        logit_tokens = b.input("logit_tokens", INT64, ["N"])
        self._max_tokens = max_tokens
        self._caches = [
            tuple(
                b.input(f"past_{kind}_{i}", FLOAT, ["R", spec.num_kv_heads, "C", spec.head_dim])
                for kind in ("key", "value")
            )
            for i in range(spec.num_layers)
        ]
        self._index_positions()
        table = self._embedding_table()
        x = embedding(b, table, tokens, self._embedding_type)
        if spec.embedding_scale != 1.0:
            x = b.op("Mul", x, b.constant(np.float32(spec.embedding_scale), np.float32))
        streams = {-1: x}
        for i, layer in enumerate(spec.layers):
            x = self._layer(i, layer, x)
            streams[i] = x
        self._head(b.op("Gather", x, logit_tokens), logit_tokens, table)
        context = [streams[i] for i in taps]
        joined = b.op("Concat", *context, axis=1) if len(context) > 1 else context[0]
        b.output(joined, "context", FLOAT, ["T", len(taps) * spec.hidden_size])
        self._verify(draft_vocab)

    def _index_positions(self) -> None:
        b = self.b
        zero, one = b.constant(0), b.constant(1)
        num_cells = b.op("Squeeze", b.op("Shape", self._token_index, start=1, end=2))
        offsets = b.op("Unsqueeze", b.op("Range", zero, num_cells, one), b.constant([0]))
        starts = b.op("Unsqueeze", self._starts, b.constant([1]))
        self._cell_positions = b.op("Add", starts, offsets)  # [R, S]
        # A cell of padding may lie beyond the tables.
        last = b.constant(self._max_tokens - 1)
        self._rope_positions = b.op("Min", self._cell_positions, last)
        capacity = b.op("Squeeze", b.op("Shape", self._caches[0][0], start=2, end=3))
        keys = b.op("Range", zero, capacity, one)
        self._key_positions = b.op("Unsqueeze", keys, b.constant([0, 1]))  # [1, 1, C]

    def _mask(self, window: int | None) -> str:
        """Additive mask `[R, 1, G * S, C]`: causal, and inside the window of a sliding layer."""
        if window not in self._masks:
            b = self.b
            queries = b.op("Unsqueeze", self._cell_positions, b.constant([2]))
            seen = b.op("LessOrEqual", self._key_positions, queries)
            if window is not None:
                oldest = b.op("Sub", queries, b.constant(window - 1))
                inside = b.op("GreaterOrEqual", self._key_positions, oldest)
                seen = b.op("And", seen, inside)
            added = b.op("Where", seen, b.constant(0.0, np.float32), b.constant(MASKED, np.float32))
            group = b.op("Concat", *[added] * self.spec.group, axis=1)
            self._masks[window] = b.op("Unsqueeze", group, b.constant([1]))
        return self._masks[window]

    def _rope(self, layer: LayerSpec) -> tuple[str, str]:
        if layer.rope not in self._ropes:
            cos, sin = layer.rope.tables(self._max_tokens)
            n = len(self._ropes)
            self._ropes[layer.rope] = (
                self.b.weight(f"rope.{n}.cos", cos),
                self.b.weight(f"rope.{n}.sin", sin),
            )
        return self._ropes[layer.rope]

    def _norm(self, x: str, name: str, *, factor: float = 1.0, feeds: str | None = None) -> str:
        """RMSNorm, times a constant; `feeds` is the smoothed layer that takes the result."""
        weight = self._tensor(f"{name}.weight").astype(np.float32) + self.spec.norm_offset
        if feeds is not None:
            weight = self._smooth.divide(feeds, weight)
        return rms_norm(self.b, x, name, weight * np.float32(factor), self.spec.epsilon)

    def _matrix(self, name: str) -> NDArray[Any]:
        return self._tensor(f"{name}.weight").T

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
        return b.op("Add", x, y)

    def _mlp(self, name: str, x: str) -> str:
        b, linears = self.b, self._linears
        wide, narrow = f"{name}.gate_up_proj", f"{name}.down_proj"
        columns = self._smooth.divide(narrow, self._matrix(f"{name}.up_proj"))
        both = np.concatenate([self._matrix(f"{name}.gate_proj"), columns], axis=1)
        both = self._smooth.multiply_rows(wide, both)
        merged = linears.linear(wide, linears.activation(x, self._tokens), both)
        gate, up = b.ops("Split", merged, outputs=2, axis=1, num_outputs=2)
        product = b.op("Mul", activate(b, gate, self.spec.activation), up)
        matrix = self._smooth.multiply_rows(narrow, self._matrix(narrow))
        return linears.linear(narrow, linears.activation(product, self._tokens), matrix)

    def _attention(self, i: int, layer: LayerSpec, x: str) -> str:
        b, spec, linears = self.b, self.spec, self._linears
        name = f"model.layers.{i}.self_attn"
        wq, wk, wv = (self._matrix(f"{name}.{p}_proj") for p in "qkv")
        if not spec.qk_norm:  # else the norm's weight carries the scale
            wq = wq * np.float32(spec.scale)
        wv = self._smooth.divide_values(f"{name}.o_proj", wv, spec)
        x = self._norm(x, f"model.layers.{i}.input_layernorm", feeds=f"{name}.qkv_proj")
        merged = self._smooth.multiply_rows(
            f"{name}.qkv_proj", np.concatenate([wq, wk, wv], axis=1)
        )
        qkv = linears.linear(f"{name}.qkv_proj", linears.activation(x, self._tokens), merged)
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        rows = rows_from_tokens(
            b, qkv, self._token_index, num_heads=heads + 2 * kv_heads, head_dim=spec.head_dim
        )
        if spec.qk_norm:
            q, k, v = b.ops(
                "Split", rows, b.constant([heads, kv_heads, kv_heads]), outputs=3, axis=1
            )
            q = self._norm(q, f"{name}.q_norm", factor=spec.scale)
            qk = b.op("Concat", q, self._norm(k, f"{name}.k_norm"), axis=1)
        else:
            qk, v = b.ops(
                "Split", rows, b.constant([heads + kv_heads, kv_heads]), outputs=2, axis=1
            )
        qk = rotate(b, qk, self._rope(layer), self._rope_positions)
        q, k = b.ops("Split", qk, b.constant([heads, kv_heads]), outputs=2, axis=1)
        keys, values = (
            b.op("TensorScatter", past, new, self._starts, axis=2)
            for past, new in zip(self._caches[i], (k, v), strict=True)
        )
        cache_shape: list[Dim] = ["R", spec.num_kv_heads, "C", spec.head_dim]
        keys = b.output(keys, f"present_key_{i}", FLOAT, cache_shape)
        values = b.output(values, f"present_value_{i}", FLOAT, cache_shape)
        q = fold_queries(b, q, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
        scores = b.op("Add", folded_scores(b, q, keys), self._mask(layer.window))
        mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), values)
        mixed = unfold_queries(b, mixed, num_heads=spec.num_heads, head_dim=spec.head_dim)
        flat = tokens_from_rows(b, mixed, self._cell_index, width=heads * spec.head_dim)
        matrix = self._smooth.multiply_rows(f"{name}.o_proj", self._matrix(f"{name}.o_proj"))
        return linears.linear(f"{name}.o_proj", linears.activation(flat, self._tokens), matrix)

    @property
    def _embedding_type(self) -> int:
        return FLOAT if self._linears.precision == "fp32" else FLOAT16

    def _embedding_table(self) -> str:
        """`[V, hidden]`: fp32 serves a tied head too; beside an int8 head, fp16 is enough."""
        table = self._tensor("model.embed_tokens.weight")
        dtype = np.float32 if self._embedding_type == FLOAT else np.float16
        return self.b.weight("model.embed_tokens", table.astype(dtype))

    def _head(self, x: str, logit_tokens: str, table: str) -> None:
        b, spec, linears = self.b, self.spec, self._linears
        x = self._norm(x, "model.norm", feeds="lm_head")
        if linears.precision == "fp32":
            name = "lm_head"
            if not spec.tied_head:
                table = b.weight(name, self._tensor("lm_head.weight").astype(np.float32))
            self._logits = b.op("Gemm", x, table, transB=1)
        else:
            source = "model.embed_tokens" if spec.tied_head else "lm_head"
            matrix = self._smooth.multiply_rows("lm_head", self._matrix(source))
            self._logits = linears.linear("lm_head", linears.activation(x, logit_tokens), matrix)
        self._logits = b.output(self._logits, "logits", FLOAT, ["N", spec.vocab_size])

    def _verify(self, draft_vocab: NDArray[np.int64] | None) -> None:
        b = self.b
        b.function(onnx_body.verify_function())
        size: Dim = "D" if draft_vocab is None else len(draft_vocab)
        inputs = [
            self._logits,
            b.input("logit_rows", INT64, ["R", "K1"]),
            b.input("draft_tokens", INT64, ["R", "K"]),
            b.input("lengths", INT64, ["R"]),
            b.input("draft_logits", FLOAT, ["R", "G", size]),
            b.input("draft_vocab", INT64, ["D"])
            if draft_vocab is None
            else b.weight("draft_vocab", draft_vocab.astype(np.int64)),
            b.input("temperature", FLOAT, ["R"]),
            b.input("top_k", INT64, ["R"]),
            b.input("top_p", FLOAT, ["R"]),
            b.input("uniforms", FLOAT, ["R", "G1"]),
        ]
        num_accepted, bonus = b.ops(
            onnx_body.OP_TYPE,
            *inputs,
            outputs=2,
            domain=onnx_body.DOMAIN,
            plugin_namespace=onnx_body.DOMAIN,
            plugin_version=onnx_body.PLUGIN_VERSION,
        )
        b.output(num_accepted, "num_accepted", INT64, ["R"])
        b.output(bonus, "bonus", INT64, ["R"])
