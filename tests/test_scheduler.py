"""Plans maximise expected tokens per second and never look past the token they decide about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.algorithm.scheduler import (
    Budget,
    early_stop,
    expected_gain,
    fill,
    global_budget,
    threshold,
)
from dspark_batch.models.plugin.specification import verify

Array = NDArray[Any]
Seconds = Callable[[int, int], float]
Rule = Callable[[Array, Array, Seconds], Array]

VECTORS = np.array([[0.9, 0.8, 0.5], [0.6, 0.5, 0.4], [0.95, 0.95, 0.95]])


def smooth(num_tokens: int, longest: int) -> float:
    return 10 + 0.8 * num_tokens


def cliff(num_tokens: int, longest: int) -> float:
    return 10.0 if num_tokens <= 4 else 16.0 if num_tokens <= 8 else 22.0


def appendix_a(num_tokens: int, longest: int) -> float:
    return 1 / (1.0, 0.5, 0.45)[num_tokens - 1]


def full(confidence: Array) -> Array:
    return np.full(len(confidence), confidence.shape[1], dtype=np.int64)


def objective(confidence: Array, lengths: Array, seconds: Seconds) -> float:
    survival = np.cumprod(confidence, axis=1)
    gains = sum(survival[row, :length].sum() for row, length in enumerate(lengths))
    num_tokens, longest = len(lengths) + int(sum(lengths)), 1 + int(max(lengths))
    return float((len(lengths) + gains) / seconds(num_tokens, longest))


def plans(max_lengths: Array) -> Iterator[Array]:
    return map(np.array, product(*(range(most + 1) for most in max_lengths)))


def brute_force(confidence: Array, max_lengths: Array, seconds: Seconds) -> float:
    return max(objective(confidence, plan, seconds) for plan in plans(max_lengths))


def algorithm_1(confidence: Array, max_lengths: Array, seconds: Seconds) -> Array:
    """As the paper has it: one token at a time, and the first that does not pay is the end."""
    survival = np.cumprod(confidence, axis=1)
    ranked = sorted(
        (-survival[r, j], j, r)
        for r in range(len(confidence))
        for j in range(max_lengths[r])
        if survival[r, j] > 0
    )
    lengths = np.zeros(len(confidence), dtype=np.int64)
    for _, _, r in ranked:
        longer = lengths.copy()
        longer[r] += 1
        if objective(confidence, longer, seconds) <= objective(confidence, lengths, seconds):
            break
        lengths = longer
    return lengths


def anticipating(confidence: Array, max_lengths: Array, seconds: Seconds) -> Array:
    """The asynchronous rule with a budget from the round's own confidence: what must not be."""
    return fill(confidence, max_lengths, global_budget(confidence, max_lengths, seconds))


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
    for rule, lengths, value in (
        (algorithm_1, early, early_value),
        (anticipating, best, best_value),
    ):
        planned = rule(confidence, full(confidence), seconds)
        assert planned.dtype == np.int64
        assert planned.tolist() == lengths
        assert objective(confidence, planned, seconds) == pytest.approx(value, abs=1e-6)
    planned = early_stop(confidence, full(confidence), seconds)
    # Across the cliff together: three heads pay where one does not, and then two more.
    assert planned.tolist() == ([1, 1, 3] if seconds is cliff else early)
    assert early_value <= objective(confidence, planned, seconds) <= best_value + 1e-6


def test_early_stop_is_algorithm_1_until_that_stops_and_then_only_better() -> None:
    rng = np.random.default_rng(6)
    further = 0
    for _ in range(200):
        confidence = rng.uniform(0.2, 1, size=(4, 3)).round(1)
        steps = np.cumsum(rng.uniform(0, 2, size=16))

        def seconds(b: int, s: int, steps: Array = steps) -> float:
            return 5.0 + float(steps[b - 1]) + 0.7 * (s - 1)

        paper = algorithm_1(confidence, full(confidence), seconds)
        planned = early_stop(confidence, full(confidence), seconds)
        assert (planned >= paper).all()
        if (planned > paper).any():
            further += 1
            assert objective(confidence, planned, seconds) > objective(confidence, paper, seconds)
    assert 20 < further < 180


def test_rows_that_get_longer_together_share_the_price_of_it() -> None:
    """One more token in any row costs all rows: too much for one of them, not for eight."""
    confidence = np.full((8, 3), 0.8)

    def seconds(num_tokens: int, longest: int) -> float:
        return 10.0 + 4.0 * longest + 0.25 * num_tokens

    assert algorithm_1(confidence, full(confidence), seconds).tolist() == [0] * 8
    assert early_stop(confidence, full(confidence), seconds).tolist() == [2] * 8
    # A single good row does not make the others pay.
    confidence[1:] = 0.1
    assert early_stop(confidence, full(confidence), seconds).tolist() == [0] * 8


