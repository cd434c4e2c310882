"""What the loop asks of an engine: the border between decoding and everything that runs graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode.algorithm import CostTable
from dspark_batch.decode.types import DraftBlock, RunningRow, VerifyPlan, VerifyResult


class TextDecoder(Protocol):
    """What the loop asks of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Tokens as text."""


class DecodeEngine(Protocol):
    """A target and a drafter for up to `max_rows` rows. Real, fake and replayed engines are one."""

    @property
    def max_rows(self) -> int:
        """Rows at once; their slots are below it."""

    @property
    def intake(self) -> int:
        """Slots that must be free before prompts are read while rows run; 1 is at once."""
        return 1

    @property
    def block_size(self) -> int:
        """γ; 0 without a draft."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a row."""

    @property
    def tokenizer(self) -> TextDecoder | None:
        """None: completions have tokens and no text."""

    @property
    def costs(self) -> CostTable | None:
        """What passes cost; None where nothing was measured."""

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """[γ] conditional acceptance of greedy rows to expect before a run has seen any."""

    @property
    def sampled_acceptance(self) -> NDArray[np.float64]:
        """The same of rows above temperature 0."""

    def admit(self, row: RunningRow, /) -> None:
        """The row begins in its slot; how it samples is settled from here on."""

    def release(self, row: RunningRow, /) -> None:
        """It has ended."""

    def prefill(self, rows: Sequence[RunningRow], /) -> NDArray[np.int64]:
        """Run the prompts: the first token of each [R]; -1 where its logits were not finite."""

    def draft(self, rows: Sequence[RunningRow], width: int | None = None, /) -> DraftBlock:
        """Propose a block for every row: γ tokens, or those of a width that `costs` name."""

    def verify(
        self, rows: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan, /
    ) -> VerifyResult:
        """One target pass over every row's anchor and the planned part of its block."""


class EngineWrapper:
    """Another engine, unless a subclass does something else: for what listens to the loop."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._inner = engine

    @property
    def max_rows(self) -> int:
        """See `DecodeEngine`; so are the others."""
        return self._inner.max_rows

    @property
    def intake(self) -> int:
        """See `DecodeEngine`."""
        return self._inner.intake

    @property
    def block_size(self) -> int:
        """See `DecodeEngine`."""
        return self._inner.block_size

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """See `DecodeEngine`."""
        return self._inner.stop_token_ids

    @property
    def tokenizer(self) -> TextDecoder | None:
        """See `DecodeEngine`."""
        return self._inner.tokenizer

    @property
    def costs(self) -> CostTable | None:
        """See `DecodeEngine`."""
        return self._inner.costs

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """See `DecodeEngine`."""
        return self._inner.acceptance

    @property
    def sampled_acceptance(self) -> NDArray[np.float64]:
        """See `DecodeEngine`."""
        return self._inner.sampled_acceptance

    def admit(self, row: RunningRow) -> None:
        """See `DecodeEngine`."""
        self._inner.admit(row)

    def release(self, row: RunningRow) -> None:
        """See `DecodeEngine`."""
        self._inner.release(row)

    def prefill(self, rows: Sequence[RunningRow]) -> NDArray[np.int64]:
        """See `DecodeEngine`."""
        return self._inner.prefill(rows)

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """See `DecodeEngine`."""
        return self._inner.draft(rows, width)

    def verify(
        self, rows: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        """See `DecodeEngine`."""
        return self._inner.verify(rows, block, plan)
