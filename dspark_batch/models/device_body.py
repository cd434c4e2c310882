"""The verification op as nodes that a CUDA graph can capture: no control flow, no shapes.

As `plugin.onnx_body`, for rows that all have K1 = K + 1 tokens. Each node has a CUDA kernel in ONNX
Runtime, so ArgMax is a TopK of one. A graph is for greedy rows only, or for rows of which some
sample; there, `width` is how many candidates the filters sort: 0 where no row filters.

Inputs beside the logits `[R * K1, V]`, where all are as in `plugin.contract`:

    lengths       int64 [R]
    draft_tokens  int64 [R, K]          unless K is 0
    temperature, top_p  float [R]; top_k  int64 [R]; uniforms  float [R, G1]    if rows sample
    certain       int64 [R]             if rows sample and K is not 0
    draft_logits  float [Z, G, D]       what drafts were drawn from, of the rows that drafted
    draft_rows    int64 [R]             which of them is the row's

Outputs: num_accepted, bonus int64 [R], as in `plugin.contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark_batch.models.graph import BOOL, FLOAT, INT64, GraphBuilder, largest
from dspark_batch.models.plugin import contract


@dataclass(frozen=True, slots=True)
class Verification:
    """Which verification a graph ends in."""

    tokens_per_row: int
    """K1: 1 is a plain step."""
    samples: bool = False
    width: int = 0
    """Candidates that filters sort, at most the vocabulary."""


def verifying(path: Path, which: Verification, *, block_size: int) -> GraphBuilder:
    """The target graph in a file (`paged_decoder`) with a verification behind its logits."""
    b = GraphBuilder.opened(path)
    graph = b.model().graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.output}
    vocab = next(tensor for tensor in graph.initializer if tensor.name == "draft_vocab")
    DeviceBody(
        b,
        "logits",
        which,
        vocab_size=shapes["logits"][1].dim_value,
        draft_vocab=vocab.name,
        draft_vocab_size=vocab.dims[0],
        block_size=block_size,
    )
    return b


class DeviceBody:
    """Adds the nodes of one verification to a target's graph."""

    def __init__(
        self,
        builder: GraphBuilder,
        logits: str,
        which: Verification,
        *,
        vocab_size: int,
        draft_vocab: str,
        draft_vocab_size: int,
        block_size: int,
    ) -> None:
        """`logits` `[R * K1, V]` in the type of the graph; `draft_vocab` int64 [D]."""
        self.b, self._which = builder, which
        self._num_drafts = which.tokens_per_row - 1
        self._vocab_size, self._draft_vocab_size = vocab_size, draft_vocab_size
        self._draft_vocab, self._block_size = draft_vocab, block_size
        self._lengths = builder.input("lengths", INT64, ["R"])
        self._tokens = ""
        if self._num_drafts:
            self._tokens = builder.input("draft_tokens", INT64, ["R", self._num_drafts])
        self._build(logits)

    def _build(self, logits: str) -> None:
        b, each = self.b, self.b.constant([-1, self._which.tokens_per_row])
        value, best = largest(b, logits)
        best = b.op("Reshape", best, each)  # [R, K1]
        wide = b.op("Reshape", b.wide(value), each)
        finite = b.op("Equal", b.op("Sub", wide, wide), b.constant(0.0, np.float32))
        if self._num_drafts:
            numbers = b.constant(np.arange(self._num_drafts)[None])
            column = b.op("Unsqueeze", self._lengths, b.constant([1]))
            self._planned = b.op("Less", numbers, column)  # [R, K]
        if self._which.samples:
            accepted, chosen = self._sampled(logits, best)
        else:
            accepted = self._accepted(self._matches(best)) if self._num_drafts else ""
            chosen = self._at(best, accepted)
        sound = self._sound(finite)
        if not accepted:
            accepted = b.op("Mul", self._lengths, b.constant(0))
        zero, minus_one = b.constant(0), b.constant(-1)
        accepted = b.op("Where", sound, accepted, zero)
        chosen = b.op("Where", sound, chosen, minus_one)
        b.output(accepted, "num_accepted", INT64, ["R"])
        b.output(chosen, "bonus", INT64, ["R"])

    def _matches(self, best: str) -> str:
        """Whether each draft is the target's likeliest token, `[R, K]`."""
        b = self.b
        begin, end, axis = b.constant([0]), b.constant([self._num_drafts]), b.constant([1])
        return b.op("Equal", self._tokens, b.op("Slice", best, begin, end, axis))

    def _accepted(self, keeps: str) -> str:
        """Drafts before the first that is not kept, `[R]`."""
        b = self.b
        kept = b.op("Cast", b.op("And", keeps, self._planned), to=FLOAT)
        # The product up to each place, as a sum of what fails: no failure so far.
        failures = b.op("CumSum", b.op("Sub", b.constant(1.0, np.float32), kept), b.constant(1))
        going = b.op("Cast", b.op("Equal", failures, b.constant(0.0, np.float32)), to=FLOAT)
        return b.op("Cast", b.op("ReduceSum", going, b.constant([1]), keepdims=0), to=INT64)

    def _at(self, cells: str, accepted: str) -> str:
        """Of `cells` [R, K1] the one behind the accepted drafts, `[R]`."""
        b = self.b
        if not accepted:
            return b.op("Reshape", cells, b.constant([-1]))
        column = b.op("Unsqueeze", accepted, b.constant([1]))
        return b.op("Reshape", b.op("GatherElements", cells, column, axis=1), b.constant([-1]))

    def _sound(self, finite: str) -> str:
        """Whether all logits that a row needs are finite, `[R]`."""
        b = self.b
        if not self._num_drafts:
            return b.op("Reshape", finite, b.constant([-1]))
        axis, one = b.constant([1]), b.constant([1])
        anchor = b.op("Slice", finite, b.constant([0]), one, axis)
        others = b.op("Slice", finite, one, b.constant([self._which.tokens_per_row]), axis)
        spared = b.op("Or", others, b.op("Not", self._planned))
        parts = [b.op("Cast", part, to=FLOAT) for part in (anchor, spared)]
        least = b.op("ReduceMin", b.op("Concat", *parts, axis=1), b.constant([1]), keepdims=0)
        return b.op("Cast", least, to=BOOL)

    # rows that sample ---------------------------------------------------------------------------

    def _sampled(self, logits: str, best: str) -> tuple[str, str]:
        b, num_drafts, size = self.b, self._num_drafts, self._vocab_size
        temperature = b.input("temperature", FLOAT, ["R"])
        top_k, top_p = b.input("top_k", INT64, ["R"]), b.input("top_p", FLOAT, ["R"])
        uniforms = b.input("uniforms", FLOAT, ["R", self._block_size + 1])
        zero, one = b.constant(0.0, np.float32), b.constant(1.0, np.float32)
        last = b.constant([-1])
        hot = b.op("Greater", temperature, zero)
        self._hot1 = b.op("Unsqueeze", hot, b.constant([1]))
        divisor = b.op("Where", hot, temperature, one)
        self._divisor2 = b.op("Unsqueeze", divisor, b.constant([1, 2]))
        cells = b.op("Reshape", b.wide(logits), b.constant([-1, self._which.tokens_per_row, size]))
        probs = self._softmax(cells)
        if self._which.width:
            probs = self._filtered(probs, top_k, top_p)
        bonus_uniform = b.op(
            "Slice", uniforms, last, b.constant([2**62]), b.constant([1])
        )  # [R, 1]
        if not num_drafts:
            flat = b.op("Reshape", probs, b.constant([-1, size]))
            drawn = self._drawn(flat, bonus_uniform)
            return "", b.op("Where", hot, drawn, b.op("Reshape", best, b.constant([-1])))
        begin, axis = b.constant([0]), b.constant([1])
        certain = b.input("certain", INT64, ["R"])
        sure1 = b.op("Unsqueeze", b.op("Greater", certain, b.constant(0)), b.constant([1]))
        every = b.input("draft_logits", FLOAT, ["Z", self._block_size, self._draft_vocab_size])
        mine = b.op("Gather", every, b.input("draft_rows", INT64, ["R"]))
        drafted = b.op("Slice", mine, begin, b.constant([num_drafts]), axis)
        draft_probs = self._softmax(drafted)  # [R, K, D]

        # Acceptance: u q < p.
        tokens = b.op("Where", self._planned, self._tokens, b.constant(0))
        column = b.op("Unsqueeze", tokens, b.constant([2]))
        is_token = b.op("Equal", column, self._draft_vocab)
        named = b.op("Where", is_token, draft_probs, zero)
        drawn_from = b.op("ReduceSum", named, b.constant([2]), keepdims=0)
        proposed = b.op("Where", sure1, one, drawn_from)
        before = b.op("Slice", probs, begin, b.constant([num_drafts]), axis)
        wanted = b.op("GatherElements", before, column, axis=2)
        wanted = b.op("Reshape", wanted, b.constant([-1, num_drafts]))
        uniform = b.op("Slice", uniforms, begin, b.constant([num_drafts]), axis)
        wins = b.op("Less", b.op("Mul", uniform, proposed), wanted)
        likeliest = b.op("And", self._matches(best), b.op("Not", self._hot1))
        accepted = self._accepted(b.op("Or", b.op("And", wins, self._hot1), likeliest))

        # The bonus: from what the target has over the draft, where the row ended.
        end = b.op("Unsqueeze", accepted, b.constant([1]))  # [R, 1]
        at_target = self._cell(probs, end, size)
        no_draft = b.constant(np.zeros((1, 1, self._draft_vocab_size)), np.float32)
        ended = b.op("Mul", b.op("Slice", draft_probs, begin, b.constant([1]), axis), no_draft)
        at_draft = self._cell(b.op("Concat", draft_probs, ended, axis=1), end, -1)
        rejected1 = b.op("Less", end, b.op("Unsqueeze", self._lengths, b.constant([1])))
        from_logits = b.op("And", rejected1, b.op("Not", sure1))
        at_draft = b.op("Where", from_logits, at_draft, zero)
        empty = b.op("Mul", at_target, zero)
        places = b.op("Unsqueeze", self._draft_vocab, b.constant([0]))
        ints = b.op("Cast", b.op("Mul", at_draft, zero), to=INT64)
        spread = b.op("ScatterElements", empty, b.op("Add", ints, places), at_draft, axis=1)
        padded = b.op("Concat", tokens, b.op("Mul", end, b.constant(0)), axis=1)
        refused = b.op("GatherElements", padded, end, axis=1)
        there = b.op("GatherElements", spread, refused, axis=1)
        surely = b.op("Where", b.op("And", rejected1, sure1), one, there)
        spread = b.op("ScatterElements", spread, refused, surely, axis=1)
        residual = b.op("Max", b.op("Sub", at_target, spread), zero)
        mass = b.op("ReduceSum", residual, b.constant([1]), keepdims=1)
        has_mass = b.op("Greater", mass, b.constant(contract.MIN_RESIDUAL_MASS, np.float32))
        drawn = self._drawn(b.op("Where", has_mass, residual, at_target), bonus_uniform)
        return accepted, b.op("Where", hot, drawn, self._at(best, accepted))

    def _softmax(self, cells: str) -> str:
        """At the rows' temperatures; the largest is taken off first: a tiny one must not overflow.

        By TopK: ReduceMax is twenty times as slow over a vocabulary.
        """
        b = self.b
        most = b.ops("TopK", cells, b.constant([1]), outputs=2, axis=-1)[0]
        return b.op("Softmax", b.op("Div", b.op("Sub", cells, most), self._divisor2), axis=-1)

    def _filtered(self, probs: str, top_k: str, top_p: str) -> str:
        """What top-k and then top-p keep of `[R, K1, V]`, normalised.

        Ties with the last one kept stay. `width` candidates must be enough for every row: top-k of
        a row that has one, or all.
        """
        b, width = self.b, min(self._which.width, self._vocab_size)
        zero, one = b.constant(0.0, np.float32), b.constant(1.0, np.float32)
        values, _ = b.ops(
            "TopK", probs, b.constant([width]), outputs=2, axis=-1, largest=1, sorted=1
        )
        k_on = b.op(
            "And",
            b.op("Greater", top_k, b.constant(0)),
            b.op("Less", top_k, b.constant(self._vocab_size)),
        )
        k_capped = b.op("Where", k_on, top_k, b.constant(width))
        k_capped = b.op(
            "Where", b.op("Less", k_capped, b.constant(width)), k_capped, b.constant(width)
        )
        k_last = b.op("Unsqueeze", b.op("Sub", k_capped, b.constant(1)), b.constant([1, 2]))
        spread = b.constant(np.zeros((1, self._which.tokens_per_row, 1), np.int64))
        k_value = b.op("GatherElements", values, b.op("Add", k_last, spread), axis=2)
        k_floor = b.op("Where", b.op("Unsqueeze", k_on, b.constant([1, 2])), k_value, zero)
        in_k = b.op("Where", b.op("Less", probs, k_floor), zero, probs)
        mass = b.op("ReduceSum", in_k, b.constant([-1]), keepdims=1)
        top_p2 = b.op("Unsqueeze", top_p, b.constant([1, 2]))
        running = b.op("CumSum", values, b.constant(-1))
        short = b.op("Cast", b.op("Less", running, b.op("Mul", top_p2, mass)), to=FLOAT)
        count = b.op("Cast", b.op("ReduceSum", short, b.constant([-1]), keepdims=1), to=INT64)
        last = b.constant(width - 1)
        place = b.op("Where", b.op("Less", count, last), count, last)
        p_value = b.op("GatherElements", values, place, axis=2)
        p_floor = b.op("Where", b.op("Less", top_p2, one), p_value, zero)
        kept = b.op("Where", b.op("Less", in_k, p_floor), zero, in_k)
        return b.op("Div", kept, b.op("ReduceSum", kept, b.constant([-1]), keepdims=1))

    def _cell(self, cells: str, end: str, size: int) -> str:
        """`[R, K1, n]` at each row's `end` [R, 1]: `[R, n]`."""
        b, per_row = self.b, self._which.tokens_per_row
        numbers = b.constant(np.arange(per_row)[None])
        here = b.op("Unsqueeze", b.op("Equal", numbers, end), b.constant([2]))
        return b.op(
            "ReduceSum",
            b.op("Where", here, cells, b.constant(0.0, np.float32)),
            b.constant([1]),
            keepdims=0,
        )

    def _drawn(self, weights: str, uniform: str) -> str:
        """A token of `[R, V]` by inverse CDF at `uniform` [R, 1]: `[R]`."""
        b = self.b
        cumulative = b.op("CumSum", weights, b.constant(1))
        total = b.op("Slice", cumulative, b.constant([-1]), b.constant([2**62]), b.constant([1]))
        below = b.op("LessOrEqual", cumulative, b.op("Mul", uniform, total))
        count = b.op("ReduceSum", b.op("Cast", below, to=FLOAT), b.constant([1]), keepdims=0)
        last = b.constant(float(self._vocab_size - 1), np.float32)
        return b.op("Cast", b.op("Min", count, last), to=INT64)
