"""Figures of speculation agree with each other and with counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.decode.algorithm.metrics import (
    acceptance_by_position,
    add,
)
from dspark_batch.decode.types import SpecCounts

# Six rounds that verified 13 of 20 draft tokens, and accepted so many of each block.
ACCEPTED = [0, 3, 1, 3, 0, 2]
COUNTS = SpecCounts(6, 20, 13, 9, (2, 1, 1, 2, 0))


def test_figures_of_counts_are_those_of_their_rounds() -> None:
    assert COUNTS.accepted_length == 1 + np.mean(ACCEPTED)
    assert COUNTS.acceptance_rate == pytest.approx(9 / 13)
    nothing = add([])
    assert (nothing.accepted_length, nothing.acceptance_rate) == (0.0, 0.0)


def test_acceptance_by_position_is_the_share_of_rounds_that_got_there() -> None:
    shares = acceptance_by_position(COUNTS.accepted_histogram)
    expected = [np.mean(np.array(ACCEPTED) > position) for position in range(4)]
    assert shares == pytest.approx(expected)
    assert 1 + shares.sum() == pytest.approx(COUNTS.accepted_length)


def test_counts_add_up_also_over_different_block_sizes() -> None:
    parts = [
        SpecCounts(2, 4, 3, 2, (1, 0, 1), 2, 1),
        COUNTS,
        SpecCounts(0, 0, 0, 0, (0, 0, 0, 0)),
    ]
    assert add(parts) == SpecCounts(
        num_rounds=8,
        num_draft_tokens=24,
        num_verified_tokens=16,
        num_accepted_tokens=11,
        accepted_histogram=(3, 1, 2, 2, 0),
        num_looked_up_tokens=2,
        num_drafted_rounds=1,
    )
    assert add(iter(parts)) == add(reversed(parts))


def test_no_rounds_have_no_figures() -> None:
    assert add([]) == SpecCounts(0, 0, 0, 0, ())
    assert acceptance_by_position((0, 0, 0)).tolist() == [0, 0]


def test_shares_can_be_those_of_the_rounds_that_drafted() -> None:
    counts = SpecCounts(10, 6, 6, 4, (8, 0, 2), num_drafted_rounds=4)
    shares = acceptance_by_position(counts.accepted_histogram, num_rounds=counts.num_drafted_rounds)
    assert shares.tolist() == [0.5, 0.5]
