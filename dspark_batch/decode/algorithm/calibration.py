"""Sequential temperature scaling of the confidence head, one temperature per position.

It is fitted on rounds whose whole block was verified. A confidence is only as good as the target,
the sampling temperature and the texts that it was fitted for. Scaling keeps the order within a
position, and cannot move a logit of 0.

Shapes: n rounds, γ block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_batch.decode.algorithm.sampling import Floats, Reals

# 49 log-spaced values in 0.125..8, nearest to 1 first: without a reason nothing is scaled.
_EXPONENTS = np.linspace(-3.0, 3.0, 49)
TEMPERATURE_GRID = 2.0 ** _EXPONENTS[np.argsort(np.abs(_EXPONENTS), kind="stable")]
_TOLERANCE = 0.002  # of calibration error, that a temperature further from 1 must gain
NUM_BINS = 20


def fit(confidence_logits: Reals, accepted: ArrayLike) -> NDArray[np.float64]:
    """Temperatures [γ] that make survival match what was observed.

    `confidence_logits` [n, γ]; `accepted` [n] draft tokens accepted with the whole block verified.
    Position by position, with those before it fixed, it takes the temperature with the smallest
    error of survival against "accepted up to here". Of those that are as good within `_TOLERANCE`
    it takes the one nearest to 1: late positions are seldom reached, so the smallest error there is
    often chance. Raises ValueError without rounds.
    """
    num_rounds, block_size = confidence_logits.shape
    if num_rounds == 0:
        raise ValueError("calibration needs at least one round")
    survived = np.arange(block_size) < np.asarray(accepted)[:, None]
    temperatures = np.empty(block_size)
    survival = np.ones(num_rounds)
    for position in range(block_size):
        candidates = survival * apply(
            confidence_logits[:, position], TEMPERATURE_GRID[:, None]
        ).astype(np.float64)
        errors = [expected_calibration_error(c, survived[:, position]) for c in candidates]
        best = int(np.argmax(np.array(errors) <= min(errors) + _TOLERANCE))
        temperatures[position] = TEMPERATURE_GRID[best]
        survival = candidates[best]
    return temperatures


def apply(logits: Reals, temperatures: ArrayLike) -> Floats:
    """Confidence: sigmoid of `logits` [..., γ] / `temperatures` [γ], broadcast."""
    scaled = logits.astype(np.float64) / np.asarray(temperatures, dtype=np.float64)
    # exp of a negative number only: no overflow on either side.
    decayed = np.exp(-np.abs(scaled))
    sigmoid = np.where(scaled >= 0, 1.0, decayed) / (1.0 + decayed)
    return sigmoid.astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """Rounds that verified their whole block."""

    logits: Floats
    """[n, γ] of the confidence head."""
    accepted: NDArray[np.int64]
    """[n] draft tokens."""
    rows: NDArray[np.int64]
    """[n] the row that each round is of."""
    evidence: NDArray[np.int64]
    """[n] of a lookup's proposal, as in `DraftBlock`; 0 for the last drafter's."""

    def where(self, chosen: NDArray[np.bool_]) -> Rounds:
        """Those rounds [n]."""
        parts = (self.accepted[chosen], self.rows[chosen], self.evidence[chosen])
        return Rounds(self.logits[chosen], *parts)

    def survival(self, temperatures: ArrayLike) -> NDArray[np.float64]:
        """Predicted probability [n, γ] that a block is accepted up to each position."""
        return np.cumprod(apply(self.logits, temperatures), axis=1, dtype=np.float64)

    @property
    def survived(self) -> NDArray[np.bool_]:
        """Whether it was [n, γ]."""
        return np.asarray(np.arange(self.logits.shape[1]) < self.accepted[:, None])

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """[γ] conditional acceptance by position.

        One virtual success and one failure keep a position that was never reached from being
        certain.
        """
        passed = self.survived.sum(axis=0)
        reached = np.concatenate([[len(self.accepted)], passed[:-1]])
        return np.asarray((passed + 1.0) / (reached + 2.0))

    def errors(self, temperatures: ArrayLike) -> NDArray[np.float64]:
        """[γ] expected calibration error of survival."""
        survival, survived = self.survival(temperatures), self.survived
        return np.array(
            [
                expected_calibration_error(predicted, observed)
                for predicted, observed in zip(survival.T, survived.T, strict=True)
            ]
        )


def concatenate(rounds: Sequence[Rounds], block_size: int) -> Rounds:
    """All of them as one."""
    none = Rounds(np.zeros((0, block_size), np.float32), *(np.zeros(0, np.int64),) * 3)
    parts = [none, *rounds]
    return Rounds(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.accepted for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.evidence for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What rounds come to, each [γ] by position."""

    num_rounds: int
    temperatures: tuple[float, ...]
    acceptance: tuple[float, ...]
    error_before: tuple[float, ...]
    """Expected calibration error of survival without scaling, and after it."""
    error_after: tuple[float, ...]


