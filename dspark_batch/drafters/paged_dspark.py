"""The DSpark draft graph for ONNX Runtime's CUDA provider: `dspark`, written for captured steps.

Keys and values are in pages, at the positions and in the page numbers of the target's. New context
goes in first, then the block behind it, whose slots see each other and all before them. There is
a graph for greedy rows and one for rows that sample. Inputs for R rows, with M tokens of new
context and γ slots (one more where the anchor's own drafts nothing):

    context          float [1, Z, taps * hidden]   the target's ring
    context_rows     int64 [M]        places in it of the new tokens, row after row
    context_cumulative, context_past, pages, context_bounds    see `graph.PagedRows`
    block_tokens     int64 [R, slots]    anchor and mask tokens
    block_cumulative, block_past, block_bounds    past: a row's context with what goes in now
    anchors          int64 [R]
    temperature, top_k, top_p, uniforms    as in `dspark`, if rows sample
    past_key_i, past_value_i  float [P, PAGE, kv, d]

A row may have more context than is new: what lies behind it is overwritten by the block. Outputs:

    draft_tokens     int64 [R, γ]
    confidence       float [R, γ]
    draft_logits     float [R, γ, D]  in the graph for rows that sample, and for checks
    context_key_i, context_value_i, present_key_i, present_value_i    all bound to the caches
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.dspark import DSparkGraph
from dspark_batch.drafters.markov import CANDIDATES, MarkovWalk
from dspark_batch.drafters.shared import DraftHead
from dspark_batch.drafters.spec import CERTAIN, DraftSpec
from dspark_batch.errors import EngineError
from dspark_batch.models.graph import (
    DTYPES,
    FLOAT,
    INT32,
    INT64,
    MASKED,
    MOST_HEAD_SIZE,
    PAGE,
    Activation,
    Dim,
    GraphBuilder,
    Linears,
    PagedHeads,
    PagedRows,
    StoredWeight,
    added_norm,
    embedding,
    gated,
    half_norm,
    half_weight,
    largest,
    paged_attention,
    rope_tables,
    soft_cap,
)


def check_paged_draft(spec: DraftSpec) -> None:
    """Refuse a draft that the kernels here do not take.

    Raises:
        EngineError: heads are too wide, values are normed or the raw keys, or layers are scaled.
    """
    problem = None
    if spec.head_dim > MOST_HEAD_SIZE:
        problem = f"heads of {spec.head_dim} channels; at most {MOST_HEAD_SIZE} have a kernel"
    elif spec.v_norm or spec.keys_as_values or spec.layer_scalar:
        problem = "normed or shared values or scaled layers"
    if problem is not None:
        raise EngineError(
            f"onnxruntime-cuda cannot run this draft: it has {problem}",
            hint="export with --runtime tensorrt or tensorrt-rtx",
        )


class PagedDSparkGraph(DSparkGraph):
    """Builds both draft graphs of one checkpoint."""

    def build(
        self,
        *,
        embed: StoredWeight,
        head: DraftHead,
        draft_vocab: NDArray[np.int64],
        max_tokens: int,
    ) -> None:
        """See `DSparkGraph.build`; there are two graphs, the greedy one in this builder."""
        self._check_sizes(embed, head, draft_vocab)
        b, spec = self.b, self.spec
        width = len(spec.taps) * self._target_hidden
        ring = b.input("context", b.data_type, [1, "Z", width])
        context_rows = b.input("context_rows", INT64, ["M"])
        pages = b.input("pages", INT32, ["R", "W"])
        self._new = PagedRows.declared(b, "context_", pages=pages)
        self._block = PagedRows.declared(b, "block_", pages=pages)
        block_tokens = b.input("block_tokens", INT64, ["R", spec.num_slots])
        block_tokens = b.op("Reshape", block_tokens, b.constant([-1]))
        self._anchors = b.input("anchors", INT64, ["R"])
        tables = spec.rope.tables(max_tokens + 2 * spec.num_slots)
        self._tables = rope_tables(b, "rope", tables)
        self._draft_vocab = b.weight("draft_vocab", draft_vocab.astype(np.int64))
        self._caches = [
            tuple(
                b.input(
                    f"past_{kind}_{i}", b.data_type, ["P", PAGE, spec.num_kv_heads, spec.head_dim]
                )
                for kind in ("key", "value")
            )
            for i in range(spec.num_layers)
        ]
        table = b.share("embed_tokens", embed)
        flat = b.op("Reshape", ring, b.constant([-1, width]))
        new = b.op("Gather", flat, context_rows)
        projected = self._product("fc", new)
        self._new_context = self._half(projected, "hidden_norm")
        x = embedding(b, table, block_tokens, embed.data_type)
        if spec.embedding_scale != 1.0:
            x = b.op("Mul", x, b.number(spec.embedding_scale))
        y = self._half(x, "layers.0.input_layernorm")
        for i in range(spec.num_layers):
            last = i + 1 == spec.num_layers
            y, x = self._paged_layer(i, x, y, "norm" if last else f"layers.{i + 1}.input_layernorm")
        hidden = self._drafting(y)
        stream = self._drafting(x) if head.rows is not None else None
        states = b.op("Reshape", hidden, b.constant([-1, spec.block_size, spec.hidden_size]))
        logits = self._logits(hidden, stream, head)
        sampling = b.fork(f"{b.name}-sampling")
        self._walks(b, states, logits, len(head.table), samples=False)
        self._walks(sampling, states, logits, len(head.table), samples=True)
        self._sampling = sampling

    @property
    def builders(self) -> Sequence[GraphBuilder]:
        """See `DSparkGraph`."""
        return (self.b, self._sampling)

    # the backbone -------------------------------------------------------------------------------

    def _product(self, name: str, x: str) -> str:
        return self._linears.linear(name, Activation(x), self._tensor(f"{name}.weight").T)

    def _half(self, x: str, name: str) -> str:
        return half_norm(self.b, x, name, self._tensor(f"{name}.weight"), self.spec.epsilon)

    def _paged_layer(self, i: int, x: str, y: str, following: str) -> tuple[str, str]:
        b, spec, name = self.b, self.spec, f"layers.{i}"
        attended = self._product(f"{name}.self_attn.o_proj", self._attend(i, y))
        before = "post_attention_layernorm"
        if spec.sandwich_norms:
            attended = self._half(attended, f"{name}.post_attention_layernorm")
            before = "pre_feedforward_layernorm"
        y, x = self._added(x, attended, f"{name}.{before}")
        matrices = [self._tensor(f"{name}.mlp.{p}_proj.weight").T for p in ("gate", "up")]
        merged = self._linears.linear(
            f"{name}.mlp.gate_up_proj", Activation(y), np.concatenate(matrices, axis=1)
        )
        gate, up = b.ops("Split", merged, outputs=2, axis=1, num_outputs=2)
        y = self._product(f"{name}.mlp.down_proj", gated(b, gate, up, spec.activation))
        if spec.sandwich_norms:
            y = self._half(y, f"{name}.post_feedforward_layernorm")
        return self._added(x, y, following)

    def _added(self, x: str, y: str, name: str) -> tuple[str, str]:
        weight = self._tensor(f"{name}.weight")
        return added_norm(self.b, x, y, name, weight, self.spec.epsilon)

    def _attend(self, i: int, y: str) -> str:
        """New context into the caches, then the block behind it, which attends to all."""
        b, spec, name = self.b, self.spec, f"layers.{i}.self_attn"
        kv = [self._tensor(f"{name}.{p}_proj.weight").T for p in "kv"]
        wkv = np.concatenate(kv, axis=1)
        q = self._product(f"{name}.q_proj", y)
        projected = []
        for value in (self._new_context, y):
            both = self._linears.linear(f"{name}.kv_proj", Activation(value), wkv)
            projected.append(b.ops("Split", both, outputs=2, axis=1, num_outputs=2))
        norms = None
        if spec.qk_norm:
            q_norm, k_norm = (
                half_weight(b, f"{name}.{p}_norm", self._tensor(f"{name}.{p}_norm.weight"))
                for p in "qk"
            )
            norms = (q_norm, k_norm)
        heads, scale = spec.num_kv_heads, spec.attention_scale or spec.head_dim**-0.5
        caches = (self._caches[i][0], self._caches[i][1])
        shape: list[Dim] = ["P", PAGE, heads, spec.head_dim]
        # What the context's own queries would find is of no use: its keys stand in for them.
        new_k, new_v = projected[0]
        _, *caches_now = paged_attention(
            b,
            (new_k, new_k, new_v),
            caches,
            self._new,
            self._tables,
            PagedHeads(heads, heads, scale, epsilon=spec.epsilon),
            norms=(norms[1], norms[1]) if norms else None,
        )
        # Outputs, so that they are the bound buffers and not copies of them.
        for kind, value in zip(("key", "value"), caches_now, strict=True):
            b.output(value, f"context_{kind}_{i}", b.data_type, shape)
        k, v = projected[1]
        mixed, *present = paged_attention(
            b,
            (q, k, v),
            (f"context_key_{i}", f"context_value_{i}"),
            self._block,
            self._tables,
            PagedHeads(spec.num_heads, heads, scale, causal=False, epsilon=spec.epsilon),
            norms=norms,
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            b.output(value, f"present_{kind}_{i}", b.data_type, shape)
        return mixed

    def _drafting(self, x: str) -> str:
        """The slots that draft, `[R * γ, hidden]`."""
        b, spec = self.b, self.spec
        if spec.anchor_drafts:
            return x
        rows = b.op("Reshape", x, b.constant([-1, spec.num_slots, spec.hidden_size]))
        end = b.constant([spec.num_slots])
        kept = b.op("Slice", rows, b.constant([1]), end, b.constant([1]))
        return b.op("Reshape", kept, b.constant([-1, spec.hidden_size]))

    def _logits(self, hidden: str, stream: str | None, head: DraftHead) -> str:
        """Base logits `[R, γ, D]` in the type of the graph."""
        b, spec = self.b, self.spec
        if stream is not None:
            assert head.rows is not None
            weight = self._tensor("norm.weight").astype(np.float32) / head.rows
            hidden = half_norm(b, stream, "lm_head.norm", weight, spec.epsilon)
        for name, stored in head.stored.items():
            b.share(name, stored)
        table = b.weight("lm_head", head.table, DTYPES[b.data_type])
        logits = b.op("Gemm", hidden, table, transB=1)
        if spec.logit_cap is not None:
            logits = b.narrow(soft_cap(b, b.wide(logits), spec.logit_cap))
        return b.op("Reshape", logits, b.constant([-1, spec.block_size, len(head.table)]))

    # the walk -----------------------------------------------------------------------------------

    def _walks(
        self, b: GraphBuilder, states: str, logits: str, size: int, *, samples: bool
    ) -> None:
        """The walk and the confidence head, into the graph of `b`."""
        spec, gamma = self.spec, self.spec.block_size
        linears = Linears(b, self._precision)
        slots, hidden = _split(b, logits, gamma), _split(b, states, gamma)
        walk = None
        if spec.markov_rank:
            walk = MarkovWalk(linears, self._tensor, spec.markov_head, self._anchors)
        draw = _Draw(b, size, gamma) if samples else None
        previous = self._anchors
        tokens, rows, features = [], [], []
        for k in range(gamma):
            row = slots[k]
            if walk is not None:
                features.append(walk.embed(previous))
                row = b.op("Add", row, walk.bias(hidden[k], features[k]))
            if draw is not None:
                drawn, row = draw.at(k, b.wide(row))
            else:
                drawn = b.op("Reshape", largest(b, row)[1], b.constant([-1]))
            previous = b.op("Gather", self._draft_vocab, drawn)
            tokens.append(b.op("Unsqueeze", previous, b.constant([1])))
            rows.append(b.op("Unsqueeze", row, b.constant([1])))
        b.output(_joined(b, tokens), "draft_tokens", INT64, ["R", gamma])
        kind = FLOAT if samples else b.data_type
        b.output(_joined(b, rows), "draft_logits", kind, ["R", gamma, size])
        sure = self._confidence(b, states, features)
        b.output(sure, "confidence", FLOAT, ["R", gamma])

    def _confidence(self, b: GraphBuilder, states: str, features: Sequence[str]) -> str:
        """Logits `[R, γ]` of all slots at once; without a head, ones that mean 1."""
        spec, gamma = self.spec, self.spec.block_size
        if not spec.confidence_head:
            sums = b.op("ReduceSum", b.wide(states), b.constant([2]), keepdims=0)
            none = b.op("Mul", sums, b.constant(0.0, np.float32))
            return b.op("Add", none, b.constant(CERTAIN, np.float32))
        x = states
        if spec.confidence_with_markov:
            columns = [b.op("Unsqueeze", feature, b.constant([1])) for feature in features]
            x = b.op("Concat", x, _joined(b, columns), axis=2)
        matrix = self._tensor("confidence_head.proj.weight").astype(np.float32).T
        weight = b.weight("confidence_head.proj", matrix)
        bias = b.constant(self._tensor("confidence_head.proj.bias").astype(np.float32), np.float32)
        logits = b.op("Add", b.op("MatMul", b.wide(x), weight), bias)
        return b.op("Reshape", logits, b.constant([-1, gamma]))


class _Draw:
    """`dspark::Draw` without control flow: a token of one slot, and what it was drawn from."""

    def __init__(self, b: GraphBuilder, size: int, gamma: int) -> None:
        self._b, self._size, self._width = b, size, min(CANDIDATES, size)
        temperature = b.input("temperature", FLOAT, ["R"])
        top_k, top_p = b.input("top_k", INT64, ["R"]), b.input("top_p", FLOAT, ["R"])
        self._uniforms = b.input("uniforms", FLOAT, ["R", gamma])
        axis, zero = b.constant([1]), b.constant(0.0, np.float32)
        self._hot = b.op("Greater", temperature, zero)
        divisor = b.op("Where", self._hot, temperature, b.constant(1.0, np.float32))
        self._divisor = b.op("Unsqueeze", divisor, axis)
        few = b.constant(self._width)
        k_on = b.op("And", b.op("Greater", top_k, b.constant(0)), b.op("LessOrEqual", top_k, few))
        last = b.op("Sub", b.op("Where", k_on, top_k, few), b.constant(1))
        self._k_on, self._k_last = b.op("Unsqueeze", k_on, axis), b.op("Unsqueeze", last, axis)
        self._top_p = b.op("Unsqueeze", top_p, axis)
        self._p_wanted = b.op("Less", self._top_p, b.constant(1.0, np.float32))

    def at(self, k: int, logits: str) -> tuple[str, str]:
        """Ids `[R]` and filtered logits `[R, D]` of slot k, from fp32 logits `[R, D]`."""
        b, zero, axis = self._b, self._b.constant(0.0, np.float32), self._b.constant([1])
        most, best = largest(b, logits)
        cooled = b.op("Div", b.op("Sub", logits, most), self._divisor)
        soft = b.op("Softmax", cooled, axis=1)
        values = b.ops("TopK", soft, b.constant([self._width]), outputs=2, axis=1)[0]
        k_value = b.op("GatherElements", values, self._k_last, axis=1)
        k_floor = b.op("Where", self._k_on, k_value, zero)
        in_k = b.op("Where", b.op("Less", soft, k_floor), zero, soft)
        wanted = b.op("Mul", self._top_p, b.op("ReduceSum", in_k, axis, keepdims=1))
        short = b.op("Less", b.op("CumSum", values, b.constant(1)), wanted)
        count = b.op("ReduceSum", b.op("Cast", short, to=FLOAT), axis, keepdims=1)
        fits = b.op("Less", count, b.constant(float(self._width), np.float32))
        last = b.constant(float(self._width - 1), np.float32)
        place = b.op("Cast", b.op("Min", count, last), to=INT64)
        p_value = b.op("GatherElements", values, place, axis=1)
        p_floor = b.op("Where", b.op("And", self._p_wanted, fits), p_value, zero)
        dropped = b.op("Less", soft, b.op("Max", k_floor, p_floor))
        kept = b.op("Where", dropped, zero, soft)
        cumulative = b.op("CumSum", kept, b.constant(1))
        total = b.op("Slice", cumulative, b.constant([-1]), b.constant([2**62]), axis)
        uniform = b.op("Slice", self._uniforms, b.constant([k]), b.constant([k + 1]), axis)
        below = b.op("Cast", b.op("LessOrEqual", cumulative, b.op("Mul", uniform, total)), to=FLOAT)
        count = b.op("ReduceSum", below, axis, keepdims=0)
        end = b.constant(float(self._size - 1), np.float32)
        drawn = b.op("Cast", b.op("Min", count, end), to=INT64)
        ids = b.op("Where", self._hot, drawn, b.op("Reshape", best, b.constant([-1])))
        return ids, b.op("Where", dropped, b.constant(MASKED, np.float32), logits)


def _split(b: GraphBuilder, x: str, gamma: int) -> list[str]:
    """`[R, γ, n]` -> γ values `[R, n]`."""
    parts = b.ops("Split", x, outputs=gamma, axis=1, num_outputs=gamma) if gamma > 1 else [x]
    return [b.op("Squeeze", part, b.constant([1])) for part in parts]


def _joined(b: GraphBuilder, parts: Sequence[Any]) -> str:
    return b.op("Concat", *parts, axis=1) if len(parts) > 1 else str(parts[0])
