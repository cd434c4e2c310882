"""`bench --simulate` from end to end: record or read rounds, choose a machine, simulate, draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.bench.forecast.figures import draw_figures
from dspark_batch.bench.forecast.machines import Machine, measured_machine, roofline_machine
from dspark_batch.bench.forecast.roofline import Roofline
from dspark_batch.bench.forecast.rounds import Rounds, read_rounds, record, write_rounds
from dspark_batch.bench.forecast.simulation import Simulation, run_simulation
from dspark_batch.errors import StorageError, UsageError

if TYPE_CHECKING:
    from dspark_batch.engine import Engine

logger = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.parquet"
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked. None means the default, or that there is none."""

    prompts: Path | None
    """Recorded with the engine, unless there is a record."""
    rounds: Path | None
    engine: Path
    new_tokens: int
    limit: int | None
    gpu: str | None
    """None: the machine that the engine was measured on, this one."""
    model: str | None
    dtype: str | None
    assume: Sequence[str]
    rows: Sequence[int]
    floor: float | None
    output: Path | None

    def __post_init__(self) -> None:
        """Raise `UsageError` where the parts do not fit together."""
        if (self.prompts is None) == (self.rounds is None):
            raise UsageError("give PROMPTS to record, or --rounds FILE with a record, not both")
        if self.gpu is None and (self.model or self.dtype or self.assume):
            raise UsageError("--model, --dtype and --assume are for a GPU", hint="add --gpu NAME")
        if self.gpu is not None and self.model is None:
            raise UsageError("--gpu needs the size of a model", hint="add --model NAME")
        if self.gpu is not None:
            self.roofline(block_size=1, context=1.0)  # before minutes of recording

    def roofline(self, block_size: int, context: float) -> Roofline:
        """That of the GPU. Raises `UsageError` for a name or a figure that cannot be."""
        assert self.gpu is not None
        assert self.model is not None
        found = Roofline.for_gpu(
            self.gpu, self.model, dtype=self.dtype, block_size=block_size, context=context
        )
        return found.assume(self.assume)

    @property
    def folder(self) -> Path:
        """Where the record and the figures go. Raises `UsageError` if none was given."""
        if self.output is not None:
            return self.output
        if self.rounds is not None:
            return self.rounds.parent
        assert self.prompts is not None
        if not self.prompts.is_file():
            raise UsageError(f"there is no default output for {self.prompts}", hint="add -o FOLDER")
        return self.prompts.with_suffix(".simulation")


def forecast(question: Question, *, progress: Progress) -> Simulation:
    """Answer the question, and leave the record and the figures in its folder.

    Without matplotlib there are no figures, and the log says so.
    """
    folder = question.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(f"cannot make {folder}: {exc.strerror or exc}") from exc
    rounds = read_rounds(question.rounds) if question.rounds is not None else None
    machine = None
    if rounds is None or question.gpu is None:
        with closing(_open(question.engine)) as engine:
            rounds = rounds or _record(question, engine, folder / ROUNDS_FILE, progress)
            machine = _this_machine(engine, progress) if question.gpu is None else None
    machine = machine or roofline_machine(
        question.roofline(rounds.block_size, rounds.mean_context), rounds
    )
    simulation = run_simulation(
        rounds, machine, rows=question.rows, floor=question.floor, progress=progress
    )
    try:
        draw_figures(simulation, folder)
    except UsageError as missing:
        logger.warning("%s", missing)
    return simulation


def _open(folder: Path) -> Engine:
    from dspark_batch.engine import open_engine

    engine = open_engine(folder)
    if not engine.block_size:
        engine.close()
        raise UsageError(f"{folder} has no draft, so there is nothing to simulate")
    return engine


def _record(question: Question, engine: Engine, path: Path, progress: Progress) -> Rounds:
    from dspark_batch.bench import read_workload

    assert question.prompts is not None
    found = read_workload(
        question.prompts, engine, new_tokens=question.new_tokens, limit=question.limit
    )
    prompts = found.resized(len(found.prompts)).prompts
    progress(f"recording rounds of {len(prompts)} prompts")
    rounds = record(engine, prompts)
    write_rounds(path, rounds)
    return rounds


def _this_machine(engine: Engine, progress: Progress) -> Machine:
    from dspark_batch.engine import ensure_costs

    ensure_costs(engine, progress=progress)
    assert engine.costs is not None
    return measured_machine(f"{engine.hardware_key}, {engine.name}", engine.costs)
