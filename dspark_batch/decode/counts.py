"""Speculation counted by row while rows run: as arrays, since every round adds to every row."""

from __future__ import annotations

import numpy as np

from dspark_batch.decode.types import DraftBlock, SpecCounts, Tokens, VerifyPlan, VerifyResult


class RunningCounts:
    """What speculation has done for the row in each slot."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self._drafted = np.zeros(num_slots, np.int64)
        self._rounds = np.zeros(num_slots, np.int64)  # that drafted
        self._looked_up = np.zeros(num_slots, np.int64)
        self._verified = np.zeros(num_slots, np.int64)
        self._histogram = np.zeros((num_slots, block_size + 1), np.int64)

    def reset(self, slot: int) -> None:
        """A row begins in the slot."""
        counts = (self._drafted, self._rounds, self._looked_up, self._verified, self._histogram)
        for array in counts:
            array[slot] = 0

    def add(
        self, slots: Tokens, block: DraftBlock | None, plan: VerifyPlan, result: VerifyResult
    ) -> None:
        """A round of the rows in these slots [R]."""
        self._histogram[slots, result.num_accepted] += 1
        if block is None:
            return
        self._verified[slots] += plan.lengths
        self._drafted[slots] += block.lengths
        self._rounds[slots] += block.lengths > 0
        if block.evidence is not None:
            self._looked_up[slots] += block.lengths * block.looked_up

    def of(self, slot: int) -> SpecCounts:
        """Those of the row in the slot."""
        histogram = self._histogram[slot]
        return SpecCounts(
            num_rounds=int(histogram.sum()),
            num_draft_tokens=int(self._drafted[slot]),
            num_verified_tokens=int(self._verified[slot]),
            num_accepted_tokens=int(histogram @ np.arange(len(histogram))),
            accepted_histogram=tuple(histogram.tolist()),
            num_looked_up_tokens=int(self._looked_up[slot]),
            num_drafted_rounds=int(self._rounds[slot]),
        )
