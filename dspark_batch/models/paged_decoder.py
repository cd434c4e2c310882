"""The target graph for ONNX Runtime's CUDA provider: the same decoder, for captured steps.

`decoder` says what a target computes; here it has one kernel for a layer's attention, one for a sum
and the norm after it, and neither control flow nor shapes. Inputs for R rows with T tokens in all,
of which N get logits:

    tokens         int64 [T]
    logit_tokens   int64 [N]           indices into `tokens`
    cumulative, past, pages, bounds    see `graph.PagedRows`
    context_start  int64 [1]           where in the ring the T tokens' context goes
    past_ring      float [1, Z, taps * hidden]   context of recent tokens, for the draft
    past_key_i, past_value_i  float [P, PAGE, kv, d]

Outputs:

    logits         float [N, V]        for checks; a run does not fetch it
    context        float [T, taps * hidden]      the same
    present_ring, present_key_i, present_value_i

and those of a verification (`device_body`), of which there is a graph for each number of
tokens per row, greedy and sampling. Past and present must be bound to the same buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.models.decoder import DecoderGraph, stream_name
from dspark_batch.models.graph import (
    DTYPES,
    INT64,
    MOST_HEAD_SIZE,
    PAGE,
    Activation,
    Dim,
    PagedHeads,
    PagedRows,
    added_norm,
    gated,
    half_norm,
    half_weight,
    paged_attention,
    soft_cap,
)
from dspark_batch.models.spec import DecoderSpec, LayerSpec


def check_paged(spec: DecoderSpec) -> None:
    """Refuse a decoder that the kernels here do not take.

    Raises:
        EngineError: a layer's heads are too wide, it shares keys, norms values or is scaled.
    """
    problem = None
    widest = max(layer.head_dim for layer in spec.layers)
    if widest > MOST_HEAD_SIZE:
        problem = f"heads of {widest} channels; at most {MOST_HEAD_SIZE} have a kernel"
    elif spec.v_norm or any(layer.projections != "qkv" for layer in spec.layers):
        problem = "layers that share keys and values or norm values, which no kernel here does"
    elif spec.layer_scalar or spec.layer_input_size:
        problem = "scaled layers or inputs by layer, which its graph does not have"
    if problem is not None:
        raise EngineError(
            f"onnxruntime-cuda cannot run {spec.family}: it has {problem}",
            hint="export with --runtime tensorrt or tensorrt-rtx",
        )


class PagedDecoderGraph(DecoderGraph):
    """Builds the trunk of one target: all but the verification."""

    def build(
        self, *, taps: Sequence[int], draft_vocab: NDArray[np.int64] | None, max_tokens: int
    ) -> None:
        """See `DecoderGraph.build`; `draft_vocab` becomes a weight for the verification."""
        b, spec = self.b, self.spec
        self._max_tokens = max_tokens
        self._tokens = b.input("tokens", INT64, ["T"])
        logit_tokens = b.input("logit_tokens", INT64, ["N"])
        self._rows = PagedRows.declared(b)
        vocab = np.zeros(1, np.int64) if draft_vocab is None else draft_vocab.astype(np.int64)
        b.weight("draft_vocab", vocab)
        self._caches = [
            tuple(
                b.input(f"past_{kind}_{n}", b.data_type, ["P", PAGE, num_kv_heads, head_dim])
                for kind in ("key", "value")
            )
            for n, (num_kv_heads, head_dim) in enumerate(spec.cache_shapes)
        ]
        x = b.rename(self._embedded("model.embed_tokens", spec.embedding_scale), stream_name(-1))
        streams = {-1: x}
        first = "model.layers.0.input_layernorm"
        y = half_norm(b, x, first, self._norm_weight(first), spec.epsilon)
        for i, layer in enumerate(spec.layers):
            following = f"model.layers.{i + 1}.input_layernorm"
            last = i + 1 == spec.num_layers
            y, x = self._paged_layer(i, layer, x, y, "model.norm" if last else following)
            streams[i] = b.rename(x, stream_name(i))
            x = streams[i]
        wanted = b.op("Gather", y, logit_tokens)
        source = "model.embed_tokens" if spec.tied_head else "lm_head"
        table = b.weight(source, self._read(f"{source}.weight"), self._dtype)
        logits = b.op("Gemm", wanted, table, transB=1)
        if spec.logit_cap is not None:
            logits = b.narrow(soft_cap(b, b.wide(logits), spec.logit_cap))
        b.output(logits, "logits", b.data_type, ["N", spec.vocab_size])
        self._keep_context([streams[i] for i in taps], len(taps) * spec.hidden_size)

    @property
    def _dtype(self) -> Any:
        return DTYPES[self.b.data_type]

    def _keep_context(self, streams: Sequence[str], width: int) -> None:
        """Write the taps of all tokens side by side into the ring."""
        b = self.b
        context = b.op("Concat", *streams, axis=1) if len(streams) > 1 else streams[0]
        context = b.op("Reshape", context, b.constant([1, -1, width]))
        start = b.input("context_start", INT64, [1])
        ring = b.input("past_ring", b.data_type, [1, "Z", width])
        kept = b.op("TensorScatter", ring, context, start, axis=1)
        b.output(kept, "present_ring", b.data_type, [1, "Z", width])
        b.output(context, "context", b.data_type, [1, "T", width])

    def _norm_weight(self, name: str) -> NDArray[np.float32]:
        weight: NDArray[np.float32] = self._read(f"{name}.weight").astype(np.float32)
        return weight + np.float32(self.spec.norm_offset)

    def _half_norm(self, x: str, name: str) -> str:
        return half_norm(self.b, x, name, self._norm_weight(name), self.spec.epsilon)

    def _added(self, x: str, y: str, name: str) -> tuple[str, str]:
        return added_norm(self.b, x, y, name, self._norm_weight(name), self.spec.epsilon)

    def _paged_layer(
        self, i: int, layer: LayerSpec, x: str, y: str, following: str
    ) -> tuple[str, str]:
        """Of the stream `x` and `y`, its norm: the next norm, named `following`, and stream."""
        spec, name = self.spec, f"model.layers.{i}"
        attended = self._paged(i, layer, y)
        before = "post_attention_layernorm"
        if spec.sandwich_norms:
            attended = self._half_norm(attended, f"{name}.post_attention_layernorm")
            before = "pre_feedforward_layernorm"
        y, x = self._added(x, attended, f"{name}.{before}")
        y = self._gated(f"{name}.mlp", y)
        if spec.sandwich_norms:
            y = self._half_norm(y, f"{name}.post_feedforward_layernorm")
        return self._added(x, y, following)

    def _paged(self, i: int, layer: LayerSpec, y: str) -> str:
        b, spec = self.b, self.spec
        name = f"model.layers.{i}.self_attn"
        merged = np.concatenate([self._matrix(f"{name}.{p}_proj") for p in "qkv"], axis=1)
        qkv = self._linears.linear(f"{name}.qkv_proj", Activation(y), merged)
        norms = None
        if spec.qk_norm:
            q_norm, k_norm = (
                half_weight(b, f"{name}.{p}_norm", self._norm_weight(f"{name}.{p}_norm"))
                for p in "qk"
            )
            norms = (q_norm, k_norm)
        heads = PagedHeads(
            spec.num_heads,
            layer.num_kv_heads,
            spec.scale(layer),
            window=layer.window,
            epsilon=spec.epsilon,
        )
        past = self._caches[i]
        mixed, keys, values = paged_attention(
            b, (qkv, "", ""), (past[0], past[1]), self._rows, self._rope(layer), heads, norms=norms
        )
        shape: list[Dim] = ["P", PAGE, layer.num_kv_heads, layer.head_dim]
        b.output(keys, f"present_key_{i}", b.data_type, shape)
        b.output(values, f"present_value_{i}", b.data_type, shape)
        out = f"{name}.o_proj"
        return self._linears.linear(out, Activation(mixed), self._matrix(out))

    def _gated(self, name: str, y: str) -> str:
        b, linears = self.b, self._linears
        both = [self._matrix(f"{name}.{part}_proj") for part in ("gate", "up")]
        merged = linears.linear(f"{name}.gate_up_proj", Activation(y), np.concatenate(both, axis=1))
        gate, up = b.ops("Split", merged, outputs=2, axis=1, num_outputs=2)
        product = gated(b, gate, up, self.spec.activation)
        return linears.linear(
            f"{name}.down_proj", Activation(product), self._matrix(f"{name}.down_proj")
        )