def first_tokens(rule: Rule) -> Array:
    """Appendix A: target (0.7, 0.3), draft (0.5, 0.5); the token A leads to confidence 0.9, B to 0.

    How often A and B came first in 20,000 rounds.
    """
    num_rows = 20_000
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2, size=(num_rows, 2))
    target_logits = np.log(np.array([[0.7, 0.3], [0.5, 0.5]], dtype=np.float32))
    draws = rng.random((num_rows, 3)).astype(np.float32)
    by_token = [rule(np.array([[0.8, c]]), np.array([2]), appendix_a)[0] for c in (0.9, 0.0)]
    result = verify(
        target_logits,
        np.tile([0, 1, 1], (num_rows, 1)),
        tokens,
        np.array(by_token)[tokens[:, 0]],
        np.zeros(num_rows, np.int64),
        np.zeros((num_rows, 2, 2), dtype=np.float32),
        np.arange(2),
        np.ones(num_rows),
        np.zeros(num_rows, np.int64),
        np.ones(num_rows),
        draws,
    )
    return np.bincount(np.where(result.num_accepted > 0, tokens[:, 0], result.bonus))


def earlier_budget(*before: list[float]) -> Rule:
    """The asynchronous rule, its budget from the confidence of a round before."""

    def rule(confidence: Array, max_lengths: Array, seconds: Seconds) -> Array:
        budget = global_budget(np.array(before), max_lengths, seconds)
        return fill(confidence, max_lengths, budget)

    return rule


@pytest.mark.parametrize(
    "rule",
    [early_stop, earlier_budget([0.8, 0.9]), earlier_budget([0.8, 0.0])],
    ids=["early-stop", "async-2", "async-0"],
)
def test_appendix_a_is_unbiased(rule: Rule) -> None:
    counts = first_tokens(rule)
    assert stats.chisquare(counts, np.array([0.7, 0.3]) * counts.sum()).pvalue > 1e-3


def test_appendix_a_is_biased_if_the_round_s_own_confidence_sets_the_budget() -> None:
    counts = first_tokens(anticipating)
    assert stats.chisquare(counts, np.array([0.85, 0.15]) * counts.sum()).pvalue > 1e-3
    assert stats.chisquare(counts, np.array([0.7, 0.3]) * counts.sum()).pvalue < 1e-12


# --- nothing but the target's law, by enumeration ----------------------------------------------


class Pair:
    """Two rows of a random target, draft and confidence over two tokens; blocks of two."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.target = rng.dirichlet([1, 1], size=(2, 1 + 2 + 4))  # row, prefix
        self.draft = rng.dirichlet([1, 1], size=(2, 1 + 2))
        # The second confidence depends on the first token, the first one on nothing of the round.
        self.confidence = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], size=(2, 1 + 2))
        self.earlier = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], size=(2, 2))
        steps = np.cumsum(rng.choice([0.05, 0.3, 1.0], size=6))
        wider = rng.choice([0.0, 0.3])
        self.seconds: Seconds = lambda b, s: 1.0 + float(steps[b - 1]) + wider * (s - 1)

    def text_law(self, row: int, block: tuple[int, int], length: int) -> Array:
        """[2, 2, 2] law of a row's next three tokens if so much of this block is verified."""
        law = np.zeros((2, 2, 2))

        def go_on(prefix: tuple[int, ...], mass: float) -> None:
            """The target by itself from here on."""
            if len(prefix) == 3:
                law[prefix] += mass
                return
            for token in (0, 1):
                go_on((*prefix, token), mass * self.target[row, place(prefix)][token])

        def place(prefix: tuple[int, ...]) -> int:
            return int("1" + "".join(map(str, prefix)), 2) - 1

        prefix: tuple[int, ...] = ()
        mass = 1.0
        for token in block[:length]:
            wanted, drawn = self.target[row, place(prefix)], self.draft[row, place(prefix)]
            accept = min(1.0, wanted[token] / drawn[token])
            residual = np.maximum(wanted - drawn, 0.0)
            for other in (0, 1):
                if residual.sum() > 0:
                    share = residual[other] / residual.sum()
                    go_on((*prefix, other), mass * (1.0 - accept) * share)
            prefix, mass = (*prefix, token), mass * accept
        go_on(prefix, mass)
        return law

    def joint_law(self, rule: Rule) -> tuple[Array, int]:
        """[8, 8] law of both rows' next three tokens under a rule, and how many plans it made."""
        law, plans = np.zeros((8, 8)), set()
        for blocks in product(product((0, 1), repeat=2), repeat=2):
            chance = 1.0
            confidence = np.zeros((2, 2))
            for row, (first, second) in enumerate(blocks):
                chance *= self.draft[row, 0][first] * self.draft[row, 1 + first][second]
                confidence[row] = self.confidence[row, [0, 1 + first]]
            lengths = rule(confidence, np.array([2, 2]), self.seconds)
            plans.add(tuple(lengths.tolist()))
            one, other = (
                self.text_law(row, blocks[row], int(lengths[row])).ravel() for row in (0, 1)
            )
            law += chance * np.outer(one, other)
        return law, len(plans)

    def lawful(self) -> Array:
        return np.outer(*(self.text_law(row, (0, 0), 0).ravel() for row in (0, 1)))


