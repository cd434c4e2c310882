"""What drafting saved, in seconds that a run measured itself."""

from __future__ import annotations

import numpy as np


class Saving:
    """Times of rounds with and without drafts, by how many rows ran."""

    def __init__(self) -> None:
        self._plain: dict[int, tuple[int, float]] = {}  # rounds, seconds
        self._drafted: dict[int, tuple[int, float]] = {}  # new tokens, seconds

    def add(self, num_rows: int, num_tokens: int, seconds: float, *, drafted: bool) -> None:
        """Count a round: draft and target pass took `seconds` for `num_tokens` new tokens."""
        sums, number = (self._drafted, num_tokens) if drafted else (self._plain, 1)
        count, total = sums.get(num_rows, (0, 0.0))
        sums[num_rows] = (count + number, total + seconds)

    @property
    def seconds(self) -> float:
        """What the tokens of drafted rounds would have taken plainly, less what they took.

        A plain round takes what those with as many rows took on average, or what lies between those
        with the next numbers of rows. Rounds with more or fewer rows than any plain one are left
        out; 0 where no plain round was measured.
        """
        if not self._plain:
            return 0.0
        sizes = sorted(self._plain)
        means = [self._plain[size][1] / self._plain[size][0] for size in sizes]
        return sum(
            num_tokens / num_rows * float(np.interp(num_rows, sizes, means)) - seconds
            for num_rows, (num_tokens, seconds) in self._drafted.items()
            if sizes[0] <= num_rows <= sizes[-1]
        )
