"""What only running tells: the cost table of this machine, and how far to trust the draft."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dspark_batch.algorithm import calibration
from dspark_batch.algorithm.costs import CostTable
from dspark_batch.decode import DecodeStats, decode
from dspark_batch.drafters import LOOKUPS
from dspark_batch.engine import Engine, open_engine, write_costs
from dspark_batch.job import Job
from dspark_batch.manifest import CalibrationInfo, DraftInfo
from dspark_batch.runtimes.session import Placement
from dspark_batch.types import (
    Completion,
    DraftBlock,
    Prompt,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)
from dspark_batch.types import (
    Sequence as Row,
)

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

_REPEATS = 3
_LONG_SWEEPS = 1.5  # seconds of two sweeps, after which a third would not tell much more
_CONTEXT_TOKENS = 128  # cached tokens of a row while costs are measured: a usual length
_LONG_CONTEXT = 1024
_LEAST_LONGER = 4  # times as long as usual, or nothing can be told from it
_MOST_CACHED = 16384  # tokens of all rows together, when contexts are long
_INTAKE_ROWS, _INTAKE_TOKENS = 4, 64  # that the draft takes in at once, to tell what that costs
_CALIBRATION_TOKENS = 32


def measure_costs(
    engine: Engine, *, context_tokens: int = _CONTEXT_TOKENS, clock: Clock = time.perf_counter
) -> CostTable:
    """Time target and draft passes over grids of rows, tokens and context.

    Every time is the least over sweeps in which all passes of a size take turns: what else runs on
    the machine for a while only adds, and is in one sweep of each, not in all sweeps of one. So do
    allocations, which are in the first.
    """
    widest = engine.block_size + 1
    rows = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < engine.max_rows] + [engine.max_rows]
    per_row = sorted({min(n, widest) for n in (1, 2, 4, 8)} | {widest})
    context = min(context_tokens, engine.max_tokens // 2)
    uniform, lone = [], []
    for num_rows in rows:
        first = np.arange(num_rows) == 0
        plans = [np.full(num_rows, width - 1) for width in per_row]
        plans += [first * (width - 1) for width in (2, widest)]
        found = _target_times(engine, context, plans, clock)
        uniform.append(found[: len(per_row)])
        lone.append(np.interp(per_row, (1, 2, widest), [found[0], *found[len(per_row) :]]))
    slopes = _context_slopes(engine, rows, context, np.array(uniform), clock)
    draft_seconds, intake, taken = _draft_times(engine, rows, context, clock)
    return CostTable.measured(
        rows,
        per_row,
        verify_seconds=uniform,
        lone_seconds=lone,
        draft_seconds=draft_seconds,
        intake_seconds=intake,
        context_tokens=context,
        context_seconds=slopes,
        draft_context_seconds=taken,
    )


def open_measured(
    folder: Path,
    *,
    job: Job,
    max_rows: int | None = None,
    threads: int = 0,
    progress: Callable[[str], None],
) -> Engine:
    """Open an engine as a job needs it: its draft unless it never drafts, costs if it weighs."""
    engine = open_engine(
        folder,
        max_rows=max_rows,
        with_draft=job.spec != "off",
        placement=Placement(device=job.device, threads=threads),
    )
    if job.needs_costs:
        ensure_costs(engine, progress=progress)
    return engine


def ensure_costs(engine: Engine, *, progress: Callable[[str], None]) -> None:
    """Give the engine this machine's cost table, measured now if none goes as far, and keep it.

    A folder that cannot be written keeps nothing; then every run measures.
    """
    known = engine.costs.rows[-1] if engine.costs else 0
    if known >= engine.max_rows or not engine.block_size:
        return
    progress("measuring the cost table of this machine")
    engine.costs = measure_costs(engine)
    try:
        write_costs(engine.folder, engine.hardware_key, engine.costs)
    except OSError as problem:
        logger.warning("the cost table is not kept: %s", problem)


def _context_slopes(
    engine: Engine,
    rows: Sequence[int],
    context: int,
    usual: NDArray[np.float64],
    clock: Clock,
) -> list[tuple[float, float]]:
    """[rows] what a cached token more of every row adds to `usual` [rows, widths] target passes.

    Of plain steps and of the widest pass, at three sizes; those between lie between. Empty where
    rows cannot be long; sizes whose caches would be too large get those of the largest one
    measured, in proportion.
    """
    room = {
        n: min(_LONG_CONTEXT, _MOST_CACHED // n, engine.max_tokens - usual.shape[1]) for n in rows
    }
    able = [n for n in rows if room[n] >= _LEAST_LONGER * context]
    if not able:
        return []
    # Attention costs by rows: few sizes tell those between. From many rows to few, because contexts
    # get longer on the way, so that every buffer has just its size.
    measured = sorted({able[0], able[len(able) // 2], able[-1]}, reverse=True)
    found: dict[int, tuple[float, float]] = {}
    for num_rows in measured:
        plain, *_, whole = usual[list(rows).index(num_rows)]
        plans = [np.full(num_rows, extra) for extra in (0, engine.block_size)]
        long_plain, long_whole = _target_times(engine, room[num_rows], plans, clock)
        longer = room[num_rows] - context
        slope = max(long_plain - plain, 0.0) / longer
        found[num_rows] = (slope, max((long_whole - whole) / longer, slope))
    grid = sorted(found)
    plain_slopes, whole_slopes = zip(*(found[n] for n in grid), strict=True)

    def at(num_rows: int, slopes: Sequence[float]) -> float:
        return float(np.interp(num_rows, grid, slopes)) * max(num_rows / grid[-1], 1.0)

    return [(at(n, plain_slopes), at(n, whole_slopes)) for n in rows]


def _target_times(
    engine: Engine, context: int, plans: Sequence[NDArray[np.int64]], clock: Clock
) -> list[float]:
    """Least seconds of target passes with these lengths [R], over sweeps in which all take turns.

    Rows stand at `context` without having been prefilled: what the caches hold does not matter to
    the time, only how far they reach.
    """

    tokens = np.zeros((len(plans[0]), engine.block_size), np.int64)
    with _standing(engine, len(plans[0]), context) as rows:

        def seconds(lengths: NDArray[np.int64]) -> float:
            block = DraftBlock(tokens, tokens.astype(np.float32), lengths)
            begin = clock()
            engine.verify(rows, block, VerifyPlan(lengths))
            return clock() - begin

        sweeps: list[list[float]] = []
        while len(sweeps) < 2 or (len(sweeps) < _REPEATS and sum(map(sum, sweeps)) < _LONG_SWEEPS):
            sweeps.append([seconds(lengths) for lengths in plans])
    return [min(times) for times in zip(*sweeps, strict=True)]


@contextmanager
def _standing(engine: Engine, num_rows: int, context: int) -> Iterator[list[Row]]:
    """Rows with `context` cached tokens, and an anchor after them."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, engine.vocab_size, (num_rows, context + 1)).tolist()
    rows = [
        Row(
            Prompt(slot, tuple(tokens), SamplingParams()),
            slot=slot,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
        )
        for slot, tokens in enumerate(prompts)
    ]
    for row in rows:
        engine.admit(row)
    try:
        yield rows
    finally:
        for row in rows:
            engine.release(row)


