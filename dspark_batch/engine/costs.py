"""The cost table of this machine: measured with the engine itself, and kept beside it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, Prompt, SamplingParams, VerifyPlan
from dspark_batch.decode import RunningRow as Row
from dspark_batch.decode.algorithm import CostTable
from dspark_batch.engine.files import write_json
from dspark_batch.engine.manifest import COSTS_FILE
from dspark_batch.errors import StorageError

if TYPE_CHECKING:
    from dspark_batch.engine.engine import Engine


logger = logging.getLogger(__name__)

Clock = Callable[[], float]

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # and the most
_TOKENS_PER_ROW = (1, 2, 4, 8)  # and a whole block's
_REPEATS = 3
_LONG_SWEEP = 0.75  # seconds of the second sweep, after which a third would not tell much more
_CONTEXT_TOKENS = 128  # cached tokens of a row while costs are measured: a usual length
_LONG_CONTEXT = 1024
_LEAST_LONGER = 4  # times as long as usual, or nothing can be told from it
_MOST_CACHED = 16384  # tokens of all rows together, when contexts are long
_INTAKE_ROWS, _INTAKE_TOKENS = 4, 64  # that the draft takes in at once, to tell what that costs


def measure_costs(
    engine: Engine, *, context_tokens: int = _CONTEXT_TOKENS, clock: Clock = time.perf_counter
) -> CostTable:
    """Time target and draft passes over grids of rows, tokens and context.

    Each time is the least over sweeps in which all passes of a size take turns. Whatever else runs
    on the machine only adds, and disturbs one sweep of each pass rather than all sweeps of one. The
    first sweep also has the allocations, and waits for kernels that are compiled for a new size.

    Where passes are padded, the grids are the runtime's shapes, as far as a run can use them. The
    first pass of each captures its graph and is not timed.
    """
    shapes = engine.padded_shapes
    widest = engine.block_size + 1
    rows = _up_to(shapes.rows if shapes else _ROWS, engine.max_rows)
    per_row = _up_to(shapes.tokens_per_row if shapes else _TOKENS_PER_ROW, widest)
    context = min(context_tokens, engine.max_tokens // 2)
    uniform, lone = [], []
    for num_rows in rows:
        if shapes:
            plans = [np.full(num_rows, width - 1) for width in per_row]
            uniform.append(_target_times(engine, context, plans, clock))
            continue
        first = np.arange(num_rows) == 0
        plans = [np.full(num_rows, width - 1) for width in per_row]
        plans += [first * (width - 1) for width in (2, widest)]
        found = _target_times(engine, context, plans, clock)
        uniform.append(found[: len(per_row)])
        lone.append(np.interp(per_row, (1, 2, widest), [found[0], *found[len(per_row) :]]))
    slopes = _context_slopes(engine, rows, context, np.array(uniform), clock)
    draft_seconds, intake, taken = _draft_times(engine, rows, context, clock)
    narrow = engine.narrow_block
    narrow_seconds: Sequence[float] = ()
    if narrow is not None:
        narrow_seconds, *_ = _draft_times(engine, rows, context, clock, width=narrow)
    return CostTable.measured(
        rows,
        per_row,
        verify_seconds=uniform,
        lone_seconds=uniform if shapes else lone,
        draft_seconds=draft_seconds,
        narrow_block=narrow,
        narrow_seconds=narrow_seconds,
        intake_seconds=intake,
        context_tokens=context,
        context_seconds=slopes,
        draft_context_seconds=taken,
        padded=shapes is not None,
    )


def _up_to(grid: Sequence[int], most: int) -> list[int]:
    """The sizes below the most that are used, and that one: it may be less than its shape holds."""
    return [size for size in grid if size < most] + [most]


def ensure_costs(engine: Engine, *, progress: Callable[[str], None]) -> None:
    """Give the engine this machine's cost table; measure and keep it if none has enough rows.

    If the folder cannot be written, every run measures again.
    """
    known = engine.costs.rows[-1] if engine.costs else 0
    if known >= engine.max_rows or not engine.block_size:
        return
    progress("measuring the cost table of this machine")
    engine.costs = measure_costs(engine)
    try:
        write_costs(engine.folder, engine.hardware_key, engine.costs)
    except StorageError as problem:
        logger.warning("the cost table is not kept: %s", problem)


def _context_slopes(
    engine: Engine,
    rows: Sequence[int],
    context: int,
    usual: NDArray[np.float64],
    clock: Clock,
) -> list[tuple[float, float]]:
    """[rows] seconds that a further cached token of every row adds to a target pass.

    Two numbers: for plain steps and for the widest pass. They are measured at three sizes and
    interpolated; sizes whose caches would be too large get those of the largest one in proportion.
    `usual` [rows, widths] are passes at the usual context. Empty if rows cannot be long.
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

    Padded passes have another sweep ahead of these, in which a graph is captured for each shape.
    Rows stand at `context` without a prefill: the time depends on how far the caches reach, not on
    what they hold.
    """

    tokens = np.zeros((len(plans[0]), engine.block_size), np.int64)
    with _standing(engine, len(plans[0]), context) as rows:

        def seconds(lengths: NDArray[np.int64]) -> float:
            block = DraftBlock(tokens, tokens.astype(np.float32), lengths)
            begin = clock()
            engine.verify(rows, block, VerifyPlan(lengths))
            return clock() - begin

        if engine.padded_shapes:
            for lengths in plans:
                seconds(lengths)
        sweeps: list[list[float]] = []
        # How long the first one takes says nothing of the next, where it compiles.
        while len(sweeps) < 2 or (len(sweeps) < _REPEATS and sum(sweeps[1]) < _LONG_SWEEP):
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
    engine: Engine, rows: Sequence[int], context: int, clock: Clock, *, width: int | None = None
) -> tuple[list[float], float, float]:
    """Median seconds of draft passes [rows] at `context`, and what a token of context adds: one
    that the pass takes in, and one that was taken in before.
    """

    def times(num_rows: int, num_prefilled: int, *, number: int) -> list[float]:
        """Of consecutive passes; each but the first takes in one token of each row."""
        found = []
        with _standing(engine, num_rows, num_prefilled) as running:
            if num_prefilled:
                engine.prefill(running)
            for _ in range(number):
                begin = clock()
                engine.draft_pass(running, width)
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


def read_costs(folder: Path, key: str) -> CostTable | None:
    """The table of hardware `key`; None if there is none, or only one of an older form."""
    path = folder / COSTS_FILE
    tables = json.loads(path.read_bytes()) if path.exists() else {}
    try:
        return CostTable.from_json(tables[key])
    except KeyError:
        return None


def write_costs(folder: Path, key: str, costs: CostTable) -> None:
    """Add or replace the table of hardware `key`."""
    path = folder / COSTS_FILE
    tables = json.loads(path.read_bytes()) if path.exists() else {}
    tables[key] = costs.to_json()
    write_json(path, tables)
