"""The draft network as a drafter, and the random draws of a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_batch.decode import DraftBlock, RunningRow
from dspark_batch.decode.algorithm import sampling
from dspark_batch.engine.runtimes import Draws, Runtime


class NetworkDrafter:
    """A `Drafter`: one pass of the draft's graph for all rows that it is asked for."""

    def __init__(self, runtime: Runtime, block_size: int) -> None:
        self._runtime = runtime
        self._block_size = block_size

    def draft(self, rows: Sequence[RunningRow]) -> DraftBlock:
        """See `drafters.Drafter`."""
        anchors = np.array([row.tokens[-1] for row in rows], np.int64)
        draws = draws_for(rows, block_size=self._block_size)[0]
        return self._runtime.draft([row.slot for row in rows], anchors, draws)

    def release(self, slot: int) -> None:
        """Nothing: the engine releases the runtime's slots."""


def draws_for(rows: Sequence[RunningRow], *, block_size: int) -> tuple[Draws, Draws]:
    """The draws of a draft and of a verification: functions of seed and anchor position only."""
    params = [row.prompt.params for row in rows]
    temperature = np.array([p.temperature for p in params], np.float32)
    top_k = np.array([p.top_k for p in params], np.int64)
    top_p = np.array([p.top_p for p in params], np.float32)
    gamma = max(block_size, 1)
    if temperature.any():
        uniforms = sampling.uniforms(
            np.array([p.seed for p in params]),
            np.array([row.anchor_position for row in rows]),
            num=2 * gamma + 1,
        )
    else:
        uniforms = np.zeros((len(params), 2 * gamma + 1), np.float32)
    return (
        Draws(temperature, top_k, top_p, np.ascontiguousarray(uniforms[:, :gamma])),
        Draws(temperature, top_k, top_p, np.ascontiguousarray(uniforms[:, gamma:])),
    )
