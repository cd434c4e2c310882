"""Several workers on one job: who decodes what, and what happens when one of them dies.

The crew is the process that holds the lock. It hands shards out one at a time, so that a slow
worker gets fewer; parts are the workers' to write. A worker that dies leaves its open shards to
the others; without others the run stops early, and the same command continues it.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from dspark_batch.engine import EngineManifest, find_gpus, num_cores, read_manifest
from dspark_batch.engine.runtimes import Placement, runtime_module
from dspark_batch.errors import EngineError
from dspark_batch.job.definition import Job
from dspark_batch.job.flow import Decode, RowDone, Stopping, Watcher
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.shards import Shard
from dspark_batch.job.worker import (
    Committed,
    Failed,
    Message,
    OpenWorkerEngine,
    Phase,
    Ready,
    Request,
    Task,
    work,
)

_POLL_SECONDS = 0.2  # after which a deadline is noticed
_JOIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers that a job gets."""

    manifest: EngineManifest
    open_engine: OpenWorkerEngine
    decode: Decode
    threads: int
    """Of each worker, on the CPU."""
    gpus: tuple[str | None, ...]
    """By worker: the only GPU that it sees, None on the CPU."""

    @property
    def num_workers(self) -> int:
        """Number of worker processes."""
        return len(self.gpus)

    @property
    def name(self) -> str:
        """See `record.RecordedEngine`."""
        return self.manifest.name

    @property
    def fingerprint(self) -> dict[str, str]:
        """See `record.RecordedEngine`."""
        return self.manifest.fingerprint()

    @property
    def block_size(self) -> int:
        """γ; 0 without a draft."""
        return self.manifest.draft.block_size if self.manifest.draft else 0

    @property
    def costs(self) -> object | None:
        """Never None: a worker that needs costs measures them if there are none."""
        return self.manifest.draft


class CrewWatcher(Watcher, Protocol):
    """Is told what happens to rows, shards and workers."""

    def phase(self, text: str) -> None:
        """A phase begins, such as "loading engine"."""

    def ready(self) -> None:
        """The first worker has opened its engine."""

    def lost(self, num_rows: int, num_errors: int) -> None:
        """Rows that were done are to be done again: their worker died before the commit."""


@dataclass(slots=True)
class _Member:
    """A worker that was started. Invariant: `open` are the shards that it has and not committed."""

    number: int
    process: BaseProcess
    pipe: connection.Connection
    open: dict[int, Shard] = field(default_factory=dict)
    rows: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """Shard and whether it is an error -> rows done, of open shards."""
    is_waiting: bool = False
    """For the answer to a request."""


