"""One run of a job: lock, resume, decode what is pending, record, sum up.

The rows themselves flow through `flow`, here or in the workers of a `crew`; this module counts what
it hears of them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dspark_batch.errors import DSparkError, InputError, RowErrorsExceeded, StoppedEarly
from dspark_batch.job.crew import Crew, CrewRun
from dspark_batch.job.definition import Job
from dspark_batch.job.flow import Decode, Flow, RowDone
from dspark_batch.job.output import OutputFolder
from dspark_batch.job.parts import Part
from dspark_batch.job.progress import Progress, RunState
from dspark_batch.job.record import RecordedEngine, RunRecord
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.shards import Shard
from dspark_batch.job.stop import Stop
from dspark_batch.job.summary import Counts, Summary, rows_line
from dspark_batch.job.worker import PHASES, SAVED, measured

if TYPE_CHECKING:
    from dspark_batch.decode import DecodeStats
    from dspark_batch.engine import Engine


class OpenEngine(Protocol):
    """`engine.open_engine`."""

    def __call__(self, folder: Path, *, max_rows: int | None = None) -> Engine:
        """Load an engine folder."""


class _Run:
    """What a run comes to, as it hears it: a `CrewWatcher`, and a `Stopping` that says so once."""

    def __init__(
        self,
        plan: ShardPlan,
        output: OutputFolder,
        *,
        stop: Stop,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self.problem: str | None = None
        """Why no more came of it, if not for a stop."""
        self.num_workers = 1
        self.seconds: Mapping[str, float] = {}
        self._load_seconds = self._wall_seconds = 0.0
        self._counts = self._counts_before = Counts()
        self._num_parts = self._num_parts_before = 0
        self._plan = plan
        self._output = output
        self._stop = stop
        self._stop_is_shown = False
        self._progress = progress
        self._clock = clock
        self._began = self._decoding_began = clock()
        self._state = RunState(num_rows=plan.num_rows)

    def resume(self, fingerprint: Mapping[str, str]) -> list[Shard]:
        """Find the parts of earlier runs, and return the shards that have none."""
        parts = self._output.parts()
        pending = self._plan.pending(parts, engine=fingerprint)
        self._num_parts = self._num_parts_before = len(parts)
        counts = sum((part.counts for part in parts), start=Counts())
        self._counts = self._counts_before = counts
        self._state.num_done = self._state.num_done_before = counts.num_rows
        self._state.num_errors = counts.num_errors
        return pending

    @property
    def reason(self) -> str | None:
        """See `flow.Stopping`."""
        reason = self._stop.reason
        if reason and not self._stop_is_shown:
            self._stop_is_shown = True
            self.phase(f"stopping for {reason}: the running rows are finished first")
        return reason

    def phase(self, text: str) -> None:
        """See `crew.CrewWatcher`."""
        self._progress.phase(text)

    def ready(self) -> None:
        """An engine is open: from here on rows are decoded."""
        if not self._load_seconds:
            self._decoding_began = self._clock()
            self._load_seconds = self._decoding_began - self._began

    def row(self, done: RowDone) -> None:
        """See `flow.Watcher`."""
        state = self._state
        state.seconds = self._clock() - self._decoding_began
        state.num_done += 1
        state.num_errors += done.is_error
        state.num_new_tokens += done.num_new_tokens
        state.num_rounds += done.num_rounds
        state.num_accepted_tokens += done.num_accepted_tokens
        self._progress.update(state)

    def lost(self, num_rows: int, num_errors: int) -> None:
        """See `crew.CrewWatcher`."""
        self._state.num_done -= num_rows
        self._state.num_errors -= num_errors

    def part(self, shard: Shard, part: Part) -> None:
        """See `flow.Watcher`."""
        self._num_parts += 1
        self._counts += part.counts

    def ended(self) -> None:
        """Decoding has ended."""
        self._wall_seconds = self._clock() - self._decoding_began

    def summary(self, *, argv: Sequence[str]) -> Summary:
        """The summary so far. Raises `DSparkError` if a row got lost."""
        return Summary(
            self._output.folder,
            self._counts,
            num_input_rows=self._plan.num_rows,
            num_parts=self._num_parts,
            num_planned_parts=len(self._plan.shards),
            num_run_parts=self._num_parts - self._num_parts_before,
            num_run_rows=self._counts.num_rows - self._counts_before.num_rows,
            num_run_new_tokens=self._state.num_new_tokens,
            num_workers=self.num_workers,
            load_seconds=self._load_seconds,
            wall_seconds=self._wall_seconds,
            phase_seconds={name: self.seconds.get(name, 0.0) for name in PHASES},
            saved_seconds=self.seconds.get(SAVED, 0.0),
            failure=self._failure(argv),
        )

    def _failure(self, argv: Sequence[str]) -> StoppedEarly | RowErrorsExceeded | None:
        counts, num_parts, num_planned = self._counts, self._num_parts, len(self._plan.shards)
        if num_parts < num_planned:
            reason = self._stop.reason or self.problem
            if reason is None:
                raise DSparkError(f"decode ended with {num_parts} of {num_planned} parts")
            again = shlex.join(["dspark-batch", *(word for word in argv if word != "--overwrite")])
            return StoppedEarly(
                f"stopped early for {reason}: {num_parts} of {num_planned} parts are written",
                hint=f"continue with: {again}",
            )
        if counts.num_rows != self._plan.num_rows:
            raise DSparkError(f"{self._plan.num_rows} rows went in, {counts.num_rows} came out")
        allowed = self._plan.job.max_error_rate
        if counts.num_errors > allowed * counts.num_rows:
            return RowErrorsExceeded(
                f"{rows_line(counts)}: more than --max-error-rate {allowed:g} allows",
                hint=f"see the columns status and error in {self._output.data}",
            )
        return None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt at a run; the engine or the crew comes with the call."""

    plan: ShardPlan
    output: OutputFolder
    work: _Run
    progress: Progress
    argv: Sequence[str]
    overwrite: bool

    def run(self, engine: RecordedEngine, decode: Callable[[list[Shard]], None]) -> Summary:
        """Decode what is pending, with a record of it."""
        if self.overwrite:
            self.output.set_aside()
        pending = self.work.resume(engine.fingerprint)
        if not pending:
            return self.work.summary(argv=self.argv)
        with RunRecord(self.output, self.plan, engine, argv=self.argv) as record:
            num_rows = sum(shard.num_rows for shard in pending)
            self.progress.phase(f"decoding {num_rows:,} rows")
            decode(pending)
            self.work.ended()
            record.summary = self.work.summary(argv=self.argv)
            return record.summary

    def alone(self, engine: Engine, decode: Decode, stats: DecodeStats) -> Summary:
        """Decode with the engine that is open in this process."""
        self.work.ready()

        def decode_here(pending: list[Shard]) -> None:
            flow = Flow(self.plan, self.output, engine, stop=self.work, watcher=self.work)
            flow.decode(pending, decode, stats)
            self.work.seconds = measured(stats)

        return self.run(engine, decode_here)

    def together(self, crew: Crew) -> Summary:
        """Decode with workers, each with an engine of its own."""

        def decode_there(pending: list[Shard]) -> None:
            workers = CrewRun(crew, self.plan, stop=self.work, watcher=self.work)
            self.work.num_workers = min(crew.num_workers, len(pending))
            workers.decode(pending)
            self.work.problem = workers.problem
            self.work.seconds = {
                name: sum(seconds[name] for seconds in workers.seconds.values())
                for name in (*PHASES, SAVED)
            }

        return self.run(crew, decode_there)


