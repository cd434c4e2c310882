"""What a round costs on this machine, as measured: the scheduler's denominator."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured seconds of the target's and the draft's pass, by the size of the batch.

    Invariant: both grids ascend from 1, every time is positive. `tokens_per_row` has two points
    or more: a table that is flat in tokens would make "verify everything" optimal by construction.
    """

    rows: tuple[int, ...]
    """Grid of running rows."""
    tokens_per_row: tuple[int, ...]
    """Grid of tokens per row: 1 is plain decoding, γ+1 a fully planned block."""
    verify_seconds: tuple[tuple[float, ...], ...]
    """[rows][tokens_per_row] a target pass with that many rows, each with that many tokens."""
    draft_seconds: tuple[float, ...]
    """[rows] a draft pass with that many rows."""

    def __post_init__(self) -> None:
        """Raise ValueError where the invariant does not hold."""
        for name, grid, smallest in (
            ("rows", self.rows, 1),
            ("tokens_per_row", self.tokens_per_row, 2),
        ):
            ascending = all(a < b for a, b in pairwise(grid))
            if len(grid) < smallest or grid[0] != 1 or not ascending:
                raise ValueError(f"{name} must ascend from 1 over {smallest}+ points: {grid}")
        if len(self.verify_seconds) != len(self.rows) or any(
            len(times) != len(self.tokens_per_row) for times in self.verify_seconds
        ):
            raise ValueError("verify_seconds must have one time per rows x tokens_per_row")
        if len(self.draft_seconds) != len(self.rows):
            raise ValueError("draft_seconds must have one time per entry of rows")
        times = [*self.draft_seconds, *(t for row in self.verify_seconds for t in row)]
        if not all(0.0 < t < float("inf") for t in times):
            raise ValueError("every time must be positive and finite")

    @classmethod
    def measured(
        cls,
        rows: Sequence[int],
        tokens_per_row: Sequence[int],
        *,
        verify_seconds: ArrayLike,
        draft_seconds: ArrayLike,
    ) -> Self:
        """A table from grids and arrays of times, [len(rows), len(tokens_per_row)] and [len(rows)].

        Raises ValueError where shapes or values do not fit.
        """
        return cls(
            rows=tuple(int(r) for r in rows),
            tokens_per_row=tuple(int(t) for t in tokens_per_row),
            verify_seconds=tuple(
                tuple(times) for times in np.asarray(verify_seconds, dtype=np.float64).tolist()
            ),
            draft_seconds=tuple(np.asarray(draft_seconds, dtype=np.float64).tolist()),
        )

    def verify_curve(self, num_rows: int) -> Callable[[int], float]:
        """Seconds of a target pass by its number of tokens, for `num_rows` rows: `step_seconds`.

        Bilinear between the measured points, linear beyond them. More tokens never cost less, nor
        do more rows of as many tokens each: a dip in the measurements is noise, and is levelled
        by a running maximum.
        """
        by_rows = np.maximum.accumulate(np.asarray(self.verify_seconds), axis=0)
        measured = [_interpolate(self.rows, times, num_rows) for times in by_rows.T.tolist()]
        # Last, because extrapolating over rows can make two columns cross.
        profile = list(accumulate(measured, max))
        tokens = [num_rows * per_row for per_row in self.tokens_per_row]
        return lambda num_tokens: _interpolate(tokens, profile, num_tokens)

    def verify(self, num_rows: int, num_tokens: int) -> float:
        """Seconds of a target pass of `num_rows` rows over `num_tokens` >= `num_rows` tokens."""
        return self.verify_curve(num_rows)(num_tokens)

    def draft(self, num_rows: int) -> float:
        """Seconds of a draft pass for `num_rows` rows; it always drafts the whole block."""
        return _interpolate(self.rows, list(accumulate(self.draft_seconds, max)), num_rows)

    def to_json(self) -> dict[str, Any]:
        """The fields as lists, for a manifest."""
        return {
            "rows": list(self.rows),
            "tokens_per_row": list(self.tokens_per_row),
            "verify_seconds": [list(times) for times in self.verify_seconds],
            "draft_seconds": list(self.draft_seconds),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises KeyError or ValueError on anything else."""
        return cls.measured(
            fields["rows"],
            fields["tokens_per_row"],
            verify_seconds=fields["verify_seconds"],
            draft_seconds=fields["draft_seconds"],
        )


def _interpolate(grid: Sequence[int], values: Sequence[float], x: int) -> float:
    """Piecewise linear, the outer segments continued; a single point is taken as proportional.

    Plain floats: the scheduler asks for one value at a time, where NumPy costs microseconds.
    """
    if len(grid) == 1:
        return values[0] * x / grid[0]
    left = min(max(bisect_right(grid, x) - 1, 0), len(grid) - 2)
    share = (x - grid[left]) / (grid[left + 1] - grid[left])
    return values[left] + share * (values[left + 1] - values[left])
