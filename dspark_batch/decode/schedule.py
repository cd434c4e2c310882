"""Whether a round drafts, for which rows, and how much of it is verified.

Past rounds, measured costs and the confidence that `algorithm.scheduler` may look at decide
everything, so the text does not depend on it. Time is that of the cost table. No clock is read, so
a run that is repeated decides the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

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
from dspark_batch.decode.algorithm import CostTable, Estimator, Outlook, VerifyCurve
from dspark_batch.decode.algorithm import scheduler as rules
from dspark_batch.decode.engine import DecodeEngine
from dspark_batch.decode.one_width import OneWidth
from dspark_batch.decode.types import (
    CONFIDENCE_THRESHOLD,
    DraftBlock,
    RunningRow,
    VerifyPlan,
    VerifyResult,
)

_MEASURED = 256  # rounds of which `auto` makes one plainly, for the summary to compare with
_REFRESH = 8  # drafted rounds after which an answer is worked out again
_PRICED = ("early-stop", "async")  # schedulers that need costs, and confidence to be trusted

Confidence = NDArray[np.floating[Any]]
Lengths = NDArray[np.int64]
Rule = Callable[[Confidence, Lengths, rules.StepSeconds, Callable[[], Confidence]], Lengths]
"""Confidence [R, γ], caps [R], prices, and what gives the confidence of two drafts ago -> lengths.
"""


class Schedule(Protocol):
    """What the loop asks once a round, in this order."""

    def drafts(self, running: list[RunningRow]) -> list[RunningRow]:
        """The rows to draft for, maybe none: decided before any token of the round exists."""

    width: int | None = None
    """Tokens that a network drafts in the round; None is γ."""

    def plan(self, running: list[RunningRow], block: DraftBlock | None) -> VerifyPlan:
        """Verify lengths [R] of the round."""

    def observe(self, plan: VerifyPlan, result: VerifyResult) -> None:
        """Learn from what came of it."""


def open_schedule(
    engine: DecodeEngine,
    spec: str,
    *,
    scheduler: str | None = None,
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> Schedule:
    """The schedule of one decode, by what `settled` makes of the settings."""
    spec, scheduler = settled(engine, spec, scheduler)
    if scheduler is None:
        return Plain()
    if spec == "auto" or scheduler in _PRICED:
        assert engine.costs is not None
        if engine.costs.padded and scheduler in _PRICED:
            return OneWidth(engine, engine.costs, auto=spec == "auto")
        return Weighed(engine, engine.costs, scheduler, confidence_threshold, auto=spec == "auto")
    return Unweighed(confidence_threshold if scheduler == "threshold" else None)


class Drafting(Protocol):
    """What `settled` asks of an engine."""

    @property
    def block_size(self) -> int:
        """γ; 0 without a draft."""

    @property
    def costs(self) -> object | None:
        """None where nothing was measured."""


def settled(engine: Drafting, spec: str, scheduler: str | None) -> tuple[str, str | None]:
    """Spec and scheduler with defaults filled in, as far as the engine allows them.

    The default scheduler is `early-stop` under `auto` and `whole` under `on`; it is None if nothing
    is drafted. Without measured costs nothing can be weighed: then every round drafts, and is
    verified whole or by the threshold.
    """
    if spec == "off" or not engine.block_size:
        return "off", None
    scheduler = scheduler or ("early-stop" if spec == "auto" else "whole")
    if engine.costs is None and (spec == "auto" or scheduler in _PRICED):
        return "on", "threshold" if scheduler == "threshold" else "whole"
    return spec, scheduler


class Plain(Schedule):
    """Never drafts."""

    def drafts(self, running: list[RunningRow]) -> list[RunningRow]:
        """See `Schedule`."""
        return []

    def plan(self, running: list[RunningRow], block: DraftBlock | None) -> VerifyPlan:
        """See `Schedule`."""
        return VerifyPlan(np.zeros(len(running), np.int64))

    def observe(self, plan: VerifyPlan, result: VerifyResult) -> None:
        """See `Schedule`."""


class Unweighed(Schedule):
    """Drafts every round, and verifies all of it or up to the first low confidence."""

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold

    def drafts(self, running: list[RunningRow]) -> list[RunningRow]:
        """See `Schedule`."""
        return running

    def plan(self, running: list[RunningRow], block: DraftBlock | None) -> VerifyPlan:
        """See `Schedule`."""
        assert block is not None
        limits = _limits(running, block)
        if self._threshold is None:
            return VerifyPlan(limits)
        return VerifyPlan(rules.threshold(block.confidence, limits, self._threshold))

    def observe(self, plan: VerifyPlan, result: VerifyResult) -> None:
        """See `Schedule`."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of passes over the running rows, by the cost table."""

    costs: CostTable
    num_rows: int
    context: float
    """Cached tokens of a row, on average."""
    verify: VerifyCurve
    plain: float
    """A plain step."""

    @classmethod
    def at(cls, costs: CostTable, num_rows: int, context: float) -> Prices:
        """The prices for so many rows with so many cached tokens each."""
        curve = costs.verify_curve(num_rows, context)
        return cls(costs, num_rows, context, curve, curve(num_rows, 1))

    def draft(self, num_rows: float, width: int | None, *, num_pending: int = 0) -> float:
        """A draft pass for `num_rows` of them, which takes in `num_pending` tokens of context."""
        return self.costs.draft(
            num_rows, context=self.context, num_pending=num_pending, width=width
        )

    def width(self, acceptance: Confidence) -> int | None:
        """The width of block, None for γ, that pays most with this acceptance [γ], if any does.

        All rows draft, and verify as many tokens.
        """
        gains = 1.0 + np.cumsum(np.cumprod(acceptance))
        seconds = [self.verify((1 + n) * self.num_rows, 1 + n) for n in range(1, len(gains) + 1)]

        def most(width: int | None) -> float:
            drafting = self.draft(self.num_rows, width)
            return float(np.max(gains[:width] / (drafting + np.array(seconds[:width]))))

        narrow = self.costs.narrow_block
        return narrow if narrow is not None and most(narrow) > most(None) else None

    def step(self, num_drafting: float, width: int | None) -> rules.StepSeconds:
        """Seconds of rounds that draft for so many rows, context that piled up before left out."""
        drafting = self.draft(num_drafting, width)
        return lambda num_tokens, longest: drafting + self.verify(num_tokens, longest)