RULES: dict[str, Callable[[Pair], Rule]] = {
    "early-stop": lambda pair: early_stop,
    "async": lambda pair: earlier_budget(*pair.earlier.tolist()),
    "threshold": lambda pair: lambda confidence, caps, _: threshold(confidence, caps, 0.5),
    "whole": lambda pair: lambda confidence, caps, _: caps,
    "anticipating": lambda pair: anticipating,
}


@pytest.mark.parametrize("name", RULES)
def test_rows_have_the_target_s_law_each_and_jointly(name: str) -> None:
    """One row's tokens may decide whether another row's token is verified: async lives on it."""
    rng = np.random.default_rng(8)
    pairs = [Pair(rng) for _ in range(150)]
    laws = [pair.joint_law(RULES[name](pair)) for pair in pairs]
    errors = [np.abs(law - pair.lawful()).max() for (law, _), pair in zip(laws, pairs, strict=True)]
    worst = max(errors)
    # The plan follows the tokens that were drawn, or there would be nothing to prove.
    assert (max(num_plans for _, num_plans in laws) > 1) == (name != "whole")
    if name == "anticipating":
        assert worst > 0.01
    else:
        assert worst < 1e-12


def test_one_row_s_token_decides_about_another_row_s_and_does_no_harm() -> None:
    """The cross-row effect is real: two plans that differ in one row, by the other row's token."""
    budget = Budget(num_drafts=2, longest=2)
    caps = np.array([2, 2])
    for second, lengths in ((0.9, [2, 0]), (0.1, [1, 1])):
        confidence = np.array([[0.9, second], [0.5, 0.5]])
        assert fill(confidence, caps, budget).tolist() == lengths


# --- plans -------------------------------------------------------------------------------------


def test_a_global_budget_spent_on_its_own_round_equals_brute_force_on_any_costs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        confidence = rng.uniform(0.1, 1, size=(3, 3)).round(1)
        max_lengths = rng.integers(0, 4, size=3)
        table = np.maximum.accumulate(rng.uniform(1, 6, size=(13, 5)), axis=1)

        def seconds(b: int, s: int, table: Array = table) -> float:
            return float(table[b, s])

        planned = anticipating(confidence, max_lengths, seconds)
        assert (planned <= max_lengths).all()
        assert objective(confidence, planned, seconds) == pytest.approx(
            brute_force(confidence, max_lengths, seconds)
        )


def test_a_budget_is_spent_on_the_most_likely_tokens_of_the_round() -> None:
    for num_drafts, lengths in ((0, [0, 0, 0]), (3, [1, 0, 2]), (5, [2, 0, 3]), (99, [3, 3, 3])):
        budget = Budget(num_drafts, longest=3)
        assert fill(VECTORS, full(VECTORS), budget).tolist() == lengths
    assert fill(VECTORS, full(VECTORS), Budget(4, longest=2)).tolist() == [2, 0, 2]
    assert fill(VECTORS, np.array([3, 0, 1]), Budget(3, longest=3)).tolist() == [2, 0, 1]
    hopeless = np.array([[0.5, np.nan, 1.0], [0.0, 1.0, 1.0]])
    assert fill(hopeless, full(hopeless), Budget(6, longest=3)).tolist() == [1, 0]
    assert global_budget(VECTORS, full(VECTORS), smooth) == Budget(num_drafts=6, longest=3)
    assert global_budget(VECTORS[:0], np.zeros(0, np.int64), smooth) == Budget(0, 0)


def test_what_a_plan_is_expected_to_bring() -> None:
    assert expected_gain(VECTORS, np.array([0, 0, 0])) == 0
    assert expected_gain(VECTORS, np.array([2, 1, 0])) == pytest.approx(0.9 + 0.72 + 0.6)


