"""Figures of speculation from counts of rounds.

An accepted histogram is `SpecCounts.accepted_histogram`: entry a is the number of rounds that
accepted exactly a draft tokens, γ + 1 entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_batch.types import SpecCounts


def count_rounds(
    num_accepted: ArrayLike, lengths: ArrayLike, *, block_size: int, num_draft_tokens: int
) -> SpecCounts:
    """Counts of rounds given as accepted and verified draft tokens, [n] each.

    `num_draft_tokens` is what was drafted for them, verified or not: γ per round that drafted.
    """
    accepted = np.asarray(num_accepted, dtype=np.int64)
    return SpecCounts(
        num_rounds=len(accepted),
        num_draft_tokens=num_draft_tokens,
        num_verified_tokens=int(np.asarray(lengths, dtype=np.int64).sum()),
        num_accepted_tokens=int(accepted.sum()),
        accepted_histogram=tuple(np.bincount(accepted, minlength=block_size + 1).tolist()),
    )


def add(counts: Iterable[SpecCounts]) -> SpecCounts:
    """The counts of all rounds together; histograms of unequal length are padded with zeros."""
    every = list(counts)
    histograms = zip_longest(*(c.accepted_histogram for c in every), fillvalue=0)
    return SpecCounts(
        num_rounds=sum(c.num_rounds for c in every),
        num_draft_tokens=sum(c.num_draft_tokens for c in every),
        num_verified_tokens=sum(c.num_verified_tokens for c in every),
        num_accepted_tokens=sum(c.num_accepted_tokens for c in every),
        accepted_histogram=tuple(sum(column) for column in histograms),
    )


def accepted_length(accepted_histogram: Sequence[int]) -> float:
    """τ: mean tokens committed per round, the bonus counted; 0 without rounds."""
    num_rounds = sum(accepted_histogram)
    accepted = sum(a * rounds for a, rounds in enumerate(accepted_histogram))
    return 1.0 + accepted / num_rounds if num_rounds else 0.0


def acceptance_rate(accepted_histogram: Sequence[int], num_verified_tokens: int) -> float:
    """Accepted / verified draft tokens, the bonus not counted; 0 where nothing was verified."""
    accepted = sum(a * rounds for a, rounds in enumerate(accepted_histogram))
    return accepted / num_verified_tokens if num_verified_tokens else 0.0


def acceptance_by_position(
    accepted_histogram: Sequence[int], *, num_rounds: int | None = None
) -> NDArray[np.float64]:
    """Share [γ] of rounds whose block was accepted up to each position; 0 without rounds.

    Unconditional, so it falls along the block and τ = 1 + its sum. Rounds that verified less than
    the position count as not reaching it. `num_rounds` is of which rounds: all by default; those
    that drafted are another choice, since one that drafted nothing accepted nothing.
    """
    rounds = np.asarray(accepted_histogram, dtype=np.float64)
    at_least = np.cumsum(rounds[::-1])[::-1]
    of = rounds.sum() if num_rounds is None else num_rounds
    shares: NDArray[np.float64] = at_least[1:] / max(of, 1.0)
    return shares


def drafted_rounds(counts: SpecCounts) -> int:
    """Rounds that drafted: a drafted block always has γ tokens."""
    block_size = len(counts.accepted_histogram) - 1
    return counts.num_draft_tokens // block_size if block_size > 0 else 0
