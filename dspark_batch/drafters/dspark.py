"""The DSpark draft graph: parallel backbone, Markov walk unrolled γ times, confidence head.

For CPUs there is a second graph of a narrower block, over the same weights: with many rows a pass
costs by its slots, and few of them are verified.

`layouts` says which checkpoints it is built from; rank 0 is DFlash. Inputs for R rows, with M
tokens in the target's last passes, N of them committed and new to the draft, P the most new tokens
of one row, C the draft cache's capacity:

    context           float [M, taps * hidden]  the target's `context` output(s)
    context_tokens    int64 [N]      rows of `context` to take in
    context_index     int64 [R, P]   which of the N fills each cell; padding: any
    context_starts    int64 [R]      positions that the draft cache already holds
    anchors           int64 [R]      anchor token
    anchor_positions  int64 [R]      = context_starts + new tokens of the row
    temperature       float [R]      0: argmax
    top_k, top_p      int64, float [R]  filters of the drawn distribution; 0 and 1 filter nothing
    uniforms          float [R, γ]   one per drafted token
    past_key_i, past_value_i  float [R, kv, C, d]

C >= max(context_starts) + P must hold, with native attention + the block's slots: there the block
goes into the cache too, behind the context, and the next call overwrites it. Only committed
positions count, so the cache never needs to roll back. Outputs:

    draft_tokens      int64 [R, γ]     in the target's vocabulary
    draft_logits      float [R, γ, D]  corrected by the Markov head, filtered: what the tokens were
                                       drawn from
    confidence        float [R, γ]     logits, to be calibrated
    present_key_i, present_value_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.cells import RoundCells, RowInputs
from dspark_batch.drafters.markov import MarkovWalk, draw_function
from dspark_batch.drafters.shared import DraftHead
from dspark_batch.drafters.spec import CERTAIN, DraftSpec
from dspark_batch.errors import EngineError
from dspark_batch.models.graph import (
    DOWN_MIX,
    FLOAT,
    INT64,
    PRECISIONS,
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
    rows_from_tokens,
    soft_cap,
    unfold_queries,
)
from dspark_batch.models.weights import ReadTensor

NARROW_BLOCK = 3  # tokens


def narrow_spec(spec: DraftSpec, precision: str) -> DraftSpec | None:
    """The same draft with the block of the second graph; None where there is no such graph."""
    if PRECISIONS[precision].native_attention or spec.block_size <= NARROW_BLOCK:
        return None
    return replace(spec, block_size=NARROW_BLOCK)


class DSparkGraph:
    """Builds the graphs of a draft; `tensor(name)` gives a checkpoint weight."""

    def __init__(
        self, builder: GraphBuilder, spec: DraftSpec, tensor: ReadTensor, *, precision: str
    ) -> None:
        self.b = builder
        self.spec = spec
        self._tensor = tensor
        self._precision = precision
        self._linears = Linears(builder, precision)
        narrow = narrow_spec(spec, precision)
        self._narrow: DSparkGraph | None = None
        if narrow is not None:
            sibling = builder.sibling(f"{builder.name}-narrow")
            self._narrow = DSparkGraph(sibling, narrow, tensor, precision=precision)

    def build(
        self,
        *,
        embed: StoredWeight,
        head: DraftHead,
        draft_vocab: NDArray[np.int64],
        max_tokens: int,
    ) -> None:
        """Emit every node; `embed` is the `[V, hidden]` table, the target's or the draft's own.

        Raises:
            EngineError: a table does not have the rows that the config promises.
        """
        b, spec = self.b, self.spec
        self._check_sizes(embed, head, draft_vocab)
        context = b.input("context", b.data_type, ["M", len(spec.taps) * self._target_hidden])
        context_tokens = b.input("context_tokens", INT64, ["N"])
        context_index = b.input("context_index", INT64, ["R", "P"])
        self._context_starts = b.input("context_starts", INT64, ["R"])
        anchors = b.input("anchors", INT64, ["R"])
        anchor_positions = b.input("anchor_positions", INT64, ["R"])
        self._filters = (
            b.input("temperature", FLOAT, ["R"]),
            b.input("top_k", INT64, ["R"]),
            b.input("top_p", FLOAT, ["R"]),
        )
        self._uniforms = b.input("uniforms", FLOAT, ["R", spec.block_size])
        num_positions = max_tokens + spec.num_slots
        self._tables = rope_tables(b, "rope", spec.rope.tables(num_positions))
        self._draft_vocab = b.weight("draft_vocab", draft_vocab.astype(np.int64))
        self._caches = [
            tuple(
                b.input(
                    f"past_{kind}_{i}", b.data_type, ["R", spec.num_kv_heads, "C", spec.head_dim]
                )
                for kind in ("key", "value")
            )
            for i in range(spec.num_layers)
        ]
        b.function(draw_function())
        table = b.share("embed_tokens", embed)
        new = b.op("Gather", context, context_tokens)
        projected = self._linear("fc", new, context_tokens, mix=STREAM_MIX)
        self._context = self._stream(self._norm(projected, "hidden_norm"), context_tokens)
        inputs = RowInputs(context_tokens, context_index, self._context_starts, anchor_positions)
        self._cells = RoundCells(
            b,
            inputs,
            num_slots=spec.num_slots,
            cache=self._caches[0][0],
            num_positions=num_positions,
            behind=self._linears.precision.native_attention,
        )
        x = self._embed_block(table, embed.data_type, anchors)
        for i in range(spec.num_layers):
            x = self._layer(i, x)
        self._head(self._drafting_slots(x), head, anchors)
        if self._narrow is not None:
            self._narrow.build(
                embed=embed, head=head, draft_vocab=draft_vocab, max_tokens=max_tokens
            )

    @property
    def builders(self) -> Sequence[GraphBuilder]:
        """Of the graphs, to be saved."""
        return (self.b, *(self._narrow.builders if self._narrow is not None else ()))

    def _check_sizes(
        self, embed: StoredWeight, head: DraftHead, draft_vocab: NDArray[np.int64]
    ) -> None:
        if embed.shape[0] != self.spec.vocab_size:
            raise EngineError(
                f"draft config: vocab_size {self.spec.vocab_size}, but the embedding has "
                f"{embed.shape[0]} tokens"
            )
        if len(head.table) != len(draft_vocab):
            raise EngineError(
                f"the draft's lm_head.weight has {len(head.table)} rows for a draft vocabulary of "
                f"{len(draft_vocab)}"
            )

    @property
    def _target_hidden(self) -> int:
        width = self._tensor("fc.weight").shape[1]
        return int(width // len(self.spec.taps))

    def _norm(self, x: str, name: str) -> str:
        return rms_norm(self.b, x, name, self._tensor(f"{name}.weight"), self.spec.epsilon)

    def _linear(self, name: str, x: str, like: str, *, mix: int = 1) -> str:
        matrix = self._tensor(f"{name}.weight").T
        activation = self._linears.activation(x, like, size=len(matrix), mix=mix)
        return self._linears.linear(name, activation, matrix)

    def _stream(self, x: str, like: str) -> Activation:
        """An input `[n, hidden]` of linear layers."""
        return self._linears.activation(x, like, size=self.spec.hidden_size, mix=STREAM_MIX)

    def _embed_block(self, table: str, data_type: int, anchors: str) -> str:
        b, spec = self.b, self.spec
        column = b.op("Unsqueeze", anchors, b.constant([1]))
        num_rows = b.op("Shape", anchors)
        shape = b.op("Concat", num_rows, b.constant([spec.num_slots - 1]), axis=0)
        masks = b.op("Expand", b.constant(spec.mask_token_id), shape)
        ids = b.op("Concat", column, masks, axis=1)
        x = embedding(b, table, b.op("Reshape", ids, b.constant([-1])), data_type)
        scale = spec.embedding_scale
        return b.op("Mul", x, b.number(scale)) if scale != 1.0 else x

    def _layer(self, i: int, x: str) -> str:
        b, spec, linears, name = self.b, self.spec, self._linears, f"layers.{i}"
        y = self._attention(i, self._norm(x, f"{name}.input_layernorm"))
        if spec.sandwich_norms:
            y = self._norm(y, f"{name}.post_attention_layernorm")
        x = b.op("Add", x, y)
        before = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
        normed = self._stream(self._norm(x, f"{name}.{before}"), self._cells.flat)
        matrices = [self._tensor(f"{name}.mlp.{p}_proj.weight").T for p in ("gate", "up")]
        merged = linears.linear(
            f"{name}.mlp.gate_up_proj", normed, np.concatenate(matrices, axis=1)
        )
        gate, up = b.ops("Split", merged, outputs=2, axis=1, num_outputs=2)
        product = b.op("Mul", activate(b, gate, spec.activation), up)
        y = self._linear(f"{name}.mlp.down_proj", product, self._cells.flat, mix=DOWN_MIX)
        if spec.sandwich_norms:
            y = self._norm(y, f"{name}.post_feedforward_layernorm")
        x = b.op("Add", x, y)
        if spec.layer_scalar:
            scalar = self._tensor(f"{name}.layer_scalar").astype(np.float32)
            x = b.op("Mul", x, b.number(scalar))
        return x

    def _keys_values(self, i: int, kv: str, positions: str, token_index: str) -> tuple[str, str]:
        """Projected `[n, kv * d]` (twice that with values of their own) -> rotated keys and values,
        each `[R, kv, S, d]`."""
        b, spec, heads = self.b, self.spec, self.spec.num_kv_heads
        num_heads = heads if spec.keys_as_values else 2 * heads
        rows = rows_from_tokens(b, kv, token_index, num_heads=num_heads, head_dim=spec.head_dim)
        k, v = (
            (rows, rows)
            if spec.keys_as_values
            else b.ops("Split", rows, outputs=2, axis=1, num_outputs=2)
        )
        if spec.v_norm:
            v = plain_norm(b, v, spec.head_dim, spec.epsilon)
        k = self._head_norm(k, f"layers.{i}.self_attn.k_norm")
        return rotate(b, k, self._tables, positions), v

    def _attention(self, i: int, x: str) -> str:
        b, spec, linears = self.b, self.spec, self._linears
        name = f"layers.{i}.self_attn"
        width = spec.num_heads * spec.head_dim
        parts = "qk" if spec.keys_as_values else "qkv"
        wq, *others = (self._tensor(f"{name}.{part}_proj.weight").T for part in parts)
        wkv = np.concatenate(others, axis=1)
        normed = self._stream(x, self._cells.flat)
        q = linears.linear(f"{name}.q_proj", normed, wq)
        attend = self._over_joined if linears.precision.native_attention else self._over_both
        mixed = attend(i, q, normed, wkv)
        flat = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant([-1, width]))
        return self._linear(f"{name}.o_proj", flat, self._cells.flat)

    def _over_joined(self, i: int, q: str, normed: Activation, wkv: NDArray[Any]) -> str:
        """Context and block go into the cache together, so that one node attends to all."""
        b, name = self.b, f"layers.{i}.self_attn"
        joined = b.op("Concat", self._context.value, normed.value, axis=0)
        kv = self._linears.linear(f"{name}.kv_proj", Activation(joined), wkv)
        cells = self._cells
        cache = self._cached(i, self._keys_values(i, kv, cells.new_positions, cells.new_index))
        return attention(b, self._rotated(i, q), *cache, cells.mask)

    def _over_both(self, i: int, q: str, normed: Activation, wkv: NDArray[Any]) -> str:
        """Two products and one softmax over both, instead of one over joined keys: no copy."""
        b, spec, cells, name = self.b, self.spec, self._cells, f"layers.{i}.self_attn"
        block = self._keys_values(
            i,
            self._linears.linear(f"{name}.kv_proj", normed, wkv),
            cells.positions,
            cells.index,
        )
        new = self._linears.linear(f"{name}.kv_proj", self._context, wkv)
        cache = self._cached(i, self._keys_values(i, new, cells.new_positions, cells.new_index))
        q = self._rotated(i, q)
        q = fold_queries(b, q, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
        from_cache = b.op("Add", folded_scores(b, q, cache[0], head_dim=spec.head_dim), cells.mask)
        from_block = folded_scores(b, q, block[0], head_dim=spec.head_dim)
        probs = b.op("Softmax", b.op("Concat", from_cache, from_block, axis=3), axis=-1)
        capacity = b.op("Shape", cache[0], start=2, end=3)
        sizes = b.op("Concat", capacity, b.constant([spec.num_slots]), axis=0)
        cache_probs, block_probs = b.ops("Split", probs, sizes, outputs=2, axis=3)
        mixed = b.op(
            "Add", b.op("MatMul", cache_probs, cache[1]), b.op("MatMul", block_probs, block[1])
        )
        return unfold_queries(b, mixed, num_heads=spec.num_heads, head_dim=spec.head_dim)

    def _cached(self, i: int, new: tuple[str, str]) -> tuple[str, str]:
        """Keys and values `[R, kv, n, d]` written into the next cache, `[R, kv, C, d]` each."""
        b, spec = self.b, self.spec
        shape: list[Dim] = ["R", spec.num_kv_heads, "C", spec.head_dim]
        keys, values = (
            b.output(
                b.op("TensorScatter", past, rows, self._context_starts, axis=2),
                f"present_{kind}_{i}",
                b.data_type,
                shape,
            )
            for kind, past, rows in zip(("key", "value"), self._caches[i], new, strict=True)
        )
        return keys, values

    def _rotated(self, i: int, q: str) -> str:
        """Projected queries `[R * slots, heads * d]` -> rotated, scaled: `[R, heads, slots, d]`."""
        b, spec = self.b, self.spec
        q = rows_from_tokens(
            b, q, self._cells.index, num_heads=spec.num_heads, head_dim=spec.head_dim
        )
        q = self._head_norm(q, f"layers.{i}.self_attn.q_norm")
        q = rotate(b, q, self._tables, self._cells.positions)
        scale = spec.attention_scale or spec.head_dim**-0.5
        return b.op("Mul", q, b.number(scale)) if scale != 1.0 else q

    def _head_norm(self, x: str, name: str) -> str:
        """RMSNorm over each head of `[R, heads, S, d]`; absent in a Llama-style draft."""
        return self._norm(x, name) if self.spec.qk_norm else x

    def _drafting_slots(self, x: str) -> str:
        """The slots that draft, `[R * γ, hidden]`: all of them, or those after the anchor's."""
        b, spec = self.b, self.spec
        if spec.anchor_drafts:
            self._drafting_cells = self._cells.flat
            return x
        self._drafting_cells = self._cells.numbered(spec.block_size)
        rows = b.op("Reshape", x, b.constant([-1, spec.num_slots, spec.hidden_size]))
        end = b.constant([spec.num_slots])
        kept = b.op("Slice", rows, b.constant([1]), end, b.constant([1]))
        return b.op("Reshape", kept, b.constant([-1, spec.hidden_size]))

    def _base_logits(self, x: str, hidden: str, head: DraftHead) -> str:
        """`[R * γ, D]` from the last layer's output, before and after the norm."""
        b, spec, linears = self.b, self.spec, self._linears
        if head.rows is not None:
            weight = self._tensor("norm.weight").astype(np.float32) / head.rows
            hidden = rms_norm(b, x, "lm_head.norm", weight, spec.epsilon)
        for name, stored in head.stored.items():
            b.share(name, stored)
        activation = self._stream(hidden, self._drafting_cells)
        return soft_cap(b, linears.head("lm_head", activation, head.table), spec.logit_cap)

    def _head(self, x: str, head: DraftHead, anchors: str) -> None:
        """Base logits of every slot, then the walk: slot k's bias depends on slot k-1's token."""
        b, spec, linears = self.b, self.spec, self._linears
        size = len(head.table)
        hidden = self._norm(x, "norm")
        shape = b.constant([-1, spec.block_size, size])
        slots = self._split_slots(b.op("Reshape", self._base_logits(x, hidden, head), shape))
        states = self._split_slots(
            b.op("Reshape", hidden, b.constant([-1, spec.block_size, spec.hidden_size]))
        )
        walk = None
        if spec.markov_rank:
            walk = MarkovWalk(linears, self._tensor, spec.markov_head, anchors)
        confidence_head = self._confidence_head(anchors)
        previous = anchors
        tokens, rows, confidences = [], [], []
        for k in range(spec.block_size):
            row = slots[k]
            feature = None
            if walk is not None:
                feature = walk.embed(previous)
                row = b.op("Add", row, b.wide(walk.bias(states[k], feature)))
            uniform = b.op("Gather", self._uniforms, b.constant(k), axis=1)
            drawn, row = b.ops("Draw", row, *self._filters, uniform, outputs=2, domain="dspark")
            previous = b.op("Gather", self._draft_vocab, drawn)
            confidences.append(confidence_head(states[k], feature))
            tokens.append(b.op("Unsqueeze", previous, b.constant([1])))
            rows.append(b.op("Unsqueeze", row, b.constant([1])))
        gamma = spec.block_size
        joined = [b.op("Concat", *part, axis=1) for part in (tokens, rows, confidences)]
        b.output(joined[0], "draft_tokens", INT64, ["R", gamma])
        b.output(joined[1], "draft_logits", FLOAT, ["R", gamma, size])
        b.output(joined[2], "confidence", FLOAT, ["R", gamma])

    def _split_slots(self, x: str) -> list[str]:
        """`[R, γ, n]` -> γ values `[R, n]`."""
        b, gamma = self.b, self.spec.block_size
        parts = b.ops("Split", x, outputs=gamma, axis=1, num_outputs=gamma) if gamma > 1 else [x]
        return [b.op("Squeeze", part, b.constant([1])) for part in parts]

    def _confidence_head(self, anchors: str) -> Callable[[str, str | None], str]:
        """Logit of one slot `[R, 1]`; without a head every slot gets a logit that means 1."""
        b, spec = self.b, self.spec
        if not spec.confidence_head:

            def certain(state: str, feature: str | None) -> str:
                shape = b.op("Concat", b.op("Shape", anchors, end=1), b.constant([1]), axis=0)
                return b.op("Expand", b.constant(CERTAIN, np.float32), shape)

            return certain
        matrix = self._tensor("confidence_head.proj.weight").astype(np.float32).T
        weight = b.weight("confidence_head.proj", matrix)
        bias = b.constant(self._tensor("confidence_head.proj.bias").astype(np.float32), np.float32)

        def logit(state: str, feature: str | None) -> str:
            x = state
            if spec.confidence_with_markov:
                assert feature is not None
                x = b.op("Concat", state, feature, axis=1)
            return b.op("Add", b.op("MatMul", b.wide(x), weight), bias)

        return logit
