"""A drafter proposes a block of tokens for every running row. Several make one: `FirstOf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from dspark_batch.decode import DraftBlock, RunningRow


class Drafter(Protocol):
    """What the engine asks for proposals. Confidence comes as logits that are not calibrated."""

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """A block per row; length 0 where there is nothing to propose.

        `width` is how many tokens a network is to draft, None for γ. What costs nothing proposes γ.
        """

    def release(self, slot: int) -> None:
        """The row in this slot has ended: forget it."""


class FirstOf:
    """Drafters in order: each is asked for the rows in which those ahead of it found nothing.

    The ones ahead are lookups, which cost next to nothing. The last one, mostly the network, is
    what every row falls back on. The cost table's draft passes are its passes, and the calibrated
    temperatures are for its confidence.
    """

    def __init__(self, *drafters: Drafter) -> None:
        assert drafters
        self._drafters = drafters

    @property
    def last(self) -> Drafter:
        """The one that the others come ahead of."""
        return self._drafters[-1]

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """See `Drafter`. `evidence` is None if there is only one, and 0 for rows of the last."""
        first, *others = self._drafters
        found = first.draft(rows, width)
        if not others:
            return found if found.evidence is None else replace(found, evidence=None)
        for drafter in others:
            waiting = np.flatnonzero(found.lengths == 0)
            if not len(waiting):
                break
            block = drafter.draft([rows[r] for r in waiting.tolist()], width)
            if drafter is self.last:
                block = replace(block, evidence=None)
            found = found.updated(waiting, block)
        return found

    def release(self, slot: int) -> None:
        """See `Drafter`."""
        for drafter in self._drafters:
            drafter.release(slot)