def run(
    job: Job,
    *,
    open_engine: OpenEngine,
    decode: Decode,
    stats: DecodeStats,
    progress: Progress,
    argv: Sequence[str],
    overwrite: bool = False,
    crew: Crew | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Run the job, or what is left of it, and say what came of it.

    `stats` is filled in by `decode`, unless a `crew` does the work in processes of its own. `argv`
    are the arguments of the command, for the record and for the message that says how to continue.
    Row errors above the allowed share, and a stop, are `Summary.failure`; everything else that goes
    wrong is raised, after what is complete was kept.
    """
    stop = Stop(deadline=job.deadline, clock=clock)
    plan = ShardPlan.open(job)
    output = OutputFolder(job.output_folder)
    for file in plan.files.files:
        if file.path.resolve().is_relative_to(output.folder.resolve()):
            raise InputError(
                f"the input {file.path} lies in the output {output.folder}",
                hint="write elsewhere with -o FOLDER",
            )
    with stop.on_sigterm(), output.lock():
        progress.phase(f"loading engine {job.engine}")
        work = _Run(plan, output, stop=stop, progress=progress, clock=clock)
        attempt = _Attempt(plan, output, work, progress, argv, overwrite)
        if crew is not None:
            summary = attempt.together(crew)
        else:
            with closing(open_engine(job.engine, max_rows=job.max_rows)) as engine:
                summary = attempt.alone(engine, decode, stats)
        if summary.num_parts == summary.num_planned_parts:
            output.drop_replaced()
        return summary
