"""One run of a job: lock, resume, one continuous decode over all pending shards, commit, record.

decode() sees a single stream of prompts, so the batch never drains where a shard ends. A shard is
open from its first prompt to its commit; each open shard but the newest has a row in the batch, so
no more of them than rows in the batch are in memory.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dspark_batch.errors import DSparkError, InputError, RowErrorsExceeded, StoppedEarly
from dspark_batch.job import Job
from dspark_batch.output import OutputFolder
from dspark_batch.parts import commit_part
from dspark_batch.plan import JobPlan
from dspark_batch.progress import Progress, RunState
from dspark_batch.prompts import PromptPreparer
from dspark_batch.record import RunRecord
from dspark_batch.shards import OpenShard, Shard
from dspark_batch.stop import Stop
from dspark_batch.summary import Counts, Summary, rows_line
from dspark_batch.types import Completion, Prompt, RowError

if TYPE_CHECKING:
    from dspark_batch.decode import DecodeStats
    from dspark_batch.engine import Engine


class OpenEngine(Protocol):
    """`engine.open_engine`."""

    def __call__(self, folder: Path, *, max_rows: int | None = None) -> Engine:
        """Load an engine folder."""


class Decode(Protocol):
    """`decode.decode`."""

    def __call__(
        self,
        prompts: Iterable[Prompt],
        engine: Engine,
        *,
        spec: str,
        scheduler: str | None,
        confidence_threshold: float,
        stats: DecodeStats,
    ) -> Iterator[Completion]:
        """One completion per prompt, in any order."""


class _Run:
    """The rows on their way. Invariant: a row is in `_running` from its admission to its end."""

    def __init__(
        self,
        plan: JobPlan,
        output: OutputFolder,
        engine: Engine,
        *,
        stop: Stop,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self.load_seconds = 0.0
        self._wall_seconds = 0.0
        self._counts = self._counts_before = Counts()
        self._num_parts = self._num_parts_before = 0
        self._plan = plan
        self._output = output
        self._engine = engine
        self._preparer = PromptPreparer(plan.job, plan.columns, engine)
        self._stop = stop
        self._progress = progress
        self._clock = clock
        self._running: dict[int, OpenShard] = {}
        self._state = RunState(num_rows=plan.num_rows)

    def resume(self) -> list[Shard]:
        """Find the parts of earlier runs, and return the shards that have none."""
        parts = self._output.parts()
        pending = self._plan.pending(parts, engine=self._engine.fingerprint)
        self._num_parts = self._num_parts_before = len(parts)
        counts = sum((part.counts for part in parts), start=Counts())
        self._counts = self._counts_before = counts
        self._state.num_done = self._state.num_done_before = counts.num_rows
        self._state.num_errors = counts.num_errors
        return pending

    def decode(self, pending: Sequence[Shard], decode: Decode, stats: DecodeStats) -> None:
        """Decode the pending shards and commit those that become complete."""
        started, job = self._clock(), self._plan.job
        completions = decode(
            self._prompts(pending),
            self._engine,
            spec=job.spec,
            scheduler=job.scheduler,
            confidence_threshold=job.confidence_threshold,
            stats=stats,
        )
        for completion in completions:
            self._state.seconds = self._clock() - started
            self._take(completion)
        self._wall_seconds = self._clock() - started
        if self._running:
            raise DSparkError(f"decode ended without row {min(self._running)}")

    def _prompts(self, pending: Sequence[Shard]) -> Iterator[Prompt]:
        """The prompts of all shards in one stream; ends early once there is a reason to stop."""
        for shard, table in self._plan.files.read(pending):
            opened = OpenShard(shard, table)
            prompts = []
            for prepared in self._plan.prepare(shard, table, self._preparer):
                if prepared.prompt is None:
                    opened.fail(prepared)
                    self._count(prepared.error)
                else:
                    prompts.append(prepared.prompt)
            if opened.is_complete:
                self._commit(opened)
            # Rows of like length share a cache bucket; turning round at every shard keeps the
            # neighbours alike across its border as well.
            prompts.sort(key=lambda prompt: len(prompt.token_ids), reverse=shard.index % 2 == 1)
            for prompt in prompts:
                if self._stop.reason:
                    break
                self._running[prompt.row] = opened
                opened.admit(prompt)
                yield prompt
            if self._stop.reason:
                self._progress.phase(f"stopping for {self._stop.reason}: ending the running rows")
                return

    def _take(self, completion: Completion) -> None:
        opened = self._running.pop(completion.row, None)
        if opened is None:
            raise DSparkError(f"decode completed row {completion.row}, which was not running")
        opened.complete(completion)
        self._state.num_new_tokens += len(completion.token_ids)
        self._state.num_rounds += completion.spec.num_rounds
        self._state.num_accepted_tokens += completion.spec.num_accepted_tokens
        self._count(completion.error)
        if opened.is_complete:
            self._commit(opened)

    def _count(self, error: RowError | None) -> None:
        self._state.num_done += 1
        self._state.num_errors += error is not None
        self._progress.update(self._state)

    def _commit(self, opened: OpenShard) -> None:
        shard = opened.shard
        part = commit_part(
            self._output.data / shard.part_name,
            opened.table,
            opened.rows(),
            schema=self._plan.schema,
            fingerprint=self._plan.fingerprint(shard, engine=self._engine.fingerprint),
            temporary=self._output.temporary(shard.part_name),
        )
        self._num_parts += 1
        self._counts += part.counts

    def summary(self, stats: DecodeStats, *, argv: Sequence[str]) -> Summary:
        """What there is now; raises `DSparkError` if a row got lost."""
        return Summary(
            self._output.folder,
            self._counts,
            num_input_rows=self._plan.num_rows,
            num_parts=self._num_parts,
            num_planned_parts=len(self._plan.shards),
            num_run_parts=self._num_parts - self._num_parts_before,
            num_run_rows=self._counts.num_rows - self._counts_before.num_rows,
            num_run_new_tokens=self._state.num_new_tokens,
            load_seconds=self.load_seconds,
            wall_seconds=self._wall_seconds,
            phase_seconds={
                "draft": stats.draft_seconds,
                "verify": stats.verify_seconds,
                "prefill": stats.prefill_seconds,
                "host": stats.host_seconds,
            },
            failure=self._failure(argv),
        )

    def _failure(self, argv: Sequence[str]) -> StoppedEarly | RowErrorsExceeded | None:
        counts, num_parts, num_planned = self._counts, self._num_parts, len(self._plan.shards)
        if num_parts < num_planned:
            if self._stop.reason is None:
                raise DSparkError(f"decode ended with {num_parts} of {num_planned} parts")
            again = shlex.join(["dspark-batch", *(word for word in argv if word != "--overwrite")])
            return StoppedEarly(
                f"stopped early for {self._stop.reason}: {num_parts} of {num_planned} parts are "
                f"there; continue with: {again}"
            )
        if counts.num_rows != self._plan.num_rows:
            raise DSparkError(f"{self._plan.num_rows} rows went in, {counts.num_rows} came out")
        allowed = self._plan.job.max_error_rate
        if counts.num_errors > allowed * counts.num_rows:
            return RowErrorsExceeded(
                f"{rows_line(counts)}: more than the share of {allowed:g} that --max-error-rate "
                f"allows; see the columns status and error in {self._output.data}"
            )
        return None


def run(
    job: Job,
    *,
    open_engine: OpenEngine,
    decode: Decode,
    stats: DecodeStats,
    progress: Progress,
    argv: Sequence[str],
    overwrite: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Run the job, or what is left of it, and say what came of it.

    `stats` is filled in by `decode`. `argv` are the arguments of the command, for the record and
    for the message that says how to continue. Row errors above the allowed share, and a stop, are
    `Summary.failure`; everything else that goes wrong is raised, after what is complete was kept.
    """
    stop = Stop(deadline=job.deadline, clock=clock)
    plan = JobPlan.of(job)
    output = OutputFolder(job.output_folder)
    for file in plan.files.files:
        if file.path.resolve().is_relative_to(output.folder.resolve()):
            raise InputError(f"the input {file.path} lies in the output {output.folder}")
    with stop.on_sigterm(), output.lock():
        progress.phase(f"loading engine {job.engine}")
        started = clock()
        with closing(open_engine(job.engine, max_rows=job.max_rows)) as engine:
            work = _Run(plan, output, engine, stop=stop, progress=progress, clock=clock)
            work.load_seconds = clock() - started
            if overwrite:
                output.set_aside()
            pending = work.resume()
            if pending:
                with RunRecord(output, plan, engine, argv=argv) as record:
                    num_rows = sum(shard.num_rows for shard in pending)
                    progress.phase(f"decoding {num_rows:,} rows")
                    work.decode(pending, decode, stats)
                    summary = record.summary = work.summary(stats, argv=argv)
            else:
                summary = work.summary(stats, argv=argv)
        if summary.num_parts == summary.num_planned_parts:
            output.drop_replaced()
        return summary
