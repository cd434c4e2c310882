"""Sequential temperature scaling of the confidence head, one temperature per position.

The labels are those of full verification on held-out rounds: a confidence is only as good as the
target, sampling temperature and domain it was fitted for. Scaling keeps the order within a
position and cannot move a logit of 0.

Shapes: n rounds, γ block size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_batch.algorithm.sampling import Floats, Reals

# 49 log-spaced values in 0.125..8, nearest to 1 first: equal errors change nothing.
_EXPONENTS = np.linspace(-3.0, 3.0, 49)
TEMPERATURE_GRID = 2.0 ** _EXPONENTS[np.argsort(np.abs(_EXPONENTS), kind="stable")]
NUM_BINS = 20


def fit(confidence_logits: Reals, accepted: ArrayLike) -> NDArray[np.float64]:
    """Temperatures [γ] that make survival match what was observed.

    `confidence_logits` [n, γ]; `accepted` [n] draft tokens accepted with the whole block verified.
    Position by position: the temperature with the smallest error of survival against "accepted up
    to here", those before it being fixed. Raises ValueError without rounds.
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
        best = int(np.argmin(errors))
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


def expected_calibration_error(
    predicted: Reals, observed: ArrayLike, *, num_bins: int = NUM_BINS
) -> float:
    """Mean distance of predicted and observed frequency over equal-width bins of [0, 1].

    `predicted` [n] probabilities, `observed` [n] of 0 or 1; bins weigh by their number of items.
    """
    bins = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=predicted - np.asarray(observed, dtype=np.float64))
    return float(np.abs(gaps).sum() / len(predicted))
