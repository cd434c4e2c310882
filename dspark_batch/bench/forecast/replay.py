"""Recorded rounds played back through the real decode loop, by a clock that reads a cost table.

`decode` and its schedule run as they are; only the engine is replaced, by one that looks up what a
recorded block would have brought, and adds up what each pass would have cost. So a simulated row
takes the rounds that the real one takes, plan by plan. Time is the table's: nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.bench.forecast.rounds import Rounds
from dspark_batch.decode import (
    DecodeStats,
    DraftBlock,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
    decode,
)
from dspark_batch.decode.algorithm import CostTable

PassSeconds = Callable[[int, int], float]
"""Seconds of a target pass by its rows and tokens."""

_GENERATIONS = 4  # of rows that pass through every slot, on average
_ORDINARY, _STOP = 0, 1  # the only tokens of a replayed text


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to decode, in `decode`'s words; blocks are cut to their first `block_size` tokens."""

    name: str
    spec: str
    block_size: int
    scheduler: str | None = None


def strategies(block_size: int) -> tuple[Strategy, ...]:
    """Plain decoding first; fixed lengths; Algorithm 1 on every block; the product's default."""
    fixed = [block_size, *(n for n in (4, 2) if n < block_size)]
    return (
        Strategy("plain", "off", block_size),
        *(Strategy(f"fixed {n}", "on", n) for n in fixed),
        Strategy("early-stop", "on", block_size, "early-stop"),
        Strategy("auto", "auto", block_size),
    )


