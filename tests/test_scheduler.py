"""Plans maximise expected tokens per second and never look past the token they decide about."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from dspark_batch.algorithm.acceptance import verify
from dspark_batch.algorithm.scheduler import (
    AcceptanceEstimate,
    CostTable,
    early_stop,
    expected_tokens,
    fixed,
    global_best,
    threshold,
    worth_drafting,
)

Array = NDArray[Any]
Seconds = Callable[[int], float]

VECTORS = np.array([[0.9, 0.8, 0.5], [0.6, 0.5, 0.4], [0.95, 0.95, 0.95]])


def smooth(num_tokens: int) -> float:
    return 10 + 0.8 * num_tokens


def cliff(num_tokens: int) -> float:
    return 10.0 if num_tokens <= 4 else 16.0 if num_tokens <= 8 else 22.0


def appendix_a(num_tokens: int) -> float:
    return 1 / (1.0, 0.5, 0.45)[num_tokens - 1]


def full(confidence: Array) -> Array:
    return np.full(len(confidence), confidence.shape[1], dtype=np.int64)


def objective(confidence: Array, lengths: Array, seconds: Seconds) -> float:
    survival = np.cumprod(confidence, axis=1)
    gains = sum(survival[row, :length].sum() for row, length in enumerate(lengths))
    return float((len(lengths) + gains) / seconds(len(lengths) + int(sum(lengths))))


def brute_force(confidence: Array, max_lengths: Array, seconds: Seconds) -> float:
    plans = product(*(range(most + 1) for most in max_lengths))
    return max(objective(confidence, np.array(plan), seconds) for plan in plans)


# --- Algorithm 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "seconds", "early", "early_value", "best", "best_value"),
    [
        (VECTORS, smooth, [2, 1, 3], 0.461039, [2, 1, 3], 0.461039),
        (VECTORS, cliff, [0, 0, 1], 0.395, [2, 0, 3], 0.458117),
        (np.array([[0.8, 0.9]]), appendix_a, [0], 1.0, [2], 1.134),
        (np.array([[0.8, 0.0]]), appendix_a, [0], 1.0, [0], 1.0),
    ],
    ids=["smooth", "cliff", "appendix-a-0.9", "appendix-a-0"],
)
def test_published_vectors(
    confidence: Array,
    seconds: Seconds,
    early: list[int],
    early_value: float,
    best: list[int],
    best_value: float,
) -> None:
    for plan, lengths, value in (
        (early_stop, early, early_value),
        (global_best, best, best_value),
    ):
        planned = plan(confidence, full(confidence), seconds)
        assert planned.dtype == np.int64
        assert planned.tolist() == lengths
        assert objective(confidence, planned, seconds) == pytest.approx(value, abs=1e-6)


def test_appendix_a_is_unbiased_with_early_stop_and_biased_with_a_global_search() -> None:
    """Target (0.7, 0.3), draft (0.5, 0.5); the first token A leads to confidence 0.9, B to 0."""
    num_rows = 20_000
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2, size=(num_rows, 2))
    target_logits = np.log(np.array([[0.7, 0.3], [0.5, 0.5]], dtype=np.float32))
    draws = rng.random((num_rows, 3)).astype(np.float32)

    def first_tokens(plan: Callable[..., Array]) -> Array:
        by_token = [plan(np.array([[0.8, c]]), np.array([2]), appendix_a)[0] for c in (0.9, 0.0)]
        result = verify(
            target_logits,
            np.tile([0, 1, 1], (num_rows, 1)),
            tokens,
            np.array(by_token)[tokens[:, 0]],
            np.zeros((num_rows, 2, 2), dtype=np.float32),
            np.arange(2),
            np.ones(num_rows),
            np.zeros(num_rows),
            np.ones(num_rows),
            draws,
        )
        return np.bincount(np.where(result.num_accepted > 0, tokens[:, 0], result.bonus))

    unbiased, biased = first_tokens(early_stop), first_tokens(global_best)
    lawful, leaking = np.array([0.7, 0.3]) * num_rows, np.array([0.85, 0.15]) * num_rows
    assert stats.chisquare(unbiased, lawful).pvalue > 1e-3
    assert stats.chisquare(biased, leaking).pvalue > 1e-3
    assert stats.chisquare(biased, lawful).pvalue < 1e-12


def test_global_best_equals_brute_force_on_any_costs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        confidence = rng.uniform(0.1, 1, size=(3, 3)).round(1)
        max_lengths = rng.integers(0, 4, size=3)
        seconds = dict(enumerate(rng.uniform(1, 6, size=13))).__getitem__
        planned = global_best(confidence, max_lengths, seconds)
        assert (planned <= max_lengths).all()
        assert objective(confidence, planned, seconds) == pytest.approx(
            brute_force(confidence, max_lengths, seconds)
        )


def test_early_stop_is_optimal_where_costs_are_convex() -> None:
    """Linear or convex costs give one peak: falling gains over rising marginal costs."""
    rng = np.random.default_rng(2)
    lengths_seen = set()
    for _ in range(60):
        confidence = rng.random((3, 3))
        fixed_cost, per_token, curve = rng.uniform([0, 0.1, 0], [20, 2, 0.1])

        def seconds(b: int, a: float = fixed_cost, c: float = per_token, d: float = curve) -> float:
            return a + c * b + d * b * b

        planned = early_stop(confidence, full(confidence), seconds)
        lengths_seen.update(planned.tolist())
        assert objective(confidence, planned, seconds) == pytest.approx(
            brute_force(confidence, full(confidence), seconds)
        )
    assert lengths_seen == {0, 1, 2, 3}


confidences = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=4, max_size=4),
        min_size=rows,
        max_size=rows,
    )
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(confidences, st.lists(st.floats(0.01, 3), min_size=20, max_size=20), st.randoms())
def test_a_plan_never_depends_on_confidences_beyond_the_first_not_admitted(
    rows: list[list[float]], increments: list[float], random: Any
) -> None:
    confidence = np.array(rows)
    seconds = np.cumsum(increments)
    lengths = early_stop(confidence, full(confidence), lambda b: float(seconds[b - 1]))
    for row, length in enumerate(lengths):
        for later in range(length + 1, 4):
            confidence[row, later] = random.choice([0.0, 0.5, 1.0, float("nan")])
    again = early_stop(confidence, full(confidence), lambda b: float(seconds[b - 1]))
    assert again.tolist() == lengths.tolist()


def test_ties_keep_smaller_positions_first_then_smaller_rows() -> None:
    certain = np.ones((3, 4))

    def up_to(most: int) -> Seconds:
        return lambda b: 1.0 if b <= most else 100.0

    assert early_stop(certain, full(certain), up_to(5)).tolist() == [1, 1, 0]
    assert early_stop(certain, full(certain), up_to(8)).tolist() == [2, 2, 1]
    # A row in front does not move a tie between others.
    assert early_stop(certain, np.array([0, 4, 4]), up_to(6)).tolist() == [0, 2, 1]


def test_nothing_is_admitted_without_strict_improvement_or_without_confidence() -> None:
    # One token for one token's price: exactly as good, hence not better.
    assert early_stop(np.ones((1, 3)), np.array([3]), float).tolist() == [0]
    falling = [4.0, 3.0, 2.0, 1.0, 0.5].__getitem__
    for hopeless in (0.0, np.nan):
        confidence = np.array([[1.0, hopeless, 1.0]])
        assert early_stop(confidence, np.array([3]), falling).tolist() == [1]
        assert global_best(confidence, np.array([3]), falling).tolist() == [1]


def test_max_lengths_are_kept_and_no_row_is_no_plan() -> None:
    confidence = np.full((3, 4), 0.99)
    caps = np.array([0, 2, 9])
    for plan in (early_stop, global_best):
        assert plan(confidence, caps, lambda b: 100.0).tolist() == [0, 2, 4]
        # Nobody has measured a step of no tokens: the costs are not asked.
        never: dict[int, float] = {}
        assert plan(confidence[:0], caps[:0], never.__getitem__).tolist() == []


def test_float32_confidences_give_the_plan_of_their_values() -> None:
    confidence = VECTORS.astype(np.float32)
    assert early_stop(confidence, full(confidence), smooth).tolist() == [2, 1, 3]


# --- other plans ------------------------------------------------------------------------------


def test_fixed_is_a_copy_of_the_caps() -> None:
    caps = np.array([3, 0, 7])
    planned = fixed(caps)
    planned[0] = 1
    assert caps.tolist() == [3, 0, 7]


def test_threshold_stops_at_the_first_own_confidence_below_it() -> None:
    confidence = np.array([[0.9, 0.4, 0.9], [0.5, 0.5, 0.5], [0.2, 0.9, 0.9], [0.6, 0.7, np.nan]])
    caps = np.array([3, 3, 3, 3])
    assert threshold(confidence, caps, 0.5).tolist() == [1, 3, 0, 2]
    assert threshold(confidence, np.array([3, 2, 1, 1]), 0.0).tolist() == [3, 2, 1, 1]


# --- costs ------------------------------------------------------------------------------------


def table(**changes: Any) -> CostTable:
    """Seconds 1 + 0.5 rows + 0.25 tokens, except where changed."""
    rows, per_row = np.array([1, 2, 4, 8]), np.array([1, 2, 4, 8])
    fields = {
        "rows": rows,
        "tokens_per_row": per_row,
        "verify_seconds": 1 + 0.5 * rows[:, None] + 0.25 * rows[:, None] * per_row,
        "draft_seconds": 0.1 * rows,
    } | changes
    return CostTable.measured(
        fields["rows"],
        fields["tokens_per_row"],
        verify_seconds=fields["verify_seconds"],
        draft_seconds=fields["draft_seconds"],
    )


def test_costs_linear_in_rows_and_tokens_are_recovered_everywhere() -> None:
    costs = table()
    for num_rows, num_tokens in ((1, 1), (1, 3), (3, 3), (3, 7), (5, 29), (8, 64), (12, 150)):
        expected = 1 + 0.5 * num_rows + 0.25 * num_tokens
        assert costs.verify(num_rows, num_tokens) == pytest.approx(expected)
        assert costs.verify_curve(num_rows)(num_tokens) == costs.verify(num_rows, num_tokens)
        assert costs.draft(num_rows) == pytest.approx(0.1 * num_rows)


def test_measured_points_are_returned_as_measured() -> None:
    seconds = [[1.0, 1.1, 4.0], [1.2, 2.0, 4.5]]
    costs = table(
        rows=[1, 3], tokens_per_row=[1, 2, 8], verify_seconds=seconds, draft_seconds=[1, 5]
    )
    for i, num_rows in enumerate((1, 3)):
        for j, per_row in enumerate((1, 2, 8)):
            assert costs.verify(num_rows, num_rows * per_row) == seconds[i][j]
    assert costs.verify(2, 4) == pytest.approx(1.55)
    assert costs.verify(2, 10) == pytest.approx((1.1 + 2.0 + 4.0 + 4.5) / 4)


def test_costs_never_fall_with_tokens_or_rows_whatever_was_measured() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        costs = table(
            verify_seconds=rng.uniform(0.1, 3, size=(4, 4)), draft_seconds=rng.uniform(1, 2, 4)
        )
        for num_rows in (1, 3, 8, 40):
            seconds = [costs.verify(num_rows, num_rows + extra) for extra in range(0, 400, 3)]
            assert min(seconds) > 0
            assert (np.diff(seconds) >= 0).all()
        for per_row in (1, 3, 8):
            assert (np.diff([costs.verify(r, r * per_row) for r in range(1, 60)]) >= -1e-12).all()
        assert (np.diff([costs.draft(r) for r in range(1, 60)]) >= 0).all()


def test_one_measured_batch_size_scales_with_rows() -> None:
    costs = table(rows=[1], tokens_per_row=[1, 3], verify_seconds=[[1.0, 2.0]], draft_seconds=[0.5])
    assert costs.verify(1, 2) == 1.5
    assert costs.verify(4, 8) == 6.0
    assert costs.draft(4) == 2.0


def test_a_table_survives_json() -> None:
    costs = table()
    assert CostTable.from_json(json.loads(json.dumps(costs.to_json()))) == costs


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [2, 3, 4, 5]},
        {"rows": [1, 4, 2, 8]},
        {"rows": [1, 2, 4]},
        {"rows": [], "verify_seconds": np.ones((0, 4)), "draft_seconds": []},
        {"tokens_per_row": [1], "verify_seconds": np.ones((4, 1))},
        {"tokens_per_row": [2, 4, 6, 8]},
        {"verify_seconds": np.ones((4, 3))},
        {"verify_seconds": np.zeros((4, 4))},
        {"draft_seconds": [1.0, 1.0]},
        {"draft_seconds": [1.0, 1.0, 1.0, np.nan]},
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        table(**changes)


# --- before drafting --------------------------------------------------------------------------


def test_expected_tokens_count_the_bonus_and_what_is_verified() -> None:
    survival = np.array([0.9, 0.5, 0.2])
    assert expected_tokens(survival, np.array([0, 1, 3])) == pytest.approx([1.0, 1.9, 2.6])
    by_row = np.array([survival, survival / 2])
    assert expected_tokens(by_row, np.array([2, 2])) == pytest.approx([2.4, 1.7])


def test_drafting_is_worth_it_exactly_when_some_plan_beats_plain_decoding() -> None:
    rng = np.random.default_rng(4)
    answers = []
    for _ in range(200):
        survival = np.cumprod(rng.uniform(0.2, 1, size=(3, 3)), axis=1)
        caps = rng.integers(0, 4, size=3)
        rows, per_row = np.array([1, 4]), np.array([1, 4])
        base, per_token, draft = rng.uniform([0, 0.1, 0], [3, 1, 3])
        costs = table(
            rows=rows,
            tokens_per_row=per_row,
            verify_seconds=base + per_token * rows[:, None] * per_row,
            draft_seconds=draft + 0.01 * rows,
        )
        speculative = max(
            expected_tokens(survival, np.array(plan)).sum()
            / (costs.draft(3) + costs.verify(3, 3 + sum(plan)))
            for plan in product(*(range(cap + 1) for cap in caps))
        )
        answers.append(worth_drafting(survival, caps, costs))
        assert answers[-1] == (speculative > 3 / costs.verify(3, 3))
    assert 20 < sum(answers) < 180


def test_drafting_pays_in_a_small_batch_and_not_in_a_saturated_one() -> None:
    rows, per_row = np.array([1, 2, 4, 8, 16, 32]), np.array([1, 2, 4, 8])
    tokens = rows[:, None] * per_row
    costs = table(
        rows=rows,
        tokens_per_row=per_row,
        verify_seconds=np.maximum(1.0, tokens / 16),
        draft_seconds=np.maximum(0.1, rows / 80),
    )
    survival = np.cumprod(np.full((32, 7), 0.7), axis=1)
    caps = np.full(32, 7)
    assert worth_drafting(survival[:2], caps[:2], costs)
    assert not worth_drafting(survival, caps, costs)
    assert not worth_drafting(survival[:2], np.zeros(2, dtype=np.int64), costs)
    assert not worth_drafting(survival[:0], caps[:0], costs)


# --- acceptance estimate ----------------------------------------------------------------------


def test_the_estimate_starts_at_its_prior_and_moves_by_counts() -> None:
    estimate = AcceptanceEstimate.from_prior([0.8, 0.5, 0.5], prior_weight=2, decay=0.5)
    assert estimate.survival == pytest.approx([0.8, 0.4, 0.2])
    # Row 0: all three accepted; row 1: the second rejected; row 2: one verified and accepted.
    after = estimate.observe([3, 3, 1], [3, 1, 1])
    assert after.seen.tolist() == [3, 2, 1]
    assert after.accepted.tolist() == [3, 1, 1]
    assert after.conditional == pytest.approx([4.6 / 5, 2 / 4, 2 / 3])
    assert after.survival == pytest.approx(np.cumprod([4.6 / 5, 2 / 4, 2 / 3]))
    assert estimate.seen.tolist() == [0, 0, 0]
    again = after.observe([2], [0])
    assert again.seen.tolist() == [2.5, 1, 0.5]
    assert again.accepted.tolist() == [1.5, 0.5, 0.5]


def test_the_estimate_is_not_biased_by_rounds_that_were_cut_short() -> None:
    rng = np.random.default_rng(5)
    true = np.array([0.9, 0.6, 0.8, 0.3])
    estimate = AcceptanceEstimate.from_prior(np.full(4, 0.5), prior_weight=1, decay=1.0)
    for _ in range(200):
        potential = np.cumprod(rng.random((100, 4)) < true, axis=1).sum(axis=1)
        lengths = rng.choice([0, 1, 2, 4], size=100)
        estimate = estimate.observe(lengths, np.minimum(potential, lengths))
    np.testing.assert_allclose(estimate.conditional, true, atol=0.03)
    np.testing.assert_allclose(estimate.survival, np.cumprod(true), atol=0.03)


def test_plain_rounds_bring_the_estimate_back_to_its_prior() -> None:
    prior = [0.9, 0.8]
    estimate = AcceptanceEstimate.from_prior(prior, prior_weight=4, decay=0.9)
    estimate = estimate.observe([2] * 50, [0] * 50)
    assert estimate.conditional[0] < 0.1
    for _ in range(100):
        estimate = estimate.observe([0] * 50, [0] * 50)
    np.testing.assert_allclose(estimate.conditional, prior, atol=1e-3)


@pytest.mark.parametrize(("prior_weight", "decay"), [(0, 0.9), (1, 0), (1, 1.1)])
def test_an_estimate_out_of_range_is_refused(prior_weight: float, decay: float) -> None:
    with pytest.raises(ValueError, match="out of range"):
        AcceptanceEstimate.from_prior([0.5], prior_weight=prior_weight, decay=decay)
