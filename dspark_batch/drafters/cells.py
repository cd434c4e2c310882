"""Where the tokens of a draft pass lie: cells by row, positions, and what a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_batch.models.graph import MASKED, GraphBuilder


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Inputs of the draft's graph that say which tokens are whose; see `dspark`."""

    context_tokens: str
    context_index: str
    context_starts: str
    anchor_positions: str


class RoundCells:
    """The cells of a block, which has no padding, and of the tokens that enter the cache.

    Either only the context enters the cache, and the block is attended to beside it; or (`behind`)
    the block enters it too, right behind the context, for one attention over the cache.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        inputs: RowInputs,
        *,
        num_slots: int,
        cache: str,
        num_positions: int,
        behind: bool,
    ) -> None:
        self._b, self._inputs = builder, inputs
        self._num_slots, self._num_positions = num_slots, num_positions
        self._cache = cache
        b = builder
        slots = b.constant(np.arange(num_slots)[None, :])
        self._anchors = b.op("Unsqueeze", inputs.anchor_positions, b.constant([1]))
        self.positions = b.op("Add", self._anchors, slots)
        """Of the block, `[R, slots]`."""
        self.flat = self.numbered(num_slots)
        """0, 1, ... for every slot of every row."""
        self.index = b.op("Reshape", self.flat, b.constant([-1, num_slots]))
        """The same as `[R, slots]`."""
        entering = b.op("Concat", inputs.context_index, self.index, axis=1) if behind else None
        cells = entering or inputs.context_index
        self.new_positions = self._positions_from(cells)
        """Of what enters the cache, `[R, P]` or `[R, P + slots]`."""
        self.new_index = self._behind(cells) if behind else cells
        """Its rows: the N of the context; then, behind it, those of all blocks."""
        self.mask = self._seen() if behind else self._added()
        """Over the cache: truth values `[R, 1, slots, C]`, or `[R, 1, 1, C]` to be added."""

    def numbered(self, per_row: int) -> str:
        """0, 1, ... for `per_row` cells of every row."""
        b = self._b
        num_rows = b.op("Squeeze", b.op("Shape", self._inputs.anchor_positions))
        num_cells = b.op("Mul", num_rows, b.constant(per_row))
        return b.op("Range", b.constant(0), num_cells, b.constant(1))

    def _behind(self, cells: str) -> str:
        """`cells` [R, P + slots] with each row's block where its own context ends."""
        b, num_slots = self._b, self._num_slots
        counts = b.op("Sub", self._inputs.anchor_positions, self._inputs.context_starts)
        counts = b.op("Unsqueeze", counts, b.constant([1]))
        offsets = self._offsets(cells)
        slots = b.op("Sub", offsets, counts)
        # Cells of padding get the last slot again, where no query looks.
        slots = b.op("Max", b.op("Min", slots, b.constant(num_slots - 1)), b.constant(0))
        first = b.op("Slice", self.index, b.constant([0]), b.constant([1]), b.constant([1]))
        num_context = b.op("Shape", self._inputs.context_tokens)
        of_block = b.op("Add", b.op("Add", first, slots), num_context)
        return b.op("Where", b.op("Less", offsets, counts), cells, of_block)

    def _seen(self) -> str:
        b, num_slots = self._b, self._num_slots
        ends = b.op("Add", self._anchors, b.constant(num_slots))
        seen = b.op("Unsqueeze", b.op("Less", self._keys(), ends), b.constant([1, 2]))
        return b.op("Expand", seen, b.constant([1, 1, num_slots, 1]))

    def _added(self) -> str:
        b = self._b
        seen = b.op("Less", self._keys(), self._anchors)
        added = b.op("Where", seen, b.constant(0.0, np.float32), b.constant(MASKED, np.float32))
        return b.op("Unsqueeze", added, b.constant([1, 2]))

    def _keys(self) -> str:
        """Positions of the cache, `[1, C]`."""
        b = self._b
        capacity = b.op("Squeeze", b.op("Shape", self._cache, start=2, end=3))
        keys = b.op("Range", b.constant(0), capacity, b.constant(1))
        return b.op("Unsqueeze", keys, b.constant([0]))

    def _positions_from(self, cells: str) -> str:
        """Positions of `cells` [R, n] that begin where the cache ends."""
        b = self._b
        starts = b.op("Unsqueeze", self._inputs.context_starts, b.constant([1]))
        # A cell of padding may lie beyond the tables.
        last = b.constant(self._num_positions - 1)
        return b.op("Min", b.op("Add", starts, self._offsets(cells)), last)

    def _offsets(self, cells: str) -> str:
        """0, 1, ... for the columns of `cells` [R, n]: `[1, n]`."""
        b = self._b
        size = b.op("Squeeze", b.op("Shape", cells, start=1, end=2))
        offsets = b.op("Range", b.constant(0), size, b.constant(1))
        return b.op("Unsqueeze", offsets, b.constant([0]))