def test_early_stop_is_optimal_where_costs_are_convex() -> None:
    """Linear or convex costs give one peak: falling gains over rising marginal costs."""
    rng = np.random.default_rng(2)
    lengths_seen = set()
    for _ in range(60):
        confidence = rng.random((3, 3))
        fixed_cost, per_token, curve = rng.uniform([0, 0.1, 0], [20, 2, 0.1])

        def seconds(
            b: int, s: int, a: float = fixed_cost, c: float = per_token, d: float = curve
        ) -> float:
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
    lengths = early_stop(confidence, full(confidence), lambda b, s: float(seconds[b - 1]) + s)
    for row, length in enumerate(lengths):
        for later in range(length + 1, 4):
            confidence[row, later] = random.choice([0.0, 0.5, 1.0, float("nan")])
    again = early_stop(confidence, full(confidence), lambda b, s: float(seconds[b - 1]) + s)
    assert again.tolist() == lengths.tolist()


def test_ties_keep_smaller_positions_first_then_smaller_rows() -> None:
    certain = np.ones((3, 4))

    def up_to(most: int) -> Seconds:
        return lambda b, s: 1.0 if b <= most else 100.0

    assert early_stop(certain, full(certain), up_to(5)).tolist() == [1, 1, 0]
    assert early_stop(certain, full(certain), up_to(8)).tolist() == [2, 2, 1]
    # A row in front does not move a tie between others.
    assert early_stop(certain, np.array([0, 4, 4]), up_to(6)).tolist() == [0, 2, 1]


def test_nothing_is_admitted_without_strict_improvement_or_without_confidence() -> None:
    # One token for one token's price: exactly as good, hence not better.
    assert early_stop(np.ones((1, 3)), np.array([3]), lambda b, s: b).tolist() == [0]
    falling = [4.0, 3.0, 2.0, 1.0, 0.5]
    for hopeless in (0.0, np.nan):
        confidence = np.array([[1.0, hopeless, 1.0]])
        for plan in (early_stop, anticipating):
            assert plan(confidence, np.array([3]), lambda b, s: falling[b]).tolist() == [1]


def test_max_lengths_are_kept_and_no_row_is_no_plan() -> None:
    confidence = np.full((3, 4), 0.99)
    caps = np.array([0, 2, 9])
    for plan in (early_stop, anticipating):
        assert plan(confidence, caps, lambda b, s: 100.0).tolist() == [0, 2, 4]
        # Nobody has measured a step of no tokens: the costs are not asked.
        assert plan(confidence[:0], caps[:0], lambda b, s: 0 / 0).tolist() == []


def test_float32_confidences_give_the_plan_of_their_values() -> None:
    confidence = VECTORS.astype(np.float32)
    assert early_stop(confidence, full(confidence), smooth).tolist() == [2, 1, 3]


# --- other plans ------------------------------------------------------------------------------


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
    return CostTable.measured(fields.pop("rows"), fields.pop("tokens_per_row"), **fields)


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


def test_a_longest_row_is_paid_for_by_all_rows() -> None:
    """Between one long row and a full batch a pass costs by its tokens; at one row it is one."""
    rows, per_row = np.array([1, 2, 4, 8]), np.array([1, 2, 4, 8])
    linear = 1 + 0.25 * rows[:, None] * per_row  # by tokens
    padded = 0.1 * rows[:, None] * per_row  # by cells
    costs = table(
        verify_seconds=linear + padded,
        lone_seconds=1 + 0.25 * (rows[:, None] + per_row - 1) + padded,
    )
    for num_rows, num_tokens, longest in ((1, 5, 5), (3, 3, 1), (3, 7, 5), (6, 13, 8), (8, 64, 8)):
        expected = 1 + 0.25 * num_tokens + 0.1 * num_rows * longest
        assert costs.verify(num_rows, num_tokens, longest) == pytest.approx(expected)
    # Nothing said: as many tokens in each row.
    assert costs.verify(8, 16) == costs.verify(8, 16, 2) < costs.verify(8, 16, 8)
    assert costs.plain(8) == costs.verify(8, 8, 1)


