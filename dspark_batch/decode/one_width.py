"""The schedule of padded passes: one number of tokens for all rows of a round.

Where a pass is padded to a captured shape, its cost is a step function of the rows and of the
longest row. Verifying less of one row saves nothing while another is long. So a round chooses one
width S of the grid, and every row verifies up to S - 1 drafts.

S is chosen before the round drafts, from the confidence of earlier rounds only. So it cannot depend
on a token that it decides about, and nothing waits for the draft's confidence.

Shapes: R running rows, γ block size, W widths of the cost table.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from operator import is_

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode.account import (
    CREDIT,
    EVIDENCE,
    GRAIN,
    HURDLE,
    LOOKING,
    MOST_SAVED,
    SHARE,
)
from dspark_batch.decode.algorithm import CostTable, Outlook
from dspark_batch.decode.engine import DecodeEngine
from dspark_batch.decode.types import DraftBlock, RunningRow, VerifyPlan, VerifyResult

_KEPT = 0.8  # of a row's survival so far, when it drafts again
_STALE = 8  # drafted rounds after which a row's own blocks say less than those of the others
_PRIOR_BLOCKS = 8.0  # that the export's acceptance counts for
_MOST_BLOCKS = 64.0  # that count for what is usual
_RESTED = 8  # rounds without a draft after which it is asked again whether one pays

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of passes over so many rows, at some context."""

    verify: Floats
    """[W] a target pass by its width; the first is a plain step."""
    context: float

    @property
    def plain(self) -> float:
        """A plain step."""
        return float(self.verify[0])


@dataclass(frozen=True, slots=True)
class Round:
    """What was decided before the round: who drafts, and how far any row is verified."""

    places: Ints | None
    """Of the rows that draft, among the running ones; None: all do."""
    num_drafts: int
    """S - 1."""


