"""Figures of speculation from counts of rounds.

An accepted histogram is `SpecCounts.accepted_histogram`: entry a is the number of rounds that
accepted exactly a draft tokens, γ + 1 entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import SpecCounts


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
        num_looked_up_tokens=sum(c.num_looked_up_tokens for c in every),
        num_drafted_rounds=sum(c.num_drafted_rounds for c in every),
    )


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