def _draft_times(
    engine: Engine, rows: Sequence[int], context: int, clock: Clock
) -> tuple[list[float], float, float]:
    """Median seconds of draft passes [rows] at `context`, and what a token of context adds: one
    that the pass takes in, and one that was taken in before.
    """

    def times(num_rows: int, num_prefilled: int, *, number: int) -> list[float]:
        """Of passes in a row; each but the first takes in one token of each row."""
        found = []
        with _standing(engine, num_rows, num_prefilled) as running:
            if num_prefilled:
                engine.prefill(running)
            for _ in range(number):
                begin = clock()
                engine.draft_pass(running)
                found.append(clock() - begin)
                engine.verify(running, None, VerifyPlan(np.zeros(num_rows, np.int64)))
        return found

    usual = {n: median(times(n, 0, number=_REPEATS + 1)[1:]) for n in rows}
    some = max(n for n in rows if n <= _INTAKE_ROWS)
    fresh = [times(some, _INTAKE_TOKENS, number=1)[0] for _ in range(_REPEATS + 1)][1:]
    intake = max(median(fresh) - usual[some], 0.0) / (some * (_INTAKE_TOKENS + 1))
    most = min(_LONG_CONTEXT, engine.max_tokens // 2)
    taken = max(median(times(1, most, number=2 * _REPEATS)[1:]) - usual[1], 0.0) / most
    return [usual[n] + n * taken * context for n in rows], intake, taken


class _Recorder:
    """An engine that notes the confidence and outcome of every block that was verified whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._block: DraftBlock | None = None
        self.found: list[calibration.Rounds] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: list[Row]) -> DraftBlock:
        self._block = self._engine.draft_raw(sequences)
        return self._block

    def verify(
        self, sequences: list[Row], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        assert self._block is not None
        result = self._engine.verify(sequences, block, plan)
        whole = plan.lengths == self._engine.block_size
        rows = np.array([s.prompt.row for s in sequences])
        matches = self._block.matches
        matches = np.zeros_like(rows) if matches is None else matches
        parts = (result.num_accepted, rows, matches)
        found = calibration.Rounds(self._block.confidence, *parts).of(whole)
        self.found.append(found)
        return result


def observe_rounds(
    engine: Engine, prompts: Sequence[Prompt]
) -> tuple[calibration.Rounds, list[Completion]]:
    """Decode the prompts, verifying every block whole: no position is seen only if it looked good.

    Blocks that the end of a row cuts short are left out.
    """
    recorder = _Recorder(engine)
    done = list(decode(prompts, recorder, spec="on", stats=DecodeStats()))  # type: ignore[arg-type]
    return calibration.concatenate(recorder.found, engine.block_size), done


def calibrate(engine: Engine, prompts: Sequence[Sequence[int]]) -> DraftInfo:
    """The engine's draft with the confidence and acceptance that rounds of the prompts justify.

    Greedy rows and sampled ones have each their own, the latter of temperature 1 and of every other
    prompt: their passes take longer.
    """
    draft = engine.manifest.draft
    assert draft is not None
    new_tokens = min(_CALIBRATION_TOKENS, engine.max_tokens - max(len(p) for p in prompts))
    params = SamplingParams(max_new_tokens=new_tokens)
    source = [Prompt(i, tuple(ids), replace(params, seed=i)) for i, ids in enumerate(prompts)]
    sampling = [replace(p, params=replace(p.params, temperature=1.0)) for p in source[::2]]
    observed = [observe_rounds(engine, rows) for rows in (source, sampling)]
    rounds = [found for found, _ in observed]
    if draft.lookup is not None:
        texts = [[(prompts[c.row], c.token_ids) for c in done] for _, done in observed]
        draft, rounds = _with_learnt_lookup(draft, rounds, texts)
    own = [found.matches == 0 if draft.has_network else None for found in rounds]
    greedy, sampled = (
        calibration.calibrated(found, scaled=scaled)
        for found, scaled in zip(rounds, own, strict=True)
    )
    found = {
        "confidence_temperatures": greedy.temperatures,
        "acceptance": greedy.acceptance,
        "sampled_temperatures": sampled.temperatures,
        "sampled_acceptance": sampled.acceptance,
        "calibration": (_described("greedy", greedy), _described("sampled", sampled)),
    }
    calibrated: DraftInfo = draft.model_copy(update=found)
    return calibrated


def _with_learnt_lookup(
    draft: DraftInfo,
    rounds: Sequence[calibration.Rounds],
    texts: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
) -> tuple[DraftInfo, list[calibration.Rounds]]:
    """The draft with what its lookup learns of the rounds, and the rounds as it rates them.

    `rounds` and `texts` (prompts and new tokens) are of greedy rows, then of sampled ones.
    """
    assert draft.lookup is not None
    lookup = import_module(LOOKUPS[draft.lookup.drafter])
    if draft.has_network:
        found = [lookup.observed(rows) for rows in rounds]
    else:
        found = [lookup.replayed(draft, rows) for rows in texts]
    draft = lookup.learnt(draft, greedy=found[0], sampled=found[1])
    rate = lookup.rated if draft.has_network else lookup.rounds
    seen: Sequence[Any] = rounds if draft.has_network else texts
    return draft, [rate(draft, rows, sampled=i > 0) for i, rows in enumerate(seen)]


def _described(rows: Literal["greedy", "sampled"], fit: calibration.Calibrated) -> CalibrationInfo:
    return CalibrationInfo(
        rows=rows,
        num_rounds=fit.num_rounds,
        error_before=fit.error_before,
        error_after=fit.error_after,
    )