class Weighed(Schedule):
    """Weighs what verifying brings against what it costs, and under `auto` drafting too.

    `auto` keeps an account in plain steps by the cost table. A round that drafted adds what its
    tokens would have cost plainly, less what it cost; every round adds a `SHARE`. `auto` drafts
    for all rows if that pays, or for some to look whether it does, as far as the account allows.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        costs: CostTable,
        scheduler: str,
        threshold: float,
        *,
        auto: bool,
    ) -> None:
        self._engine, self._costs, self._auto = engine, costs, auto
        self._is_priced = scheduler in _PRICED
        self._rule = _rules(threshold)[scheduler]
        self._outlook = Outlook()
        self._estimator = Estimator(engine.block_size)
        self._earlier: deque[dict[int, Confidence]] = deque(maxlen=2)
        self._price_lists: dict[tuple[int, int], Prices] = {}
        self._account = 0.0
        self._answers: dict[int, bool] = {}  # by number of rows: whether drafting pays
        self._widths: dict[int, int | None] = {}  # and which width of block
        self._num_since_answer = 0
        self._last_paid = False
        self._num_rounds = 0
        # Of the round:
        self._prices = Prices.at(costs, 1, 0.0)
        self._block = DraftBlock.empty(0, engine.block_size)
        self._drafting: list[RunningRow] = []
        self._waiting: dict[int, int] = {}  # by slot: context that the draft pass takes in
        self._looking = False
        self._draft_seconds = 0.0

    def drafts(self, running: list[RunningRow]) -> list[RunningRow]:
        """See `Schedule`."""
        self._prices = self._price_list(running)
        if not self._outlook.has_blocks:
            self._outlook.expect(self._prior(running))
        self._num_rounds += 1
        if self._auto and self._num_rounds % _MEASURED == _MEASURED // 2:
            self._drafting = []
            return []
        if self._is_priced:
            if len(running) not in self._widths:
                self._widths[len(running)] = self._prices.width(self._outlook.mean)
            self.width = self._widths[len(running)]
        self._drafting = self._worth_drafting(running) if self._auto else running
        self._waiting = {s.slot: s.num_pending for s in self._drafting}
        return self._drafting

    def plan(self, running: list[RunningRow], block: DraftBlock | None) -> VerifyPlan:
        """See `Schedule`."""
        if block is None:
            return VerifyPlan(np.zeros(len(running), np.int64))
        proposed = np.arange(block.confidence.shape[1]) < block.lengths[:, None]
        confidence: Confidence = block.confidence
        if self._is_priced or self._looking:
            confidence = self._estimator.corrected(confidence, block.evidence)
        confidence = np.where(proposed, confidence, 0.0)
        self._block = block
        passing = self._passing(running, block)
        waited = sum(self._waiting[s.slot] for s in passing)
        self._draft_seconds = self._prices.draft(len(passing), self.width, num_pending=waited)
        step = self._prices.step(len(passing), self.width)
        rule = _early_stop if self._looking else self._rule
        before = partial(self._confidence_before, running)
        plan = VerifyPlan(rule(confidence, _limits(running, block), step, before))
        self._earlier.append(dict(zip((s.prompt.row for s in running), confidence, strict=True)))
        tokens = len(running) + rules.expected_gain(confidence, plan.lengths)
        paid = tokens / step(plan.num_tokens, plan.longest) > len(running) / self._prices.plain
        self._last_paid = paid and len(self._drafting) == len(running)
        drafted = {s.slot for s in self._drafting}
        self._outlook.see(
            confidence[[s.slot in drafted for s in running]], num_passing=len(passing)
        )
        return plan

    def observe(self, plan: VerifyPlan, result: VerifyResult) -> None:
        """See `Schedule`."""
        if not self._drafting:
            return
        block = self._block
        self._estimator.learn(block.confidence, block.evidence, plan.lengths, result.num_accepted)
        num_accepted = int(result.num_accepted.sum())
        prices = self._prices
        plainly = prices.plain * (prices.num_rows + num_accepted) / prices.num_rows
        spent = self._draft_seconds + prices.verify(plan.num_tokens, plan.longest)
        self._account += (plainly - spent) / prices.plain
        self._num_since_answer += 1
        if self._looking or self._num_since_answer >= _REFRESH:
            self._answers.clear()
            self._widths.clear()
            self._num_since_answer = 0

    def _passing(self, running: list[RunningRow], block: DraftBlock) -> list[RunningRow]:
        """The rows that a draft pass was made for: all but those that were looked up.

        That follows from the rows' past, so a plan may depend on it.
        """
        looked_up = {s.slot for s, own in zip(running, block.looked_up, strict=True) if own}
        return [s for s in self._drafting if s.slot not in looked_up]

    def _worth_drafting(self, running: list[RunningRow]) -> list[RunningRow]:
        """All rows if drafting pays, some to look whether it does, or none, as affordable."""
        self._account = min(self._account + SHARE, MOST_SAVED)
        knows = self._outlook.num_seen >= EVIDENCE
        pays = knows and (self._pays(running) or self._last_paid)
        self._looking = not pays
        credit = CREDIT if pays or not knows else 0.0
        affordable = (self._account + credit) * self._prices.plain
        rows = sorted(running, key=lambda s: s.num_pending)
        if self._looking:
            rows = rows[:LOOKING]
            return rows if self._price(rows) <= affordable else []
        # Context that waits may be more than can be paid at once: then some rows begin.
        while rows and self._price(rows) > affordable:
            rows.pop()
        return rows

    def _pays(self, running: list[RunningRow]) -> bool:
        """Whether the last blocks, replayed with so many rows, beat plain decoding."""
        num_rows = len(running)
        if num_rows not in self._answers:
            step = self._prices.step(num_rows * self._outlook.share_passing, self.width)
            limits = np.full(num_rows, self.width or self._engine.block_size)
            rounds = self._outlook.rounds(num_rows)
            tokens = seconds = 0.0
            for j, confidence in enumerate(rounds):
                before = partial(rounds.__getitem__, j - 2)
                plan = VerifyPlan(self._rule(confidence, limits, step, before))
                tokens += num_rows + rules.expected_gain(confidence, plan.lengths)
                seconds += step(plan.num_tokens, plan.longest)
            # Every token is context for the draft some day; what waits now is spread over the
            # tokens that its rows may still get.
            waiting = sum(s.num_pending for s in running)
            share = waiting / sum(s.num_remaining for s in running)
            seconds += tokens * (1.0 + share) * self._costs.intake_seconds
            hurdle = 1.0 if len(self._drafting) == num_rows else HURDLE
            self._answers[num_rows] = tokens / seconds > hurdle * num_rows / self._prices.plain
        return self._answers[num_rows]

    def _price(self, rows: list[RunningRow]) -> float:
        """Seconds of a draft pass for these rows, with the context that waits."""
        waiting = sum(s.num_pending for s in rows)
        return self._prices.draft(len(rows), self.width, num_pending=waiting)

    def _price_list(self, running: list[RunningRow]) -> Prices:
        grain = sum(s.anchor_position for s in running) // (GRAIN * len(running))
        key = (len(running), grain)
        if key not in self._price_lists:
            context = (grain + 0.5) * GRAIN
            self._price_lists[key] = Prices.at(self._costs, len(running), context)
        return self._price_lists[key]

    def _confidence_before(self, running: list[RunningRow]) -> Confidence:
        """[R, γ] of each row two drafts ago, or what is usual for a row that did not draft then."""
        earlier = self._earlier[0] if len(self._earlier) == 2 else {}
        usual = self._outlook.mean
        return np.array([earlier.get(s.prompt.row, usual) for s in running])

    def _prior(self, running: list[RunningRow]) -> NDArray[np.float64]:
        """[γ] conditional acceptance that the export found for rows like these."""
        engine = self._engine
        by_row = [
            engine.sampled_acceptance if s.prompt.params.temperature > 0 else engine.acceptance
            for s in running
        ]
        return np.asarray(np.mean(by_row, axis=0))


def _limits(running: list[RunningRow], block: DraftBlock) -> Lengths:
    """[R] draft tokens that may be verified: a row needs as many as remain less the bonus."""
    remaining = np.array([s.num_remaining for s in running], np.int64)
    return np.minimum(remaining - 1, block.lengths)


def _early_stop(
    confidence: Confidence,
    limits: Lengths,
    step: rules.StepSeconds,
    earlier: Callable[[], Confidence],
) -> Lengths:
    return rules.early_stop(confidence, limits, step)


def _async(
    confidence: Confidence,
    limits: Lengths,
    step: rules.StepSeconds,
    earlier: Callable[[], Confidence],
) -> Lengths:
    return rules.fill(confidence, limits, rules.global_budget(earlier(), limits, step))


def _rules(threshold: float) -> dict[str, Rule]:
    """The schedulers by name."""
    return {
        "early-stop": _early_stop,
        "async": _async,
        "threshold": lambda confidence, limits, step, earlier: rules.threshold(
            confidence, limits, threshold
        ),
        "whole": lambda confidence, limits, step, earlier: limits,
    }
