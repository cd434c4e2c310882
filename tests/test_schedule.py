"""When `auto` drafts, by a clock that reads the cost table: never much slower than plain decoding.

Rows have no text here. A draft's confidence and what the target accepts are drawn beforehand for
every position of every row, so decoding them any way meets the same drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.algorithm.outlook import Outlook
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.schedule import open_schedule
from dspark_batch.decode.types import (
    DraftBlock,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)

Array = NDArray[Any]

GAMMA = 7
ROWS, WIDTHS = np.array([1, 2, 4, 8, 16, 32, 64]), np.array([1, 2, 4, 8])
MILLISECOND = 1e-3


def costs_of(
    *,
    step: float = 5.0,
    token: float = 0.55,
    cell: float = 0.25,
    draft: float = 2.4,
    drafted_row: float = 0.54,
    cached: float = 0.006,
    taken: float = 0.011,
) -> CostTable:
    """Milliseconds, by default about those of a small target on two CPU cores."""
    cells = cell * ROWS[:, None] * WIDTHS
    return CostTable.measured(
        ROWS,
        WIDTHS,
        verify_seconds=MILLISECOND * (step + token * ROWS[:, None] * WIDTHS + cells),
        lone_seconds=MILLISECOND * (step + token * (ROWS[:, None] + WIDTHS - 1) + cells),
        draft_seconds=MILLISECOND * (draft + drafted_row * ROWS),
        intake_seconds=MILLISECOND * taken,
        context_tokens=128,
        context_seconds=MILLISECOND * ROWS[:, None] * [cached, 1.5 * cached],
    )


COSTS = costs_of()
WIDE = costs_of(token=0.02, cell=0.01, drafted_row=0.02, cached=0.0002, taken=0.0005)
"""A machine that is not busy with a batch: more tokens in a pass cost next to nothing."""


@dataclass
class Draft:
    """A draft's quality. Confidence is a Beta variable, and true unless the draft is a liar."""

    alpha: float
    beta: float
    lies: bool = False
    promise: float | None = None
    """What the export measured; the truth by default."""

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    def blocks(self, row: int, num_positions: int) -> tuple[Array, Array]:
        """Confidence [n, γ] and accepted draft tokens [n] at every position of a row."""
        rng = np.random.default_rng(row)
        confidence = rng.beta(self.alpha, self.beta, (num_positions, GAMMA))
        truth = 0.0 if self.lies else confidence
        passed = rng.random(confidence.shape) < truth
        return confidence.astype(np.float32), np.cumprod(passed, axis=1).sum(axis=1)


GOOD, FAIR, HOPELESS = Draft(6, 1.5), Draft(3, 1.5), Draft(0.2, 6)