@dataclass(slots=True)
class Passes:
    """Sums over rounds; a row's part in a round is a row-round."""

    num_row_rounds: int = 0
    num_drafted: int = 0
    """RunningRow-rounds with a draft pass."""
    num_verified: int = 0
    num_committed: int = 0
    """Tokens, the bonus counted, and nothing after the end of a text."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass(slots=True)
class Prefills:
    """Sums over admissions."""

    num_rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Simulated:
    """One strategy with `num_rows` rows running all the time, finished rows being replaced."""

    strategy: str
    num_rows: int
    tokens_per_second: float
    """New tokens of all rows, prefill counted."""
    accepted_length: float
    """τ: tokens committed per round of a row."""
    num_verified: float
    """Draft tokens verified per round of a row."""
    drafted: float
    """Share of the rounds that drafted."""
    draft_share: float
    """Of the time."""
    prefill_share: float
    """Of the time."""

    @property
    def row_tokens_per_second(self) -> float:
        """What one row sees."""
        return self.tokens_per_second / self.num_rows


def simulate(
    rounds: Rounds,
    costs: CostTable,
    strategy: Strategy,
    *,
    num_rows: int,
    prefill: PassSeconds | None = None,
) -> Simulated:
    """The steady state: only rounds in which all `num_rows` rows run are counted.

    Every recorded row is decoded equally often, in an order that is random but always the same.
    `prefill` is as for `ReplayEngine`.
    """
    size = len(rounds.num_new_tokens)
    num_passes = -(-_GENERATIONS * num_rows // size)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(size) for _ in range(num_passes)])
    engine = ReplayEngine(
        rounds,
        costs,
        order=order,
        max_rows=num_rows,
        block_size=strategy.block_size,
        prefill=prefill,
    )
    for _ in decode(
        engine.prompts(),
        engine,
        spec=strategy.spec,
        scheduler=strategy.scheduler,
        stats=DecodeStats(),
    ):
        pass
    steady, refills = engine.steady, engine.refills
    draft, verify = (
        seconds / steady.num_committed for seconds in (steady.draft_seconds, steady.verify_seconds)
    )
    new_tokens = float(rounds.num_new_tokens.mean())
    decoded = new_tokens - 1.0  # the first one is the prefill's
    filling = refills.seconds / refills.num_rows
    seconds = decoded * (draft + verify) + filling
    return Simulated(
        strategy=strategy.name,
        num_rows=num_rows,
        tokens_per_second=new_tokens / seconds,
        accepted_length=steady.num_committed / steady.num_row_rounds,
        num_verified=steady.num_verified / steady.num_row_rounds,
        drafted=steady.num_drafted / steady.num_row_rounds,
        draft_share=decoded * draft / seconds,
        prefill_share=filling / seconds,
    )


class ReplayEngine:
    """What `decode` needs of an `Engine`, from a record.

    `order` says which recorded row each prompt stands for; by default each once. A pass costs what
    the table says, a prefill what `prefill` says of its rows and tokens. Without it a prefill is a
    pass over that many tokens: beyond the table's grid its last slope goes on.
    """

    tokenizer = None
    stop_token_ids = frozenset({_STOP})
    intake = 1

    def __init__(
        self,
        rounds: Rounds,
        costs: CostTable,
        *,
        max_rows: int,
        order: NDArray[np.int64] | None = None,
        block_size: int | None = None,
        prefill: PassSeconds | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.block_size = block_size or rounds.block_size
        self.costs = costs
        self.acceptance = np.array(rounds.acceptance[: self.block_size], np.float64)
        self.sampled_acceptance = self.acceptance  # of no use: recorded rows are greedy
        self.steady = Passes()
        """Of the rounds in which every slot is taken."""
        self.refills = Prefills()
        """Of all admissions but the first."""
        self._draft_seconds, self._num_drafting = 0.0, 0  # of this round
        self._num_prefills = 0
        self._prefill_seconds = prefill or costs.verify
        self._order = np.arange(len(rounds.num_new_tokens)) if order is None else order
        self._num_prompt_tokens = rounds.num_prompt_tokens[self._order]
        self._max_new_tokens = rounds.max_new_tokens[self._order]
        self._first_anchors = rounds.first_anchors[self._order]
        self._confidence = rounds.confidence[:, : self.block_size]
        self._num_drafted = np.minimum(rounds.num_drafted, self.block_size)
        self._num_accepted = np.minimum(rounds.num_accepted, self.block_size)
        self._matches = rounds.matches
        self._num_ahead, self._ahead = _texts(rounds, self.block_size + 1)

    def prompts(self) -> Iterator[Prompt]:
        """As long as the recorded ones; the engine knows the rest of them."""
        sizes = zip(self._num_prompt_tokens.tolist(), self._max_new_tokens.tolist(), strict=True)
        for row, (size, allowed) in enumerate(sizes):
            yield Prompt(row, (_ORDINARY,) * size, SamplingParams(max_new_tokens=allowed))

    def admit(self, sequence: RunningRow) -> None:
        """Nothing: slots cost nothing."""

    def release(self, sequence: RunningRow) -> None:
        """As `admit`."""

    def prefill(self, sequences: Sequence[RunningRow]) -> NDArray[np.int64]:
        """First tokens [R]: none ends its row."""
        if self._num_prefills:
            num_tokens = sum(s.num_prompt_tokens for s in sequences)
            self.refills.num_rows += len(sequences)
            self.refills.seconds += self._prefill_seconds(len(sequences), num_tokens)
        self._num_prefills += 1
        return np.full(len(sequences), _ORDINARY)

    def draft(self, sequences: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """The recorded blocks, in tokens that say no more than whether they end the row."""
        anchors = self._anchors(sequences)
        self._num_drafting = len(sequences)
        matches = self._matches[anchors]
        passing = [s for s, match in zip(sequences, matches, strict=True) if not match]
        self._draft_seconds = self.costs.draft(
            len(passing),
            context=_context(passing) if passing else 0.0,
            num_pending=sum(s.num_pending for s in passing),
            width=width,
        )
        most = np.where(matches, self.block_size, width or self.block_size)
        return DraftBlock(
            self._ahead[anchors, :-1],
            self._confidence[anchors],
            np.minimum(self._num_drafted[anchors], most),
            matches,
        )

    def verify(
        self, sequences: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        """The recorded outcome, as far as the plan lets it be seen."""
        anchors = self._anchors(sequences)
        accepted = np.minimum(self._num_accepted[anchors], plan.lengths)
        if len(sequences) == self.max_rows:
            steady = self.steady
            steady.num_row_rounds += len(sequences)
            steady.num_drafted += self._num_drafting
            steady.num_verified += int(plan.lengths.sum())
            steady.num_committed += int(np.minimum(accepted + 1, self._num_ahead[anchors]).sum())
            steady.draft_seconds += self._draft_seconds
            steady.verify_seconds += self.costs.verify(
                len(sequences), plan.num_tokens, plan.longest, _context(sequences)
            )
        self._draft_seconds, self._num_drafting = 0.0, 0
        return VerifyResult(accepted, self._ahead[anchors, accepted])

    def _anchors(self, sequences: Sequence[RunningRow]) -> NDArray[np.int64]:
        """[R] where in the record the rows are."""
        rows = [s.prompt.row for s in sequences]
        positions = [s.num_new_tokens - 1 for s in sequences]
        return np.asarray(self._first_anchors[rows] + np.array(positions))


def _context(sequences: Sequence[RunningRow]) -> float:
    """Cached tokens of a row, on average."""
    return sum(s.anchor_position for s in sequences) / len(sequences)


def _texts(rounds: Rounds, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that follow each anchor: their number [A], and the next `width` of them [A, width]."""
    num_anchors = rounds.num_new_tokens - 1
    position = np.arange(num_anchors.sum()) - np.repeat(rounds.first_anchors, num_anchors)
    num_ahead = np.repeat(num_anchors, num_anchors) - position
    last = np.arange(1, width + 1) == num_ahead[:, None]
    ends = last & np.repeat(rounds.stopped, num_anchors)[:, None]
    return num_ahead, np.where(ends, _STOP, _ORDINARY)
