"""The draft network as a drafter, and the random draws of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, RunningRow
from dspark_batch.decode.algorithm import sampling
from dspark_batch.engine.runtimes import Draws, Ints, Runtime


class NetworkDrafter:
    """A `Drafter`: one pass of the draft's graph for all rows that it is asked for."""

    def __init__(self, runtime: Runtime, draws: SlotDraws) -> None:
        self._runtime = runtime
        self._draws = draws

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """See `drafters.Drafter`."""
        slots, positions, anchors = standing(rows)
        draws = self._draws.draft(slots, positions)
        if width is not None:
            draws = replace(draws, uniforms=draws.uniforms[:, :width])
        return self._runtime.draft(slots, anchors, draws)

    def release(self, slot: int) -> None:
        """Nothing: the engine releases the runtime's slots."""


def standing(rows: Sequence[RunningRow]) -> tuple[list[int], Ints, Ints]:
    """Where rows stand: their slots, the positions of their anchors, and these; each [R]."""
    tokens = [row.tokens for row in rows]
    positions = np.array([len(text) for text in tokens], np.int64) - 1
    return [row.slot for row in rows], positions, np.array([text[-1] for text in tokens], np.int64)


class SlotDraws:
    """The draws of drafts and verifications: functions of a row's seed and position only.

    How a row samples is kept by slot from its admission on, and what was drawn until its anchor
    moves: a draft and the verification behind it take parts of the same draw. Slots whose rows were
    admitted anew are gathered anew.
    """

    def __init__(self, max_rows: int, block_size: int) -> None:
        gamma = max(block_size, 1)
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows, np.float32)
        self._seed = np.zeros(max_rows, np.uint64)
        self._uniforms = np.zeros((max_rows, 2 * gamma + 1), np.float32)
        self._drawn_at = np.full(max_rows, -1)  # the anchor that the uniforms are of
        self._kept_draft, self._kept_verify = _Kept(slice(gamma)), _Kept(slice(gamma, None))

    def admit(self, row: RunningRow) -> None:
        """Note how the row samples."""
        slot, params = row.slot, row.prompt.params
        self._temperature[slot] = params.temperature
        self._top_k[slot], self._top_p[slot] = params.top_k, params.top_p
        self._seed[slot] = np.array(params.seed).astype(np.uint64)  # negative ones wrap
        self._drawn_at[slot] = -1
        self._kept_draft.slots = self._kept_verify.slots = []

    @property
    def any_sampled(self) -> bool:
        """Whether a row may be above temperature 0."""
        return bool(self._temperature.any())

    def samples(self, slots: list[int]) -> NDArray[np.bool_]:
        """[R] whether a row is above temperature 0."""
        return np.asarray(self._temperature[slots] > 0)

    def draft(self, slots: list[int], positions: Ints) -> Draws:
        """Of a draft from anchors at these positions [R]: γ uniforms a row."""
        return self._drawn(self._kept_draft, slots, positions)

    def verify(self, slots: list[int], positions: Ints) -> Draws:
        """Of a verification behind them: γ + 1."""
        return self._drawn(self._kept_verify, slots, positions)

    def _drawn(self, kept: _Kept, slots: list[int], positions: Ints) -> Draws:
        if kept.slots != slots:
            places = np.array(slots)
            parts = (self._temperature[places], self._top_k[places], self._top_p[places])
            kept.slots, kept.places = list(slots), places
            kept.draws = Draws(*parts, self._uniforms[places, kept.columns])
            kept.sampled = np.flatnonzero(parts[0] > 0)
        if not len(kept.sampled):  # greedy rows read no uniforms
            return kept.draws
        places, at = kept.places[kept.sampled], positions[kept.sampled]
        due = self._drawn_at[places] != at
        if due.any():
            places, at = places[due], at[due]
            num = self._uniforms.shape[1]
            self._uniforms[places] = sampling.uniforms(self._seed[places], at, num=num)
            self._drawn_at[places] = at
        return replace(kept.draws, uniforms=self._uniforms[kept.places, kept.columns])


class _Kept:
    """What stays from round to round while the slots are the same."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        self.slots: list[int] = []
        self.places = self.sampled = np.zeros(0, np.int64)
        nothing = np.zeros(0, np.float32)
        self.draws = Draws(nothing, self.places, nothing, np.zeros((0, 0), np.float32))
