"""The contract of a runtime: a round's step, or spans of rows' tokens, never a cache tensor.

A runtime owns the KV caches. `engine` names rows by slot and says where each row's tokens start;
rolling back is starting lower next time. Context (the target's hidden states for the draft) stays
with the runtime too: a step leaves it there, `keep` says which of its tokens were committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, VerifyResult

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PrefillSizes:
    """How prompts are cut into passes."""

    tokens: int = 512
    """Of all rows in one pass."""
    chunk: int = 256
    """Of one row in it."""
    intake: int = 0
    """A pass that holds up all rows should be for some prompts, not for one: while rows run, one in
    so many slots must be free before prompts are read. 0: read at once."""


PREFILL = PrefillSizes()


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one row in a step: they take positions `start .. start + len(tokens) - 1`."""

    slot: int
    start: int
    tokens: Ints
    certain: bool = False
    """Whether the drafts among them are no draft of the runtime's, but were proposed for sure."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Per-row sampling of a step: `temperature`, `top_k`, `top_p` [R] and uniforms [R, γ + 1]."""

    temperature: Floats
    top_k: Ints
    top_p: Floats
    uniforms: Floats

    def select(self, rows: list[int]) -> Draws:
        """The draws of these rows."""
        return Draws(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.uniforms[rows]
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A round's target pass: each row's anchor and, behind it, the drafts to verify."""

    slots: list[int]
    """[R]"""
    starts: Ints
    """[R] the anchor's position: as many tokens as the cache holds."""
    anchors: Ints
    """[R]"""
    lengths: Ints
    """[R] drafts to verify."""
    drafts: Ints | None
    """[R, γ]; beyond a row's length padding. None in a plain step, where all lengths are 0."""
    certain: NDArray[np.bool_]
    """[R] whether the row's drafts are no draft of the runtime's own."""
    draws: Draws

    def spans(self) -> list[Span]:
        """The same as spans, for runtimes that pack rows of different lengths."""
        tokens = self.anchors[:, None]
        if self.drafts is not None:
            tokens = np.concatenate([tokens, self.drafts], axis=1)
        rows = zip(
            self.slots,
            self.starts.tolist(),
            self.lengths.tolist(),
            self.certain.tolist(),
            strict=True,
        )
        return [
            Span(slot, start, tokens[r, : 1 + length], certain)
            for r, (slot, start, length, certain) in enumerate(rows)
        ]


@dataclass(frozen=True, slots=True)
class Placement:
    """What depends on the machine and not on the engine."""

    device: str = "auto"
    """`cpu`, `cuda`, or what the runtime finds best."""
    threads: int = 0
    """Of each graph on the CPU; 0 lets the runtime choose."""


ANYWHERE = Placement()


@dataclass(frozen=True, slots=True)
class PaddedShapes:
    """The sizes that passes are padded up to. Both ascend from 1."""

    rows: tuple[int, ...]
    """Of target passes without prefill, and of draft passes; the last holds every slot."""
    tokens_per_row: tuple[int, ...]
    """Of target passes, the anchor counted; the last holds a whole block."""


class Runtime(Protocol):
    """An opened pair of graphs with caches for a fixed number of slots.

    A class that names this one as its base has `step` from it.
    """

    padded_shapes: PaddedShapes | None = None
    """What passes are padded to, so that their cost goes in steps; None where they are not."""
    prefill_sizes: PrefillSizes = PREFILL
    """How prompts are cut into passes."""
    narrow_block: int | None = None
    """Tokens of a narrower block than γ that it can draft too; None: there is none."""

    def admit(self, slot: int) -> None:
        """Begin a row: its caches are empty."""

    def release(self, slot: int) -> None:
        """End a row."""

    def draft(self, slots: list[int], anchors: Ints, draws: Draws) -> DraftBlock:
        """Propose a block per row, from the context of every token verified so far.

        `anchors` [R] are the rows' last committed tokens. The block is as wide as the uniforms of
        `draws` are: γ, or `narrow_block`. The confidence is raw: logits [R, γ].
        """

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        """One target pass over `spans`, of which the last `lengths[r]` tokens are drafts.

        They are those of the row's last draft, unless its span is certain. Length 0 is plain
        decoding, or prefill when the span is a piece of the prompt. Everything but the rejected
        drafts counts as committed from here on.
        """

    def step(self, step: Step) -> VerifyResult:
        """The target pass of a round.

        As `verify`, but for rows that all begin with their anchor.
        """
        return self.verify(step.spans(), step.lengths, step.draws)

    def context(self, spans: list[Span]) -> list[Floats]:
        """One target pass over known tokens: the context `[n, taps * hidden]` of each span.

        As a step of prefill, but what the draft would take in comes back instead: for training.
        """

    def close(self) -> None:
        """Free sessions and caches."""
