"""The schedule of padded passes: one width for all rows, chosen before the round drafts.

`Clocked` engines decode by a cost table with the figures of a GPU that replays captured graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_schedule import GAMMA, Clocked, Draft, block_of, nothing_accepted, run

from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.one_width import OneWidth
from dspark_batch.decode.schedule import Weighed, open_schedule
from dspark_batch.decode.types import DraftBlock, Prompt, RunningRow, SamplingParams, VerifyResult

Array = NDArray[Any]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (1, 2, 4, 8)
_KNOWN = (1, 16, 64, 256)
_ONE, _EIGHT = (1.34, 1.45, 1.64, 2.45), (1.34, 1.66, 2.82, 7.42)  # ms, by rows


def gpu(*, draft: float = 1.0, eight: float = 1.0, **scalars: float) -> CostTable:
    """Times between those that are known are taken to be linear; `draft` and `eight` scale."""
    one, most = (np.interp(BUCKETS, _KNOWN, times) for times in (_ONE, _EIGHT))
    widths = (np.array(WIDTHS) - 1) / 7
    passes = one[:, None] + (eight * (most - one))[:, None] * widths
    drafts = draft * np.interp(BUCKETS, (1, 256), (0.4, 0.7))
    return CostTable.measured(
        BUCKETS,
        WIDTHS,
        verify_seconds=1e-3 * passes,
        draft_seconds=1e-3 * drafts,
        padded=True,
        **scalars,
    )


GPU = gpu()
GOOD = Draft(6, 2.0)
"""About three tokens a round, if its blocks are verified whole."""


def rows_of(number: int, *, new: int = 400) -> list[RunningRow]:
    return [
        RunningRow(Prompt(row, (1,) * 100, SamplingParams(new)), row, [1] * 101, 100, num_taken=100)
        for row in range(number)
    ]


def opened(rows: int, costs: CostTable = GPU, spec: str = "on") -> OneWidth:
    schedule = open_schedule(Clocked(GOOD, rows, costs=costs), spec, scheduler="early-stop")  # type: ignore[arg-type]
    assert isinstance(schedule, OneWidth)
    return schedule


def one_round(schedule: OneWidth, running: list[RunningRow], confidence: Array) -> Array:
    """Draft all, accept what confidence promises on average; rows stay where they are."""
    assert len(schedule.drafts(running)) == len(running)
    plan = schedule.plan(running, block_of(confidence))
    survival = np.cumprod(confidence, axis=1)
    verified = np.arange(GAMMA) < plan.lengths[:, None]
    accepted = np.round((survival * verified).sum(axis=1)).astype(np.int64)
    schedule.observe(plan, VerifyResult(accepted, np.ones(len(running), np.int64)))
    return plan.lengths


@pytest.mark.parametrize("scheduler", ["early-stop", "async"])
@pytest.mark.parametrize("spec", ["on", "auto"])
def test_padded_costs_are_weighed_by_width(scheduler: str, spec: str) -> None:
    engine: Any = Clocked(GOOD, 4, costs=GPU)
    assert isinstance(open_schedule(engine, spec, scheduler=scheduler), OneWidth)
    engine.costs = gpu_unpadded()
    assert isinstance(open_schedule(engine, spec, scheduler=scheduler), Weighed)


def gpu_unpadded() -> CostTable:
    return CostTable.from_json(GPU.to_json() | {"padded": False})


def test_the_width_is_the_best_of_the_grid() -> None:
    """By brute force over the grid, for rows whose confidence stays as it is for a long time."""
    rng = np.random.default_rng(5)
    found = set()
    for number in (1, 3, 16, 60, 256):
        for likely in (0.05, 0.3, 0.6, 0.8, 0.97):
            costs = gpu(draft=rng.uniform(0.5, 2), eight=rng.uniform(0.5, 3), intake_seconds=1e-7)
            running = rows_of(number)
            running[::3] = rows_of(number, new=4)[::3]
            confidence = np.clip(likely + rng.uniform(-0.2, 0.2, (number, GAMMA)), 0.01, 0.99)
            schedule = opened(number, costs)
            for _ in range(30):
                lengths = one_round(schedule, running, confidence)
            survival = schedule._outlook.trust * np.cumprod(confidence.astype(np.float32), axis=1)
            limits = np.array([row.num_remaining - 1 for row in running])
            rates = []
            for width in WIDTHS:
                verified = np.arange(GAMMA) < np.minimum(limits, width - 1)[:, None]
                tokens = number + (survival * verified).sum()
                seconds = costs.draft(number, context=100) + costs.verify(
                    number, number * width, width, 100
                )
                rates.append(tokens / (seconds + tokens * 1e-7))
            best = int(np.argmax(rates))
            runner_up = sorted(rates)[-2]
            if rates[best] > 1.005 * runner_up:  # else the averages may not be there yet
                assert lengths.tolist() == np.minimum(WIDTHS[best] - 1, limits).tolist()
                found.add(WIDTHS[best])
    assert found == set(WIDTHS)


class Sealed:
    """A block whose confidence must not be asked for yet."""

    def __init__(self, block: DraftBlock) -> None:
        self._block = block
        self.open = False

    def __getattr__(self, name: str) -> Any:
        assert self.open or name != "confidence"
        return getattr(self._block, name)


def test_a_plan_never_sees_the_confidence_of_its_round() -> None:
    """Not even asks for it; the next plan goes by it."""
    plans = []
    for last in (0.99, 0.01):
        schedule, running = opened(64), rows_of(64)
        for _ in range(5):
            one_round(schedule, running, np.full((64, GAMMA), 0.75))
        found = []
        for _ in range(12):
            block: Any = Sealed(block_of(np.full((64, GAMMA), last)))
            schedule.drafts(running)
            plan = schedule.plan(running, block)
            block.open = True
            schedule.observe(plan, VerifyResult(plan.lengths * 0, np.ones(64, np.int64)))
            found.append(plan.lengths.tolist())
        plans.append(found)
    assert plans[0][0] == plans[1][0]
    assert plans[0] != plans[1]


def test_every_row_verifies_up_to_the_width_its_limit_and_its_block() -> None:
    schedule, running = opened(4), rows_of(4)
    for row, new in zip(running, (400, 4, 2, 400), strict=True):
        row.prompt = Prompt(row.prompt.row, (1,) * 100, SamplingParams(new))
    block = block_of(np.full((4, GAMMA), 0.99))
    block.lengths[3] = 1
    for _ in range(20):
        schedule.drafts(running)
        plan = schedule.plan(running, block)
        schedule.observe(plan, VerifyResult(plan.lengths, np.ones(4, np.int64)))
    assert plan.lengths.tolist() == [7, 2, 0, 1]


def test_a_row_s_own_blocks_count_until_it_ends() -> None:
    """The next row in its slot begins with what is usual."""
    schedule, running = opened(2), rows_of(2)
    confidence = np.array([[0.95] * GAMMA, [0.1] * GAMMA])
    for _ in range(30):
        one_round(schedule, running, confidence)
    own = schedule._own_or_usual()
    np.testing.assert_allclose(own, np.cumprod(confidence, axis=1), rtol=0.05, atol=0.01)
    other = Prompt(9, (1,) * 100, SamplingParams(400))
    running[0] = RunningRow(other, 0, [1] * 101, 100, num_taken=100)
    schedule.drafts(running)
    np.testing.assert_allclose(schedule._own_or_usual()[0], schedule._usual)
    assert 0.3 < schedule._usual[0] < 0.7


def test_without_confidence_nothing_is_expected() -> None:
    schedule, running = opened(1), rows_of(1)
    confidence = np.full((1, GAMMA), 0.9)
    confidence[0, 2] = np.nan
    schedule.drafts(running)
    plan = schedule.plan(running, block_of(confidence))
    schedule.observe(plan, nothing_accepted(1))
    assert schedule._own[0, 1] > 0.3
    assert np.isfinite(schedule._own).all()


# --- auto ----------------------------------------------------------------------------------------


def seconds(draft: Draft, spec: str, *, rows: int, costs: CostTable = GPU) -> Clocked:
    engine = Clocked(draft, rows, costs=costs)
    run(engine, spec, number=8 * rows)
    return engine


@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64])
def test_auto_drafts_where_that_is_faster(rows: int) -> None:
    plain, auto = (seconds(GOOD, spec, rows=rows) for spec in ("off", "auto"))
    assert plain.seconds / auto.seconds > (1.6 if rows <= 32 else 1.2)
    assert len(auto.draft_sizes) > 0.8 * len(auto.losses)


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize(
    "draft",
    [Draft(0.2, 6), Draft(0.2, 6, promise=0.9), Draft(6, 1.5, lies=True)],
    ids=["hopeless", "praised", "liar"],
)
@pytest.mark.parametrize("dear", [1.0, 5.0])
def test_auto_is_never_much_slower_than_plain_decoding(
    draft: Draft, rows: int, dear: float
) -> None:
    """A round is made only if the account covers all of it, so at any moment, and no more."""
    costs = gpu(draft=dear, eight=dear, intake_seconds=1e-6)
    plain, auto = (seconds(draft, spec, rows=rows, costs=costs) for spec in ("off", "auto"))
    assert auto.seconds <= plain.seconds / 0.98
    losses = np.cumsum(np.array(auto.losses) / auto.plain_steps)
    rounds = np.arange(1, len(losses) + 1)
    assert auto.draft_sizes
    assert (losses <= 1.001 * (3.0 + 0.005 * rounds)).all()


def test_a_draft_that_becomes_good_is_noticed() -> None:
    """By looks at few rows, for which the rest of the batch is not verified."""
    schedule, running = opened(64, spec="auto"), rows_of(64)
    sizes, widths = [], []
    for turn in range(2500):
        confidence = np.full((64, GAMMA), 0.1 if turn < 300 else 0.95)
        chosen = schedule.drafts(running)
        sizes.append(len(chosen))
        block = None
        if chosen:
            places = [row.slot for row in chosen]
            block = DraftBlock.empty(64, GAMMA).updated(places, block_of(confidence[places]))
        plan = schedule.plan(running, block)
        widths.append(plan.longest)
        accepted = plan.lengths if turn >= 300 else plan.lengths * 0
        schedule.observe(plan, VerifyResult(accepted, np.ones(64, np.int64)))
    assert set(sizes[:300]) == {0, 4}
    assert set(widths[:300]) == {1}
    assert sizes[-1] == 64
    assert sizes.index(64) < 1500


@pytest.mark.parametrize(
    ("rows", "intake", "likely"), [(64, 4e-7, 0.9), (256, 1e-7, 0.75)], ids=["64", "256"]
)
def test_context_that_cannot_be_paid_at_once_is_taken_in_by_some_rows_first(
    rows: int, intake: float, likely: float
) -> None:
    """64 rows gain when some of them draft. Of 256 all must; before, some only take it in."""
    schedule, running = opened(rows, gpu(intake_seconds=intake), spec="auto"), rows_of(rows)
    schedule._outlook.count(rows, num_passing=rows)  # enough was seen
    survival = likely ** np.arange(1.0, 1 + GAMMA)
    schedule._usual, schedule._num_blocks = survival, 64.0
    kept = np.round([0.0, *np.cumsum(survival)]).astype(int)  # of so many drafts
    for row in running:
        row.num_taken = 0
        row.tokens = [1] * 300
    sizes = []
    while sizes[-3:] != [rows] * 3 and len(sizes) < 1500:
        chosen = schedule.drafts(running)
        sizes.append(len(chosen))
        for row in chosen:
            row.num_taken = row.anchor_position
        places = [row.slot for row in chosen]
        part = block_of(np.full((len(chosen), GAMMA), likely))
        block = DraftBlock.empty(rows, GAMMA).updated(places, part) if chosen else None
        plan = schedule.plan(running, block)
        schedule.observe(plan, VerifyResult(kept[plan.lengths], np.ones(rows, int)))
        assert schedule._account >= -3.0
    assert 0 < sizes[0] < rows
    assert sizes[-1] == rows


def test_a_look_takes_the_rows_with_the_least_context_waiting() -> None:
    schedule, running = opened(16, spec="auto"), rows_of(16)
    for row in running:
        row.num_taken = 80 + row.slot
    assert sorted(row.slot for row in schedule.drafts(running)) == [12, 13, 14, 15]


def test_auto_rests_after_a_round_that_did_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking costs the host time that a plain step of many rows does not have."""
    asked = []

    def no(self: OneWidth, survival: Array) -> None:
        asked.append(len(survival))

    monkeypatch.setattr(OneWidth, "_worth_drafting", no)
    schedule, running = opened(4, spec="auto"), rows_of(4)
    for _ in range(24):
        assert not schedule.drafts(running)
        plan = schedule.plan(running, None)
        assert plan.lengths.tolist() == [0] * 4
        schedule.observe(plan, VerifyResult(np.zeros(4, np.int64), np.ones(4, np.int64)))
    assert asked == [4] * 3
