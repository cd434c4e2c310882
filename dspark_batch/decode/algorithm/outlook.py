"""What to expect of drafting, from the blocks of past rounds.

Before it drafts, a schedule must say whether drafting pays. So it replays the last blocks at the
present number of rows: what would it have verified of them, at which cost, for how many tokens?

Shapes: γ block size, R rows, J replayed rounds.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

Confidence = NDArray[np.floating[Any]]

_KEPT_BLOCKS = 64
_PRIOR_BLOCKS = 8
_MOST_ROUNDS = 32
_PRIOR_TOKENS = 64.0  # for which the confidence head is believed, before it was tried
_DECAY = 0.99  # what remains of what was predicted and accepted, a round later


class Outlook:
    """The last blocks of a run, and how far their confidence could be trusted."""

    def __init__(self) -> None:
        self._blocks: deque[Confidence] = deque(maxlen=_KEPT_BLOCKS)
        self._predicted = self._accepted = 0.0
        self._num_passing = self._num_drafted = 0.0
        self.num_seen = 0
        """Blocks that were drafted in this run."""

    @property
    def has_blocks(self) -> bool:
        """Whether there are blocks to replay."""
        return bool(self._blocks)

    def expect(self, acceptance: Confidence) -> None:
        """Start with blocks of this conditional acceptance [γ]."""
        self._blocks.extend([acceptance] * _PRIOR_BLOCKS)

    def see(self, confidence: Confidence, *, num_passing: int | None = None) -> None:
        """Keep the blocks [R, γ] of a round, verified or not: calibrated confidence.

        A draft pass was made for `num_passing` of them; None: for all.
        """
        self._blocks.extend(confidence)
        size = len(confidence)
        self.count(size, num_passing=size if num_passing is None else num_passing)

    def count(self, num_drafted: int, *, num_passing: int) -> None:
        """Count blocks that are not kept, for whoever averages them."""
        self.num_seen += num_drafted
        self._num_passing = _DECAY * self._num_passing + num_passing
        self._num_drafted = _DECAY * self._num_drafted + num_drafted

    @property
    def share_passing(self) -> float:
        """Share of blocks that a draft pass was made for; recent ones count most."""
        return self._num_passing / self._num_drafted if self._num_drafted else 1.0

    def learn(self, *, predicted: float, accepted: float) -> None:
        """Take in how many drafts of a plan were expected to be accepted, and how many were."""
        self._predicted = _DECAY * self._predicted + predicted
        self._accepted = _DECAY * self._accepted + accepted

    @property
    def trust(self) -> float:
        """Accepted over predicted drafts: a factor on survival that starts at 1.

        Calibration holds for the texts that it was fitted on; this follows the run's own.
        """
        return (self._accepted + _PRIOR_TOKENS) / (self._predicted + _PRIOR_TOKENS)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[γ] confidence of the kept blocks: what to expect of a row that was never drafted."""
        return np.asarray(np.mean(self._blocks, axis=0))

    def rounds(self, num_rows: int) -> NDArray[np.float64]:
        """The last blocks as rounds of `num_rows` rows: confidence [J, R, γ].

        If there are too few blocks they are used again.
        """
        num_rounds = max(1, min(_MOST_ROUNDS, _KEPT_BLOCKS // num_rows))
        blocks = np.array(self._blocks)[-num_rounds * num_rows :]
        dealt = np.resize(blocks, (num_rounds, num_rows, blocks.shape[1]))
        return np.asarray(dealt)