def test_more_context_costs_more_in_every_pass() -> None:
    costs = table(
        context_tokens=100,
        context_seconds=np.array([1, 2, 4, 8])[:, None] * [0.01, 0.03],
        draft_context_seconds=0.001,
        intake_seconds=0.02,
    )
    base = table()
    assert costs.plain(4, 50) == costs.plain(4, 100) == base.plain(4)
    assert costs.plain(4, 150) == pytest.approx(base.plain(4) + 50 * 0.04)
    assert costs.verify(4, 32, 8, 150) == pytest.approx(base.verify(4, 32, 8) + 50 * 0.12)
    middle = 50 * (0.04 + (0.12 - 0.04) * 3 / 7)
    assert costs.verify(4, 10, 4, 150) == pytest.approx(base.verify(4, 10, 4) + middle)
    assert costs.draft(4, context=150) == pytest.approx(base.draft(4) + 4 * 50 * 0.001)
    assert costs.draft(4, num_pending=30) == pytest.approx(base.draft(4) + 0.6)


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


STEPS: dict[str, Any] = {
    "padded": True,
    "rows": [1, 4, 16],
    "tokens_per_row": [1, 2, 4, 6],
    "verify_seconds": [[1.0, 1.1, 1.3, 1.7], [1.2, 1.4, 1.8, 2.6], [1.6, 2.0, 3.0, 5.0]],
    "draft_seconds": [0.4, 0.5, 0.7],
}


def test_a_padded_pass_costs_as_the_shape_that_it_is_padded_to() -> None:
    """At a grid point its own time; below it the same; one row or token more, the next one's."""
    costs = table(**STEPS)
    for rows, seconds, draft in zip(
        ((1,), (2, 3, 4), (5, 15, 16)), STEPS["verify_seconds"], STEPS["draft_seconds"], strict=True
    ):
        for num_rows in rows:
            by_width = [seconds[i] for i in (0, 1, 2, 2, 3, 3)]
            curve = costs.verify_curve(num_rows)
            for width, expected in enumerate(by_width, start=1):
                lone, uniform = num_rows + width - 1, num_rows * width
                assert curve(lone, width) == curve(uniform, width) == pytest.approx(expected)
                assert costs.verify(num_rows, uniform) == pytest.approx(expected)
            assert costs.plain(num_rows) == seconds[0]
            assert costs.draft(num_rows) == draft
    assert costs.draft(4.5) == 0.7


def test_beyond_the_largest_padded_batch_costs_go_on_in_a_line() -> None:
    costs, by_rows = table(**STEPS), np.array(STEPS["verify_seconds"])
    for num_rows in (17, 28):
        expected = by_rows[2] + (num_rows - 16) / 12 * (by_rows[2] - by_rows[1])
        for width, column in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)):
            found = costs.verify(num_rows, num_rows + 1, width)
            assert found == pytest.approx(expected[column])
        assert costs.draft(num_rows) == pytest.approx(0.7 + (num_rows - 16) / 12 * 0.2)
    # A prefill pass has more tokens in a row than any draft.
    assert costs.verify(4, 48) == pytest.approx(2.6 + 24 / 8 * (2.6 - 1.8))


def test_a_padded_pass_reads_its_context_by_the_shape_too() -> None:
    slopes = np.array([1, 4, 16])[:, None] * [0.01, 0.06]
    costs, base = table(**STEPS, context_tokens=100, context_seconds=slopes), table(**STEPS)
    for num_rows, bucket in ((3, 4), (4, 4), (9, 16)):
        for longest, width in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 6)):
            added = 50 * bucket * (0.01 + (width - 1) / 5 * 0.05)
            found = costs.verify(num_rows, num_rows * longest, longest, 150)
            assert found == pytest.approx(base.verify(num_rows, 1, longest) + added)


def test_one_measured_batch_size_scales_with_rows() -> None:
    costs = table(rows=[1], tokens_per_row=[1, 3], verify_seconds=[[1.0, 2.0]], draft_seconds=[0.5])
    assert costs.verify(1, 2) == 1.5
    assert costs.verify(4, 8) == 6.0
    assert costs.draft(4) == 2.0


def test_a_table_survives_json() -> None:
    costs = table(
        lone_seconds=np.full((4, 4), 0.5),
        context_tokens=9,
        context_seconds=np.full((4, 2), 0.1),
        intake_seconds=0.2,
        draft_context_seconds=0.3,
    )
    assert CostTable.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    padded = table(**STEPS)
    kept = json.loads(json.dumps(padded.to_json()))
    assert CostTable.from_json(kept) == padded
    del kept["padded"]  # as in tables of before
    assert not CostTable.from_json(kept).padded


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
        {"lone_seconds": np.ones((4, 3))},
        {"lone_seconds": -np.ones((4, 4))},
        {"context_seconds": np.ones((4, 3))},
        {"context_seconds": np.ones((3, 2))},
        {"context_seconds": -np.ones((4, 2))},
        {"intake_seconds": np.nan},
        {"draft_context_seconds": -1.0},
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        table(**changes)
