"""Acceptance by drafter, position and confidence, estimated while a job runs.

An export calibrates confidence on its own texts. A job's texts are others: prompt lookup, for one,
may be right in nine of ten tokens of a job and in every second one of another. So each drafted
token falls into a group, and the log-odds of its confidence are shifted by what past rounds of this
job showed of the group. The groups of a network are intervals of confidence, those of lookups
levels of evidence, each by position. A group that was hardly seen is shifted as its whole drafter
at this position is; before anything was seen nothing is shifted. The past fades.

Only verified tokens are seen, and a token only if all before it were accepted. That does not bias
what is estimated: the probability of a token at its position and confidence, given that those
before it were accepted. The estimate of a token needs its own confidence and past rounds, so it may
be used by every rule that does not anticipate.

Shapes: R rows, γ block size, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_BINS = 5  # of a network's confidence
_LEVELS = 8  # of a lookup's evidence; higher ones count as this
_OF_DRAFTER = 8.0  # tokens for which the given confidence is believed of a whole drafter
_OF_GROUP = 16.0  # and for which its drafter's shift is believed of a group
_MEMORY = 512.0  # rows by whose blocks what was seen fades to a third


class Estimator:
    """Corrects confidence by what became of earlier blocks."""

    def __init__(self, block_size: int) -> None:
        shape = (_BINS + _LEVELS, block_size)
        # Sums over the verified tokens of a group at a position: their number, the confidence that
        # was given for them, and how many were accepted.
        self._seen, self._given, self._accepted = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._positions = np.arange(block_size)
        self._shift = np.zeros(shape)

    def corrected(self, confidence: Floats, evidence: Ints | None) -> NDArray[np.float64]:
        """`confidence` [R, γ] as this job has shown it; `evidence` [R] as in `DraftBlock`.

        What is 0 or not a number stays so: it is never admitted.
        """
        groups = self._groups(confidence, evidence)
        found = _probability(_log_odds(confidence) + self._shift[groups, self._positions])
        return np.where(confidence > 0, found, confidence)

    def learn(
        self, confidence: Floats, evidence: Ints | None, lengths: Ints, num_accepted: Ints
    ) -> None:
        """Take in a round: confidence [R, γ] as it was given, verified and accepted tokens [R]."""
        confidence = np.nan_to_num(confidence)
        groups = self._groups(confidence, evidence)
        passed = self._positions < num_accepted[:, None]
        judged = self._positions < np.minimum(num_accepted + 1, lengths)[:, None]
        rows, columns = np.nonzero(judged)
        if not len(rows):
            return
        fading = np.exp(-np.count_nonzero(lengths) / _MEMORY)
        cells = (groups[rows, columns], columns)
        for sums, values in (
            (self._seen, np.ones(len(rows))),
            (self._given, confidence[rows, columns]),
            (self._accepted, passed[rows, columns]),
        ):
            sums *= fading
            np.add.at(sums, cells, values)
        for drafter in (slice(0, _BINS), slice(_BINS, None)):
            self._shift[drafter] = self._shifts(drafter)

    def _groups(self, confidence: Floats, evidence: Ints | None) -> Ints:
        """[R, γ]"""
        bins = np.clip(np.nan_to_num(confidence) * _BINS, 0, _BINS - 1).astype(np.int64)
        if evidence is None:
            return bins
        levels = _BINS + np.minimum(evidence, _LEVELS) - 1
        return np.where(evidence[:, None] > 0, levels[:, None], bins)

    def _shifts(self, drafter: slice) -> NDArray[np.float64]:
        """Of the groups of a drafter, by position."""
        seen, given, accepted = (
            sums[drafter] for sums in (self._seen, self._given, self._accepted)
        )
        of_all = [sums.sum(axis=0) for sums in (seen, given, accepted)]
        whole = _shift(of_all[0], of_all[1], of_all[2], _OF_DRAFTER)
        expected = _probability(_log_odds(given / np.maximum(seen, 1e-9)) + whole)
        return whole + _shift(seen, seen * expected, accepted, _OF_GROUP)


def _shift(seen: Floats, given: Floats, accepted: Floats, prior: float) -> NDArray[np.float64]:
    """From the log-odds of the mean confidence to those of the acceptance; 0 if nothing was seen.

    `prior` tokens of the mean confidence count with those that were seen.
    """
    mean = np.where(seen > 0, given / np.maximum(seen, 1e-9), 0.5)
    found = (accepted + prior * mean) / (seen + prior)
    return np.asarray(_log_odds(found) - _log_odds(mean))


def _log_odds(probability: Floats) -> NDArray[np.float64]:
    inside = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(inside / (1 - inside)))


def _probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-log_odds)))
