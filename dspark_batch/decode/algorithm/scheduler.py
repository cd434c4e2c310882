"""How many draft tokens of each row to verify: Algorithm 1, its asynchronous variant, a threshold.

A plan must not anticipate: whether draft token k is verified may depend only on what was known
before k was drawn. Confidence k+1 depends on token k, so a rule that looks at it to decide about
k leaks the token's value into the output distribution.

Every rule here can be read as one that goes step by step. At each step the *heads* are known: for
each row the confidence of its first token that is not admitted, which depends on admitted tokens
only. The rule picks heads to admit, or stops, by what it has seen and by past rounds. Admitting a
token never changes the distribution of its row's text, whatever was seen before it was drawn, and
says nothing about other rows; so neither does any sequence of such steps, for one row or for all
of them together (docs/scheduling.md has the proof, tests/test_scheduler.py enumerates it).

Shapes: R rows, γ block size. B is the verify batch, Σ(1 + ℓ), and S = 1 + max ℓ; the objective is
Θ = τ / `step_seconds(B, S)`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode.algorithm.sampling import Reals

Lengths = NDArray[np.int64]
StepSeconds = Callable[[int, int], float]
"""(B, S) -> seconds of the round, the draft's included or not: a constant leaks nothing."""

_Head = tuple[float, int, int]
"""Survival with a minus sign, position, row: sorts as the heads are admitted."""


def early_stop(confidence: Reals, max_lengths: Lengths, step_seconds: StepSeconds) -> Lengths:
    """Lengths [R] by Algorithm 1: admit draft tokens by survival until Θ stops rising.

    `confidence` [R, γ] is calibrated; `max_lengths` [R] caps a row (tokens left, context left). A
    draft token is admitted only if Θ strictly improves; a confidence of 0 or NaN never is. Equal
    survivals keep the smaller position first, then the smaller row.

    Where one more token does not pay, several at once may: a pass costs by its longest row, so
    the first to get one token more pays for all rows, and the others come cheap. Algorithm 1
    would stop there. This goes on as long as some of the heads, most likely first, pay together;
    tokens behind them are not looked at. Where costs have no such steps it is Algorithm 1.
    """
    survival = _survival(confidence, max_lengths)
    lengths = np.zeros(len(survival), dtype=np.int64)
    if not len(lengths):
        return lengths
    heads = sorted((-row[0], 0, r) for r, row in enumerate(survival) if row)
    num_tokens, longest, expected = len(lengths), 1, float(len(lengths))
    best = expected / step_seconds(num_tokens, longest)

    def paying(candidates: Iterable[_Head]) -> tuple[list[_Head], int, float, float]:
        """The shortest run of candidates that raises Θ, and S, τ and Θ with it; or none."""
        run: list[_Head] = []
        reach, total = longest, expected
        for head in candidates:
            run.append(head)
            reach, total = max(reach, head[1] + 2), total - head[0]
            objective = total / step_seconds(num_tokens + len(run), reach)
            if objective > best:
                return run, reach, total, objective
        return [], longest, expected, best

    while heads:
        choices = (heads[:1], [h for h in heads if h[1] + 2 <= longest], heads)
        found = next((found for found in map(paying, choices) if found[0]), None)
        if found is None:
            break
        run, longest, expected, best = found
        num_tokens += len(run)
        for head in run:
            heads.remove(head)
            _, position, r = head
            lengths[r] += 1
            if position + 1 < len(survival[r]):
                insort(heads, (-survival[r][position + 1], position + 1, r))
    return lengths


@dataclass(frozen=True, slots=True)
class Budget:
    """What a round may verify, decided before it drafts."""

    num_drafts: int
    """Draft tokens of all rows together: the paper's K."""
    longest: int
    """Draft tokens of one row at the most."""


def global_budget(confidence: Reals, max_lengths: Lengths, step_seconds: StepSeconds) -> Budget:
    """The budget of the largest Θ over all plans; the smallest among equals.

    Anticipating, if `confidence` [R, γ] is that of the round it is for: use an earlier round's.
    """
    num_rows = len(max_lengths)
    if not num_rows:
        return Budget(0, 0)
    best, found = num_rows / step_seconds(num_rows, 1), Budget(0, 0)
    for longest in range(1, int(max_lengths.max()) + 1):
        survival = _survival(confidence, np.minimum(max_lengths, longest))
        expected = float(num_rows)
        for admitted, gain in enumerate(sorted((a for row in survival for a in row), reverse=True)):
            expected += gain
            objective = expected / step_seconds(num_rows + admitted + 1, longest + 1)
            if objective > best:
                best, found = objective, Budget(admitted + 1, longest)
    return found


def fill(confidence: Reals, max_lengths: Lengths, budget: Budget) -> Lengths:
    """Lengths [R] that spend a budget on the most likely draft tokens of this round.

    The order is `early_stop`'s, and so is the argument: which token comes next depends on heads
    only, and when to stop was settled before.
    """
    survival = _survival(confidence, np.minimum(max_lengths, budget.longest))
    ranked = sorted((-a, j, r) for r, row in enumerate(survival) for j, a in enumerate(row))
    rows = np.array([r for *_, r in ranked[: budget.num_drafts]], dtype=np.int64)
    return np.asarray(np.bincount(rows, minlength=len(max_lengths)), dtype=np.int64)


def threshold(confidence: Reals, max_lengths: Lengths, value: float) -> Lengths:
    """Stop a row at the first draft token whose own confidence is below `value`. [R].

    DeepSpec's static rule; per token, not the cumulative product. 0 verifies everything.
    """
    passed = np.cumprod(confidence >= value, axis=1).sum(axis=1)
    return np.asarray(np.minimum(passed, max_lengths), dtype=np.int64)


def expected_gain(confidence: Reals, lengths: Lengths) -> float:
    """Draft tokens that a plan is expected to bring, all rows together."""
    return sum(sum(row) for row in _survival(confidence, lengths))


def _survival(confidence: Reals, max_lengths: Lengths) -> list[list[float]]:
    """Survivals of each row's admissible draft tokens: up to its cap, and as long as above 0.

    As Python floats: plans go token by token, where NumPy costs microseconds.
    """
    survival = np.cumprod(np.clip(confidence, 0.0, 1.0), axis=1, dtype=np.float64)
    inside = np.arange(survival.shape[1]) < np.asarray(max_lengths)[:, None]
    admissible = np.logical_and.accumulate((survival > 0) & inside, axis=1).sum(axis=1)
    return [row[:num] for row, num in zip(survival.tolist(), admissible.tolist(), strict=True)]
