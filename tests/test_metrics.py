"""Figures of speculation agree with each other and with counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.algorithm.metrics import (
    acceptance_by_position,
    acceptance_rate,
    accepted_length,
    add,
    count_rounds,
    drafted_rounds,
)
from dspark_batch.types import SpecCounts

ACCEPTED = [0, 3, 1, 3, 0, 2]
LENGTHS = [0, 3, 3, 3, 2, 2]


def test_rounds_are_counted_by_what_they_accepted() -> None:
    counts = count_rounds(ACCEPTED, LENGTHS, block_size=4, num_draft_tokens=20)
    assert counts == SpecCounts(
        num_rounds=6,
        num_draft_tokens=20,
        num_verified_tokens=13,
        num_accepted_tokens=9,
        accepted_histogram=(2, 1, 1, 2, 0),
    )
    assert all(type(n) is int for n in (counts.num_accepted_tokens, *counts.accepted_histogram))


def test_figures_from_the_histogram_equal_those_of_the_counts() -> None:
    counts = count_rounds(ACCEPTED, LENGTHS, block_size=4, num_draft_tokens=20)
    assert accepted_length(counts.accepted_histogram) == counts.accepted_length == 2.5
    rate = acceptance_rate(counts.accepted_histogram, counts.num_verified_tokens)
    assert rate == counts.acceptance_rate == pytest.approx(9 / 13)


def test_acceptance_by_position_is_the_share_of_rounds_that_got_there() -> None:
    counts = count_rounds(ACCEPTED, LENGTHS, block_size=4, num_draft_tokens=20)
    shares = acceptance_by_position(counts.accepted_histogram)
    expected = [np.mean(np.array(ACCEPTED) > position) for position in range(4)]
    assert shares == pytest.approx(expected)
    assert 1 + shares.sum() == pytest.approx(counts.accepted_length)


def test_counts_add_up_also_over_different_block_sizes() -> None:
    parts = [
        count_rounds([0, 2], [1, 2], block_size=2, num_draft_tokens=4),
        count_rounds(ACCEPTED, LENGTHS, block_size=4, num_draft_tokens=20),
        count_rounds([], [], block_size=3, num_draft_tokens=0),
    ]
    assert add(parts) == SpecCounts(
        num_rounds=8,
        num_draft_tokens=24,
        num_verified_tokens=16,
        num_accepted_tokens=11,
        accepted_histogram=(3, 1, 2, 2, 0),
    )
    assert add(iter(parts)) == add(reversed(parts))


def test_no_rounds_have_no_figures() -> None:
    assert add([]) == SpecCounts(0, 0, 0, 0, ())
    assert accepted_length((0, 0)) == 0
    assert acceptance_rate((5, 0), 0) == 0
    assert acceptance_by_position((0, 0, 0)).tolist() == [0, 0]


def test_rounds_that_drafted_are_told_from_plain_ones() -> None:
    counts = SpecCounts(10, 8, 6, 4, (8, 0, 2))  # γ = 2: four rounds drafted, six were plain
    assert drafted_rounds(counts) == 4
    shares = acceptance_by_position(counts.accepted_histogram, num_rounds=4)
    assert shares.tolist() == [0.5, 0.5]
    assert drafted_rounds(SpecCounts(3, 0, 0, 0, (3,))) == 0
