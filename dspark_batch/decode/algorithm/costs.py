"""What a round costs on this machine, from measured passes.

The cost of a target pass depends on its rows R, its tokens B, the tokens S of its longest row and
the cached tokens C of a row. Linear layers cost by B. Attention is laid out per row, so every row
pays for S, and reads its whole cache.

A runtime that replays captured graphs pads R and S up to sizes for which it has a graph. There a
pass costs a step function of R and S, whatever the other rows verify.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured seconds of the target's and the draft's pass, by the size of the batch.

    Invariant: both grids ascend from 1, every time is positive, and no further token makes a pass
    cheaper. `tokens_per_row` has at least two points: with one, "verify everything" would always
    win.
    """

    rows: tuple[int, ...]
    """Grid of running rows."""
    tokens_per_row: tuple[int, ...]
    """Grid of tokens per row: 1 is plain decoding, γ+1 a fully planned block."""
    verify_seconds: tuple[tuple[float, ...], ...]
    """[rows][tokens_per_row] a target pass with that many rows, each with that many tokens."""
    lone_seconds: tuple[tuple[float, ...], ...]
    """[rows][tokens_per_row] the same with that many tokens in one row, and one in the others."""
    draft_seconds: tuple[float, ...]
    """[rows] a draft pass with that many rows."""
    narrow_block: int | None = None
    """Tokens of a narrower block that can be drafted too; None: there is none."""
    narrow_seconds: tuple[float, ...] = ()
    """[rows] a draft pass of that block."""
    intake_seconds: float = 0.0
    """What a draft pass adds for each token of context that it takes in."""
    context_tokens: int = 0
    """Cached tokens of each row in the above; fewer are priced the same."""
    context_seconds: tuple[tuple[float, float], ...] = ()
    """[rows] what each further cached token of a row adds to a target pass: with one token per
    row, and with the most; empty where it was not measured."""
    draft_context_seconds: float = 0.0
    """The same for a draft pass."""
    padded: bool = False
    """Whether sizes cost as much as the next grid point above them, as passes are padded to it.
    Then `lone_seconds` say nothing: one long row costs as much as if all were long."""

    def __post_init__(self) -> None:
        """Raise ValueError where the invariant does not hold."""
        for name, grid, smallest in (
            ("rows", self.rows, 1),
            ("tokens_per_row", self.tokens_per_row, 2),
        ):
            ascending = all(a < b for a, b in pairwise(grid))
            if len(grid) < smallest or grid[0] != 1 or not ascending:
                raise ValueError(f"{name} must ascend from 1 over {smallest}+ points: {grid}")
        for name, passes in (("verify", self.verify_seconds), ("lone", self.lone_seconds)):
            if len(passes) != len(self.rows) or any(
                len(times) != len(self.tokens_per_row) for times in passes
            ):
                raise ValueError(f"{name}_seconds must have one time per rows x tokens_per_row")
        if len(self.draft_seconds) != len(self.rows):
            raise ValueError("draft_seconds must have one time per entry of rows")
        if len(self.narrow_seconds) != (len(self.rows) if self.narrow_block else 0):
            raise ValueError("narrow_seconds must have one time per entry of rows")
        if self.context_seconds and [len(times) for times in self.context_seconds] != [2] * len(
            self.rows
        ):
            raise ValueError("context_seconds must have two times per entry of rows")
        times = [t for row in (*self.verify_seconds, *self.lone_seconds) for t in row]
        if not all(
            0.0 < t < float("inf") for t in (*self.draft_seconds, *self.narrow_seconds, *times)
        ):
            raise ValueError("every time must be positive and finite")
        added = [self.intake_seconds, self.draft_context_seconds, *sum(self.context_seconds, ())]
        if not all(0.0 <= t < float("inf") for t in added):
            raise ValueError("what a token adds must not be negative, and finite")

    @classmethod
    def measured(
        cls,
        rows: Sequence[int],
        tokens_per_row: Sequence[int],
        *,
        verify_seconds: ArrayLike,
        draft_seconds: ArrayLike,
        lone_seconds: ArrayLike | None = None,
        narrow_seconds: ArrayLike = (),
        context_seconds: ArrayLike = (),
        **scalars: Any,
    ) -> Self:
        """A table from grids and arrays of times; `scalars` are the fields that are one number.

        Without `lone_seconds` a pass costs by its tokens only, whichever rows they are in.
        Raises ValueError where shapes or values do not fit.
        """
        grid, widths = [int(r) for r in rows], [int(t) for t in tokens_per_row]
        uniform = np.asarray(verify_seconds, dtype=np.float64).tolist()
        if lone_seconds is None:
            lone_seconds = [
                [_interpolate([r * w for w in widths], times, r + w - 1) for w in widths]
                for r, times in zip(grid, uniform, strict=False)
                if len(times) == len(widths)  # else refused below
            ]
        lone = np.asarray(lone_seconds, dtype=np.float64).tolist()
        slopes = np.asarray(context_seconds, dtype=np.float64).tolist()
        return cls(
            rows=tuple(grid),
            tokens_per_row=tuple(widths),
            verify_seconds=tuple(tuple(times) for times in uniform),
            lone_seconds=tuple(tuple(times) for times in lone),
            draft_seconds=tuple(np.asarray(draft_seconds, dtype=np.float64).tolist()),
            narrow_seconds=tuple(np.asarray(narrow_seconds, dtype=np.float64).tolist()),
            context_seconds=tuple(tuple(times) for times in slopes),
            **scalars,
        )

    def verify_curve(self, num_rows: int, context: float = 0.0) -> VerifyCurve:
        """What a target pass of `num_rows` rows with `context` cached tokens each costs.

        Linear between the measured points and beyond them; of padded passes, steps between them.
        More tokens never cost less, nor do more rows of as many tokens each: a dip in the
        measurements is noise, and is levelled by a running maximum.
        """
        widths = range(1, self.tokens_per_row[-1] + 1)
        passes = self.verify_seconds if self.padded else self.lone_seconds
        uniform, lone = (
            [self._between(self.tokens_per_row, times, width) for width in widths]
            for times in (
                self._at_rows(self.verify_seconds, num_rows),
                self._at_rows(passes, num_rows),
            )
        )
        if self.context_seconds:
            first, last = self._at_rows(self.context_seconds, num_rows)
            further = max(context - self.context_tokens, 0.0)
            for i, width in enumerate(widths):
                extra = (self._width_of(width) if self.padded else width) - 1
                added = further * (first + (last - first) * extra / (len(widths) - 1))
                uniform[i] += added
                lone[i] += added
        # As much as the whole batch at the most, however noisy the measurements.
        lone = [min(alone, every) for alone, every in zip(lone, uniform, strict=True)]
        return VerifyCurve(num_rows, uniform, lone, self.tokens_per_row if self.padded else ())

    def _width_of(self, tokens: int) -> int:
        """The least of `tokens_per_row` that holds so many; none is more than the largest."""
        return self.tokens_per_row[bisect_left(self.tokens_per_row, tokens)]

    def _at_rows(self, passes: Sequence[Sequence[float]], num_rows: int) -> list[float]:
        """The columns of a table [rows][...] at `num_rows`, levelled."""
        by_rows = np.maximum.accumulate(np.asarray(passes), axis=0)
        columns = [self._between(self.rows, times, num_rows) for times in by_rows.T.tolist()]
        # Last, because extrapolating over rows can make two columns cross.
        return list(accumulate(columns, max))

    def _between(self, grid: Sequence[int], values: Sequence[float], x: float) -> float:
        """The time at a size between those that were measured, and beyond them."""
        if self.padded and x <= grid[-1]:
            return values[bisect_left(grid, x)]
        return _interpolate(grid, values, x)

    def verify(
        self, num_rows: int, num_tokens: int, longest: int | None = None, context: float = 0.0
    ) -> float:
        """Seconds of a target pass over `num_tokens` >= `num_rows` tokens; see `VerifyCurve`."""
        return self.verify_curve(num_rows, context)(num_tokens, longest)

    def plain(self, num_rows: int, context: float = 0.0) -> float:
        """Seconds of a plain step: a target pass without draft columns."""
        return self.verify_curve(num_rows, context)(num_rows, 1)

    def draft(
        self,
        num_rows: float,
        *,
        context: float = 0.0,
        num_pending: int = 0,
        width: int | None = None,
    ) -> float:
        """Seconds of a draft pass for `num_rows` rows; `width` is `narrow_block`, or None for γ.

        It takes in `num_pending` tokens of context, of all rows together. Less than one row stands
        for a pass that is made only now and then.
        """
        if num_rows < 1:
            once = self.draft(1, context=context, width=width)
            return num_rows * once + num_pending * self.intake_seconds
        times = self.draft_seconds if width is None else self.narrow_seconds
        seconds = self._between(self.rows, list(accumulate(times, max)), num_rows)
        further = max(context - self.context_tokens, 0.0)
        added = num_rows * further * self.draft_context_seconds
        return seconds + added + num_pending * self.intake_seconds

    def to_json(self) -> dict[str, Any]:
        """The fields as lists and numbers, for a file."""
        return {
            "rows": list(self.rows),
            "tokens_per_row": list(self.tokens_per_row),
            "verify_seconds": [list(times) for times in self.verify_seconds],
            "lone_seconds": [list(times) for times in self.lone_seconds],
            "draft_seconds": list(self.draft_seconds),
            "narrow_block": self.narrow_block,
            "narrow_seconds": list(self.narrow_seconds),
            "intake_seconds": self.intake_seconds,
            "context_tokens": self.context_tokens,
            "context_seconds": [list(times) for times in self.context_seconds],
            "draft_context_seconds": self.draft_context_seconds,
            "padded": self.padded,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises KeyError or ValueError on anything else.

        Older tables do not say whether they are padded, which they are not, and have no narrow
        block.
        """
        values = {"padded": False, "narrow_block": None, "narrow_seconds": (), **values}
        return cls.measured(**{field.name: values[field.name] for field in fields(cls)})


class VerifyCurve:
    """Seconds of a target pass by its tokens and those of its longest row: `step_seconds`."""

    __slots__ = ("_base", "_padded", "_slope", "_uniform", "_widths")

    def __init__(
        self, num_rows: int, uniform: list[float], lone: list[float], steps: Sequence[int] = ()
    ) -> None:
        """Seconds [γ+1] by the longest row: if all rows are as long, and if only one is.

        `steps` are the tokens per row that others are padded to; none: passes are not padded.
        """
        self._padded = bool(steps)
        widths = steps or range(1, len(uniform) + 1)
        self._uniform = [uniform[width - 1] for width in widths]
        self._widths = [num_rows * width for width in widths]
        self._base, self._slope = [], []
        for extra, (every, alone) in enumerate(zip(uniform, lone, strict=True)):
            between = num_rows * (extra + 1) - (num_rows + extra)
            slope = (every - alone) / between if between else 0.0
            self._slope.append(slope)
            self._base.append(every - slope * num_rows * (extra + 1))

    def __call__(self, num_tokens: float, longest: int | None = None) -> float:
        """Seconds; without `longest`, of a pass whose rows have about as many tokens each."""
        if longest is not None and longest <= len(self._base):
            return self._base[longest - 1] + self._slope[longest - 1] * num_tokens
        if self._padded and num_tokens <= self._widths[-1]:
            return self._uniform[bisect_left(self._widths, num_tokens)]
        return _interpolate(self._widths, self._uniform, num_tokens)


def _interpolate(grid: Sequence[int], values: Sequence[float], x: float) -> float:
    """Piecewise linear, the outer segments continued; a single point is taken as proportional.

    Plain floats: the scheduler asks for one value at a time, where NumPy costs microseconds.
    """
    if len(grid) == 1:
        return values[0] * x / grid[0]
    left = min(max(bisect_right(grid, x) - 1, 0), len(grid) - 2)
    share = (x - grid[left]) / (grid[left + 1] - grid[left])
    return values[left] + share * (values[left + 1] - values[left])