def calibrated(rounds: Rounds, *, scaled: NDArray[np.bool_] | None = None) -> Calibrated:
    """Temperatures fitted on every other row, errors of the others, acceptance of all.

    Nothing is scaled with fewer than two rows, since the rounds of one row are too much alike.
    `scaled` [n] are the rounds that temperatures are for; other logits count as they are.
    """
    block_size = rounds.logits.shape[1]
    scaled = np.ones(len(rounds.accepted), bool) if scaled is None else scaled
    even = np.unique(rounds.rows, return_inverse=True)[1] % 2 == 0
    fitted, held_out = rounds.where(even & scaled), rounds.where(~even)
    temperatures = np.ones(block_size)
    before = after = np.zeros(block_size)
    if len(held_out.accepted):
        if len(fitted.accepted):
            temperatures = fit(fitted.logits, fitted.accepted)
        by_round = np.where(scaled[~even, None], temperatures, 1.0)
        before, after = held_out.errors(np.ones(block_size)), held_out.errors(by_round)
    found = (temperatures, rounds.acceptance, before, after)
    return Calibrated(len(rounds.accepted), *(tuple(map(float, values)) for values in found))


def expected_calibration_error(
    predicted: Reals, observed: ArrayLike, *, num_bins: int = NUM_BINS
) -> float:
    """Mean distance of predicted and observed frequency over equal-width bins of [0, 1].

    `predicted` [n] probabilities, `observed` [n] of 0 or 1; bins weigh by their number of items.
    """
    count, mean, frequency = reliability(predicted, observed, num_bins=num_bins)
    return float((count * np.abs(mean - frequency)).sum() / len(predicted))


def reliability(
    predicted: Reals, observed: ArrayLike, *, num_bins: int = NUM_BINS
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Items, mean prediction and observed frequency of each bin; 0 where it is empty."""
    bins = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    share = 1.0 / np.maximum(count, 1)
    mean = np.bincount(bins, weights=predicted, minlength=num_bins) * share
    frequency = np.bincount(bins, weights=np.asarray(observed), minlength=num_bins) * share
    return count, mean, frequency


def discrimination(predicted: Reals, observed: ArrayLike) -> float:
    """AUROC: probability that an accepted item was predicted higher than a rejected one.

    Equal predictions count half; NaN where all items are of one kind.
    """
    positive = np.asarray(observed, dtype=bool)
    _, inverse, count = np.unique(predicted, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]  # the mean rank of equal values
    num_positive = int(positive.sum())
    num_pairs = num_positive * (len(positive) - num_positive)
    if not num_pairs:
        return float("nan")
    return float((rank[positive].sum() - num_positive * (num_positive + 1) / 2) / num_pairs)


def brier_score(predicted: Reals, observed: ArrayLike) -> float:
    """Mean squared distance of prediction and outcome."""
    return float(np.mean((predicted - np.asarray(observed, dtype=np.float64)) ** 2))