class CrewRun:
    """The workers while they decode."""

    def __init__(
        self, crew: Crew, plan: ShardPlan, *, stop: Stopping, watcher: CrewWatcher
    ) -> None:
        self.seconds: dict[int, dict[str, float]] = {}
        """By worker."""
        self.problem: str | None = None
        """Why it ended before its time, in words."""
        self._crew = crew
        self._plan = plan
        self._stop = stop
        self._watcher = watcher
        self._context = multiprocessing.get_context("spawn")
        self._flag = self._context.RawValue("b", 0)  # without a lock that a dead worker could hold
        self._queue: deque[Shard] = deque()
        self._members: dict[connection.Connection, _Member] = {}
        self._absent: list[int] = []

    def decode(self, pending: Sequence[Shard]) -> None:
        """Have the shards decoded. Raises what a worker raised; `problem` says if some are left."""
        self._queue.extend(pending)
        num_workers = min(self._crew.num_workers, len(pending))
        self._absent = list(range(2, num_workers + 1))
        try:
            self._start(1)
            if not self._plan.job.needs_costs:  # or it measures them, undisturbed
                self._start_absent()
            while self._members:
                if self._stop.reason and not self._flag.value:
                    self._flag.value = 1
                    self._absent.clear()
                for pipe in connection.wait(list(self._members), _POLL_SECONDS):
                    self._hear(self._members[pipe])  # type: ignore[index]
                self._answer()
        finally:
            for member in self._members.values():
                member.process.kill()
                member.process.join(_JOIN_SECONDS)

    def _start(self, number: int) -> None:
        mine, theirs = self._context.Pipe()
        gpu = self._crew.gpus[number - 1]
        task = Task(
            number,
            self._plan,
            self._crew.open_engine,
            self._crew.decode,
            self._crew.threads,
            {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu},
        )
        process = self._context.Process(
            target=work, args=(task, theirs, self._flag), name=f"worker {number}"
        )
        process.start()
        theirs.close()  # or its end would go unnoticed
        self._members[mine] = _Member(number, process, mine)

    def _start_absent(self) -> None:
        numbers, self._absent = self._absent, []
        for number in numbers:
            self._start(number)

    def _hear(self, member: _Member) -> None:
        try:
            message: Message = member.pipe.recv()
        except (EOFError, OSError):
            self._leave(member)
            return
        if isinstance(message, RowDone):
            member.rows[message.shard, message.is_error] += 1
            self._watcher.row(message)
        elif isinstance(message, Committed):
            del member.open[message.shard.index]
            for is_error in (False, True):
                member.rows.pop((message.shard.index, is_error), None)
            self.seconds[member.number] = dict(message.seconds)
            self._watcher.part(message.shard, message.part)
        elif isinstance(message, Request):
            member.is_waiting = True
            if not message.is_idle:  # its rows are waiting as well
                self._give(member, self._next_shard())
        elif isinstance(message, Ready):
            self._watcher.ready()
            self._start_absent()
        elif isinstance(message, Phase):
            self._watcher.phase(message.text)
        elif isinstance(message, Failed):
            raise message.error

    def _answer(self) -> None:
        """Answer the idle workers: with a shard, or with none once none can come back."""
        for member in [m for m in self._members.values() if m.is_waiting]:
            shard = self._next_shard()
            if shard is not None or self._flag.value or not self._is_anything_open():
                self._give(member, shard)

    def _next_shard(self) -> Shard | None:
        return self._queue.popleft() if self._queue and not self._flag.value else None

    def _is_anything_open(self) -> bool:
        return any(member.open for member in self._members.values())

    def _give(self, member: _Member, shard: Shard | None) -> None:
        member.is_waiting = False
        if shard is not None:
            member.open[shard.index] = shard
        try:
            member.pipe.send(None if shard is None else shard.index)
        except OSError:  # it is dead, which `_hear` will find out
            return

    def _leave(self, member: _Member) -> None:
        """A worker is gone: after its work, or with shards that others can do."""
        del self._members[member.pipe]
        member.pipe.close()
        member.process.join(_JOIN_SECONDS)
        code = member.process.exitcode
        if code == 0:
            return
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
        self._queue.extendleft(sorted(member.open.values(), key=lambda s: s.index, reverse=True))
        errors = sum(n for (_, is_error), n in member.rows.items() if is_error)
        self._watcher.lost(member.rows.total(), errors)
        self._start_absent()
        if self._members:
            self._watcher.phase(f"worker {member.number} {how}; the others take over its shards")
        elif not self._flag.value:
            self.problem = f"the end of its last worker, which {how} (out of memory?)"


def open_crew(job: Job, *, open_engine: Callable[..., Any], decode: Decode) -> Crew | None:
    """The workers of a job: as many as it says, or one for each GPU where its engine uses them.

    None for a single one, which needs no process of its own, and where there is no engine, which
    is for `open_engine` to say. `open_engine` takes what `OpenWorkerEngine` does, and the job.
    """
    if job.workers == 1:
        return None
    try:
        manifest = read_manifest(job.engine, verify=False)
        module = runtime_module(manifest.runtime)
    except EngineError:
        return None
    gpus: tuple[str | None, ...] = ()
    if module.uses_gpu(manifest, Placement(device=job.device)):
        gpus = tuple(gpu.uuid for gpu in find_gpus().gpus)
    num_workers = job.workers or max(len(gpus), 1)
    if num_workers == 1:
        return None
    return Crew(
        manifest,
        partial(open_engine, job=job),
        decode,
        threads=0 if gpus else max(num_cores() // num_workers, 1),
        gpus=tuple(gpus[i % len(gpus)] if gpus else None for i in range(num_workers)),
    )