class OneWidth:
    """Weighs widths, and under `auto` drafting too: a `Schedule` for padded cost tables.

    `auto` keeps an account as `schedule.Weighed` does. As the width is known before the draft, so
    is the most that a round can lose, and a round is made only if the account covers that.
    """

    width: int | None = None
    """See `Schedule`."""

    def __init__(self, engine: DecodeEngine, costs: CostTable, *, auto: bool) -> None:
        gamma = engine.block_size
        self._engine, self._costs, self._auto = engine, costs, auto
        # The draft may be cut to less than the table's widest pass.
        self._num_drafts = np.minimum(np.array(costs.tokens_per_row) - 1, gamma)  # [W]
        self._num_looking = next((n for n in costs.rows if n >= LOOKING), LOOKING)
        self._positions = np.arange(gamma)
        self._prices_at: dict[tuple[int, int], Prices] = {}
        self._outlook = Outlook()
        self._account = 0.0
        # Survival [γ] to expect: of any row, and of each slot's own.
        self._usual = np.zeros(gamma)
        self._num_blocks = 0.0  # that `_usual` stands on
        self._own = np.zeros((engine.max_rows, gamma))
        self._age = np.full(engine.max_rows, _STALE)  # drafted rounds since the slot's last block
        # The running rows, and what does not change while they run.
        self._rows: list[RunningRow] = []
        self._owners: list[RunningRow | None] = [None] * engine.max_rows
        self._slots = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)  # tokens that they may come to
        # Of the round:
        self._prices = Prices(np.ones(1), 0.0)
        self._limits = np.zeros(0, np.int64)
        self._pending = np.zeros(0, np.int64)
        self._expected = self._own  # [R, γ] survival
        self._round: Round | None = None
        self._block: DraftBlock | None = None
        self._num_rests = 0

    def drafts(self, running: list[RunningRow]) -> list[RunningRow]:
        """See `Schedule`. Decides the round; `plan` only adds how long the blocks are.

        Asking costs the host a tenth of a plain step of many rows, so after a round that did not
        pay it is not asked at once again.
        """
        if self._num_rests and self._auto:
            self._num_rests -= 1
            self._account = min(self._account + SHARE, MOST_SAVED)
            self._round = None
            return []
        self._take(running)
        if not self._num_blocks:
            self._usual, self._num_blocks = self._promised(running), _PRIOR_BLOCKS
        self._expected = self._own_or_usual()
        survival = self._outlook.trust * self._expected
        if self._limits.min() < len(self._positions):
            survival[self._positions >= self._limits[:, None]] = 0.0
        if self._auto:
            self._account = min(self._account + SHARE, MOST_SAVED)
            self._round = self._worth_drafting(survival)
        else:
            width = int(np.argmax(self._rates(survival, None)))
            self._round = Round(None, int(self._num_drafts[width]))
        if self._round is None:
            self._num_rests = _RESTED - 1
            return []
        places = self._round.places
        return running if places is None else [running[r] for r in places.tolist()]

    def plan(self, running: list[RunningRow], block: DraftBlock | None) -> VerifyPlan:
        """See `Schedule`. The block's confidence is not looked at."""
        self._block = block
        if block is None or self._round is None:
            return VerifyPlan(np.zeros(len(running), np.int64))
        most = np.minimum(self._limits, self._round.num_drafts)
        return VerifyPlan(np.minimum(most, block.lengths))

    def observe(self, plan: VerifyPlan, result: VerifyResult) -> None:
        """See `Schedule`. The round's confidence counts from here on."""
        block, chosen = self._block, self._round
        if block is None or chosen is None:
            return
        places = slice(None) if chosen.places is None else chosen.places
        survival = self._survival(block, places)
        verified = self._positions < plan.lengths[places][:, None]
        num_accepted = int(result.num_accepted.sum())
        predicted = float((survival * verified).sum())
        self._outlook.learn(predicted=predicted, accepted=num_accepted)

        # Which rows were looked up follows from their past.
        passing = ~block.looked_up[places]
        num_passing = int(passing.sum())
        waited = int(self._pending[places][passing].sum())
        width = int(np.searchsorted(self._num_drafts, plan.longest - 1))
        spent = self._draft(num_passing, waited) + self._prices.verify[width]
        plainly = self._prices.plain * (1.0 + num_accepted / len(plan.lengths))
        self._account += float(plainly - spent) / self._prices.plain
        self._see(survival, places, num_passing)

    def _take(self, running: list[RunningRow]) -> None:
        """Note the rows of the round. Only what changed of them is read one by one."""
        if len(running) != len(self._rows) or not all(map(is_, running, self._rows)):
            self._rows = running.copy()
            slots = [s.slot for s in running]
            for slot, row in zip(slots, running, strict=True):
                if self._owners[slot] is not row:
                    self._owners[slot] = row
                    self._age[slot] = _STALE
            self._slots = np.array(slots)
            self._ends = np.array(
                [s.num_prompt_tokens + s.prompt.params.max_new_tokens for s in running]
            )
        num_tokens = np.array([len(s.tokens) for s in running])
        # A row needs as many drafts as remain less the bonus.
        self._limits = self._ends - num_tokens - 1
        self._pending = num_tokens - 1 - np.array([s.num_taken for s in running])
        self._prices = self._prices_of(len(running), int(num_tokens.sum()) - len(running))

    def _prices_of(self, num_rows: int, num_cached: int) -> Prices:
        """By the shape of the rows: within it their number makes no difference."""
        grid, grain = self._costs.rows, num_cached // (GRAIN * num_rows)
        shape = num_rows if num_rows > grid[-1] else grid[bisect_left(grid, num_rows)]
        if (shape, grain) not in self._prices_at:
            context = (grain + 0.5) * GRAIN
            curve = self._costs.verify_curve(shape, context)
            passes = [curve(shape * width, width) for width in self._costs.tokens_per_row]
            self._prices_at[shape, grain] = Prices(np.array(passes), context)
        return self._prices_at[shape, grain]

    def _draft(self, num_rows: float, num_pending: int = 0) -> float:
        """Seconds of a draft pass for so many rows, which takes in context that waits."""
        context = self._prices.context
        return self._costs.draft(num_rows, context=context, num_pending=num_pending)

    def _worth_drafting(self, survival: Floats) -> Round | None:
        """For all rows if that pays, for some to look whether it does, or none, as affordable."""
        num_rows, plain = len(survival), self._prices.plain
        knows = self._outlook.num_seen >= EVIDENCE
        credit = self._account + CREDIT
        continues = self._round is not None and self._round.places is None
        if knows:
            rates = self._rates(survival, None)
            enough = (1.0 if continues else HURDLE) * num_rows / plain
            if rates.max() > enough:
                return self._affordable(survival, rates, num_rows / plain, credit)
        by_waiting = np.argsort(self._pending, kind="stable")
        places = None if num_rows <= self._num_looking else by_waiting[: self._num_looking]
        covered = self._losses(places) <= (self._account if knows else credit)
        if not covered.any():
            return None
        rates = np.where(covered, self._rates(survival, places), 0.0)
        return Round(places, int(self._num_drafts[int(np.argmax(rates))]))

    def _affordable(
        self, survival: Floats, rates: Floats, plainly: float, credit: float
    ) -> Round | None:
        """The best round that pays and that the credit, in plain steps, covers; None: it waits."""
        covered = np.where(self._losses(None) <= credit, rates, 0.0)
        if covered.max() > plainly:
            return Round(None, int(self._num_drafts[int(np.argmax(covered))]))
        reserve = self._losses(None, waiting=False)[int(np.argmax(rates))]
        if reserve > credit:
            return None
        # Context that waits is more than can be paid at once: some rows begin.
        by_waiting = np.argsort(self._pending, kind="stable")
        some = [by_waiting[:n] for n in reversed(self._costs.rows) if n < len(survival)]
        for places in some:
            covered = np.where(self._losses(places) <= credit, self._rates(survival, places), 0.0)
            if covered.max() > plainly:
                return Round(places, int(self._num_drafts[int(np.argmax(covered))]))
        # If too few could begin to pay, some only take their context in, as far as enough is left
        # to draft for all some day, and where that is most of what their pass costs.
        by_waiting = by_waiting[self._pending[by_waiting] > len(self._positions) + 1]
        for size in (len(by_waiting), *reversed(self._costs.rows)):
            places = by_waiting[:size]
            intake = int(self._pending[places].sum()) * self._costs.intake_seconds
            if len(places) < size or intake <= self._draft(size):
                continue
            if self._losses(places)[0] + reserve <= credit:
                return Round(places, 0)
        return None

    def _rates(self, survival: Floats, places: Ints | None) -> Floats:
        """[W] expected tokens per second of rounds that draft for these places.

        Every token is context for the draft some day; what waits now is spread over the tokens
        that its rows may still get.
        """
        drafted = survival if places is None else survival[places]
        gains = np.zeros(len(self._positions) + 1)
        np.cumsum(drafted.sum(axis=0), out=gains[1:])
        tokens = len(survival) + gains[self._num_drafts]
        step = self._draft(len(drafted) * self._outlook.share_passing) + self._prices.verify
        share = self._pending.sum() / (self._limits + 1).sum()
        taken = tokens * (1.0 + share) * self._costs.intake_seconds
        return np.asarray(tokens / (step + taken))

    def _losses(self, places: Ints | None, *, waiting: bool = True) -> Floats:
        """[W] plain steps that a round loses if no draft is accepted and no row is looked up."""
        pending = self._pending if places is None else self._pending[places]
        draft = self._draft(len(pending), int(pending.sum()) if waiting else 0)
        return np.asarray((draft + self._prices.verify) / self._prices.plain - 1.0)

    def _own_or_usual(self) -> Floats:
        """[R, γ] survival by each row's own blocks, or the usual one where it has none of late."""
        own = self._own[self._slots]
        stale = self._age[self._slots] >= _STALE
        if stale.any():
            own[stale] = self._usual
        return np.asarray(own)

    def _see(self, survival: Floats, places: slice | Ints, num_passing: int) -> None:
        """Take in the survival [R, γ] of the blocks of these places.

        Survival is averaged and not confidence: it is what tokens come to, and the product of
        averages is not the average of products.
        """
        slots, size = self._slots[places], len(survival)
        self._own[slots] = _KEPT * self._expected[places] + (1.0 - _KEPT) * survival
        self._age += 1
        self._age[slots] = 0
        self._num_blocks = min(self._num_blocks + size, _MOST_BLOCKS)
        part = min(size / self._num_blocks, 1.0)
        self._usual = (1.0 - part) * self._usual + part / size * survival.sum(axis=0)
        self._outlook.count(size, num_passing=num_passing)

    def _survival(self, block: DraftBlock, places: slice | Ints) -> Floats:
        """[R, γ] of the rows that drafted; 0 where nothing was proposed or confidence is NaN."""
        confidence = block.confidence[places]
        proposed = self._positions < block.lengths[places][:, None]
        survival = np.where((confidence > 0) & proposed, confidence, np.float64(0.0))
        np.minimum(survival, 1.0, out=survival)
        for k in range(1, survival.shape[1]):  # five times as fast as `cumprod` of short rows
            survival[:, k] *= survival[:, k - 1]
        return survival

    def _promised(self, running: list[RunningRow]) -> Floats:
        """[γ] survival that the export found for rows like these."""
        engine = self._engine
        by_row = [
            engine.sampled_acceptance if s.prompt.params.temperature > 0 else engine.acceptance
            for s in running
        ]
        return np.asarray(np.cumprod(np.mean(by_row, axis=0)))