@dataclass
class Clocked:
    """What `decode` needs of an engine; `seconds` is what its passes cost."""

    draft_quality: Draft
    max_rows: int
    costs: CostTable | None = field(default_factory=lambda: COSTS)
    block_size: int = GAMMA
    seconds: float = 0.0
    draft_sizes: list[int] = field(default_factory=list)
    widths: list[int | None] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of each round: what it cost, less what its tokens would have cost plainly."""
    plain_steps: list[float] = field(default_factory=list)
    """Of each round: what a plain step would have cost."""
    intake: int = 1
    tokenizer: None = None
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        promise = self.draft_quality.promise
        self.acceptance = np.full(GAMMA, self.draft_quality.mean if promise is None else promise)
        self._known: dict[int, tuple[Array, Array]] = {}
        self._drafting = 0.0
        self._table = self.costs or COSTS

    def admit(self, sequence: RunningRow) -> None:
        row, params = sequence.prompt.row, sequence.prompt.params
        self._known[row] = self.draft_quality.blocks(row, params.max_new_tokens)

    def release(self, sequence: RunningRow) -> None:
        del self._known[sequence.prompt.row]

    def prefill(self, sequences: list[RunningRow]) -> Array:
        return np.ones(len(sequences), np.int64)

    def draft(self, sequences: list[RunningRow], width: int | None = None) -> DraftBlock:
        pending, context = sum(s.num_pending for s in sequences), self._context(sequences)
        self._drafting = self._table.draft(
            len(sequences), context=context, num_pending=pending, width=width
        )
        self.draft_sizes.append(len(sequences))
        self.widths.append(width)
        confidence = [self._known[s.prompt.row][0][s.num_new_tokens - 1] for s in sequences]
        tokens = np.ones((len(sequences), GAMMA), np.int64)
        lengths = np.full(len(sequences), width or GAMMA)
        return DraftBlock(tokens, np.array(confidence), lengths)

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        would = [self._known[s.prompt.row][1][s.num_new_tokens - 1] for s in sequences]
        accepted = np.minimum(would, plan.lengths)
        curve = self._table.verify_curve(len(sequences), self._context(sequences))
        spent = self._drafting + curve(plan.num_tokens, plan.longest)
        plain = curve(len(sequences), 1)
        self.plain_steps.append(plain)
        self.losses.append(spent - plain * (1 + accepted.sum() / len(sequences)))
        self.seconds += spent
        self._drafting = 0.0
        return VerifyResult(accepted, np.ones(len(sequences), np.int64))

    def _context(self, sequences: list[RunningRow]) -> float:
        return sum(s.anchor_position for s in sequences) / len(sequences)


def prompts(number: int, *, first: int = 0) -> list[Prompt]:
    """Of 100 tokens; 40 to 87 new ones, so that rows do not end together."""
    return [
        Prompt(row, (1,) * 100, SamplingParams(40 + row * 29 % 48))
        for row in range(first, first + number)
    ]


def run(engine: Clocked, spec: str, *, number: int, **options: Any) -> DecodeStats:
    stats = DecodeStats()
    done = list(decode(prompts(number), engine, spec=spec, stats=stats, **options))  # type: ignore[arg-type]
    assert len(done) == number
    return stats


def seconds(draft: Draft, spec: str, *, rows: int, generations: int = 8, **options: Any) -> float:
    engine = Clocked(draft, rows, costs=options.pop("costs", COSTS))
    run(engine, spec, number=generations * rows, **options)
    return engine.seconds


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize(
    "draft",
    [
        HOPELESS,
        Draft(0.2, 6, promise=0.9),
        Draft(6, 1.5, lies=True),
        FAIR,
    ],
    ids=["hopeless", "praised", "liar", "fair"],
)
def test_auto_is_never_much_slower_than_plain_decoding(draft: Draft, rows: int) -> None:
    plain, auto = (seconds(draft, spec, rows=rows) for spec in ("off", "auto"))
    assert auto <= plain / 0.98


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["async", "threshold", "whole"])
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_so_it_is_with_the_other_schedulers(scheduler: str, rows: int) -> None:
    for draft in (HOPELESS, Draft(6, 1.5, lies=True)):
        plain = seconds(draft, "off", rows=rows)
        assert seconds(draft, "auto", rows=rows, scheduler=scheduler) <= plain / 0.98


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("draft", [GOOD, FAIR], ids=["good", "fair"])
@pytest.mark.parametrize("costs", [COSTS, WIDE], ids=["narrow", "wide"])
def test_auto_is_nearly_as_fast_as_the_better_way(
    costs: CostTable, draft: Draft, rows: int
) -> None:
    plain = seconds(draft, "off", rows=rows, costs=costs)
    drafting = seconds(draft, "on", rows=rows, scheduler="early-stop", costs=costs)
    auto = seconds(draft, "auto", rows=rows, costs=costs)
    assert auto <= min(plain, drafting) / 0.97


def test_the_comparison_has_something_to_compare() -> None:
    """A narrow machine is faster with drafts for one row and slower for many; a wide one never."""
    for costs, rows, least, most in (
        (COSTS, 1, 1.6, 1.8),
        (COSTS, 64, 0.6, 0.8),
        (WIDE, 64, 1.2, 3.0),
    ):
        plain = seconds(GOOD, "off", rows=rows, costs=costs)
        drafting = seconds(GOOD, "on", rows=rows, scheduler="early-stop", costs=costs)
        assert least < plain / drafting < most


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 5, 16]),
    alpha=st.floats(0.1, 8),
    beta=st.floats(0.1, 8),
    lies=st.booleans(),
    promise=st.floats(0.01, 0.99),
    draft=st.floats(0.01, 20),
    token=st.floats(0.01, 5),
    scheduler=st.sampled_from(["early-stop", "async", "threshold", "whole"]),
)
@example(1, 0.125, 1.0, False, 0.5, 1.0, 1.0, "early-stop")  # most of its cost is waiting context
def test_what_auto_loses_is_bounded_whatever_the_draft_promises(
    rows: int,
    alpha: float,
    beta: float,
    lies: bool,
    promise: float,
    draft: float,
    token: float,
    scheduler: str,
) -> None:
    """At any moment: a share of the time, three plain steps, and the last round that was wrong."""
    costs = costs_of(draft=draft, token=token)
    engine = Clocked(Draft(alpha, beta, lies=lies, promise=promise), rows, costs=costs)
    run(engine, "auto", number=6 * rows, scheduler=scheduler)
    losses = np.array(engine.losses) / engine.plain_steps
    rounds = np.arange(1, len(losses) + 1)
    worst = np.maximum.accumulate(np.maximum(losses, 0.0))
    # Prices are told apart by sixteen cached tokens, which is a little less than exact.
    assert (np.cumsum(losses) <= 1.05 * (3.0 + 0.005 * rounds + worst)).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_draft_that_the_export_thought_little_of_gets_its_chance(rows: int) -> None:
    draft = Draft(6, 1.5, promise=0.02)
    plain, auto, drafting = (
        seconds(draft, spec, rows=rows, scheduler="early-stop") for spec in ("off", "auto", "on")
    )
    assert plain - auto > 0.8 * (plain - drafting)


def test_a_row_that_is_left_alone_drafts() -> None:
    """Thirty-two rows do not pay; the last one of the job does."""
    engine = Clocked(GOOD, 32)
    job = [Prompt(row, (1,) * 100, SamplingParams(30)) for row in range(31)]
    job.append(Prompt(31, (1,) * 100, SamplingParams(400)))
    list(decode(job, engine, spec="auto", stats=DecodeStats()))  # type: ignore[arg-type]
    assert set(engine.draft_sizes) == {1, 4}
    assert engine.draft_sizes.count(1) > 60


def test_a_look_takes_the_rows_with_the_least_context_waiting() -> None:
    engine = Clocked(HOPELESS, 16)
    schedule = open_schedule(engine, "auto")  # type: ignore[arg-type]
    running = [
        RunningRow(p, slot=slot, tokens=[1] * (150 - slot), num_prompt_tokens=100)
        for slot, p in enumerate(prompts(16))
    ]
    assert [s.slot for s in schedule.drafts(running)] == [15, 14, 13, 12]


NARROW = replace(
    COSTS,
    narrow_block=2,
    narrow_seconds=tuple(0.4 * seconds for seconds in COSTS.draft_seconds),
)


@pytest.mark.parametrize("spec", ["on", "auto"])
def test_few_tokens_are_drafted_where_few_are_worth_verifying(spec: str) -> None:
    """A draft of which one token in two fails, against one that is nearly always right."""
    bad, good = (Clocked(Draft(*ab), 2, costs=NARROW) for ab in ((2, 2), (30, 1)))
    for engine in (bad, good):
        run(engine, spec, number=16, scheduler="early-stop")
    assert bad.widths.count(2) > 0.9 * len(bad.widths)
    assert good.widths.count(None) > 0.9 * len(good.widths)


def test_a_narrow_block_is_faster_where_it_is_chosen() -> None:
    for draft in (Draft(2, 3), Draft(3, 2), Draft(8, 2)):
        narrow, whole = (
            seconds(draft, "on", rows=4, costs=costs, scheduler="early-stop")
            for costs in (NARROW, COSTS)
        )
        assert narrow < 1.01 * whole


def test_blocks_that_are_verified_whole_are_drafted_whole() -> None:
    engine = Clocked(FAIR, 2, costs=NARROW)
    run(engine, "on", number=4)
    assert set(engine.widths) == {None}


def test_a_run_decides_the_same_again() -> None:
    found = []
    for _ in range(2):
        engine = Clocked(FAIR, 4)
        run(engine, "auto", number=12)
        found.append((engine.seconds, engine.draft_sizes))
    assert found[0] == found[1]


def test_without_measured_costs_every_round_drafts() -> None:
    for spec, scheduler in (("auto", None), ("on", "early-stop"), ("auto", "threshold")):
        engine = Clocked(GOOD, 3, costs=None)
        stats = run(engine, spec, number=6, scheduler=scheduler)
        assert stats.num_drafted_rounds == stats.num_rounds
        whole = stats.spec.num_verified_tokens > 0.9 * stats.spec.num_draft_tokens
        assert whole == (scheduler != "threshold")


# --- how much is verified ------------------------------------------------------------------------


def rows_of(number: int) -> list[RunningRow]:
    return [
        RunningRow(p, slot=slot, tokens=[1] * 101, num_prompt_tokens=100)
        for slot, p in enumerate(prompts(number))
    ]


def block_of(confidence: Array) -> DraftBlock:
    tokens = np.ones(confidence.shape, np.int64)
    return DraftBlock(tokens, confidence.astype(np.float32), np.full(len(tokens), GAMMA))


def nothing_accepted(number: int) -> VerifyResult:
    return VerifyResult(np.zeros(number, np.int64), np.ones(number, np.int64))


def test_the_asynchronous_budget_is_that_of_two_drafts_ago() -> None:
    """How many tokens are verified changes two rounds after the confidence did; which, at once."""
    running = rows_of(3)
    engine = Clocked(GOOD, 3, costs=costs_of(cell=0.0))
    schedule = open_schedule(engine, "on", scheduler="async")  # type: ignore[arg-type]
    high, low = np.full((3, GAMMA), 0.95), np.full((3, GAMMA), 0.2)
    found = []
    for confidence in (high, high, low, low, low, high):
        assert schedule.drafts(running) == running
        plan = schedule.plan(running, block_of(confidence))
        found.append(int(plan.lengths.sum()))
        schedule.observe(plan, VerifyResult(plan.lengths, np.ones(3, np.int64)))
    assert found[2] == found[3] == 3 * GAMMA
    assert max(found[4:]) < GAMMA


def test_a_threshold_looks_at_each_confidence_alone() -> None:
    running = rows_of(2)
    confidence = np.full((2, GAMMA), 0.9)
    confidence[0, 2], confidence[1, 5] = 0.6, 0.69
    for value, lengths in ((0.7, [2, 5]), (0.65, [2, 7]), (0.0, [7, 7])):
        schedule = open_schedule(
            Clocked(GOOD, 2),  # type: ignore[arg-type]
            "on",
            scheduler="threshold",
            confidence_threshold=value,
        )
        schedule.drafts(running)
        assert schedule.plan(running, block_of(confidence)).lengths.tolist() == lengths


# --- what is expected ----------------------------------------------------------------------------


def test_trust_follows_what_confidence_was_worth() -> None:
    outlook = Outlook()
    assert outlook.trust == 1.0
    for _ in range(300):
        outlook.learn(predicted=4.0, accepted=1.0)
    assert outlook.trust == pytest.approx(0.25, abs=0.12)
    for _ in range(300):
        outlook.learn(predicted=1.0, accepted=1.0)
    assert outlook.trust == pytest.approx(1.0, abs=0.1)


def test_the_last_blocks_are_dealt_out_to_rounds_of_any_size() -> None:
    outlook = Outlook()
    assert not outlook.has_blocks
    outlook.expect(np.array([0.5, 0.25]))
    assert outlook.has_blocks
    assert outlook.rounds(3).shape == (21, 3, 2)
    assert (outlook.rounds(3) == [0.5, 0.25]).all()
    assert outlook.num_seen == 0
    blocks = np.arange(140.0).reshape(70, 2)
    outlook.see(blocks)
    assert outlook.num_seen == 70
    assert outlook.rounds(1).ravel().tolist() == blocks[-32:].ravel().tolist()
    assert outlook.rounds(64)[0].tolist() == blocks[-64:].tolist()
    np.testing.assert_allclose(outlook.mean, blocks[-64:].mean(axis=0))
    assert outlook.rounds(100).shape == (1, 100, 2)
