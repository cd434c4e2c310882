"""A worker: a process with an engine of its own that decodes the shards it is given.

It asks its `crew` for one shard after another whenever there is room for rows, so that its batch
never drains, and reports what happened to them. It holds no lock and reads no parts: those are the
crew's. Whatever ends it loses only the shards that it had open.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, Any, Protocol

from dspark_batch.errors import DSparkError
from dspark_batch.job.flow import Decode, Flow, RowDone
from dspark_batch.job.output import OutputFolder
from dspark_batch.job.parts import Part
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.shards import Shard

if TYPE_CHECKING:
    from pathlib import Path

    from dspark_batch.decode import DecodeStats
    from dspark_batch.engine import Engine

PHASES = ("draft", "verify", "prefill", "host")
SAVED = "saved"


class OpenWorkerEngine(Protocol):
    """`opening.open_measured` for a job; goes to another process, so it must be picklable."""

    def __call__(
        self, folder: Path, *, max_rows: int | None, threads: int, progress: Callable[[str], None]
    ) -> Engine:
        """Load an engine folder."""


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker is told at its start."""

    number: int
    """Counted from 1."""
    plan: ShardPlan
    open_engine: OpenWorkerEngine
    decode: Decode
    threads: int
    environment: Mapping[str, str]
    """Which GPU it sees."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is open."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase to show, such as "loading engine"."""

    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """May I have another shard? The answer is its index, or None."""

    is_idle: bool
    """No row is running, so the answer may wait."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A shard became a part; the seconds are those of all work so far."""

    shard: Shard
    part: Part
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Failed:
    """What went wrong."""

    error: DSparkError


Message = Ready | Phase | Request | RowDone | Committed | Failed


def measured(stats: DecodeStats) -> dict[str, float]:
    """Seconds of the phases, and what drafting saved."""
    return {name: getattr(stats, f"{name}_seconds") for name in (*PHASES, SAVED)}


class _Line:
    """The worker's end of the line: a `Watcher` and `Stopping` whose other side is the crew."""

    def __init__(self, pipe: connection.Connection, stop: Any, plan: ShardPlan) -> None:
        from dspark_batch.decode import DecodeStats

        self.stats = DecodeStats()
        self._pipe = pipe
        self._stop = stop
        self._shards = plan.shards
        self._earlier: Shard | None = None

    @property
    def reason(self) -> str | None:
        """See `flow.Stopping`."""
        return "the end of the run" if self._stop.value else None

    def send(self, message: Message) -> None:
        self._pipe.send(message)

    def phase(self, text: str) -> None:
        self.send(Phase(text))

    def row(self, done: RowDone) -> None:
        """See `flow.Watcher`."""
        self.send(done)

    def part(self, shard: Shard, part: Part) -> None:
        """See `flow.Watcher`."""
        self.send(Committed(shard, part, measured(self.stats)))

    def streams(self) -> Iterator[Iterator[Shard]]:
        """Shards to decode, in streams that each keep the order of the plan.

        A stream ends where there is no shard at the moment, or one that lies behind: a lost
        worker's. Then the running rows end, and the next stream begins.
        """
        while True:
            shard = self._earlier or self._ask(is_idle=True)
            self._earlier = None
            if shard is None:
                return
            yield self._stream(shard)

    def _stream(self, shard: Shard) -> Iterator[Shard]:
        following: Shard | None = shard
        while following is not None:
            if following.index < shard.index:
                self._earlier = following
                return
            shard = following
            yield shard
            following = self._ask(is_idle=False)

    def _ask(self, *, is_idle: bool) -> Shard | None:
        self.send(Request(is_idle))
        index = self._pipe.recv()
        return None if index is None else self._shards[index]


def work(task: Task, pipe: connection.Connection, stop: Any) -> None:
    """The life of a worker; `stop` is a shared value, true once no row is to be admitted."""
    os.environ.update(task.environment)
    for number in (signal.SIGINT, signal.SIGTERM):  # the crew hears them, and says what to do
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(task, pipe, stop)
    except (BrokenPipeError, EOFError):  # the crew is gone
        return
    except DSparkError as problem:
        pipe.send(Failed(problem))
    except Exception as problem:
        traceback.print_exc()
        pipe.send(Failed(DSparkError(f"worker {task.number} failed: {problem!r}")))


def _work(task: Task, pipe: connection.Connection, stop: Any) -> None:
    plan = task.plan
    line = _Line(pipe, stop, plan)
    opened = task.open_engine(
        plan.job.engine,
        max_rows=plan.job.max_rows,
        threads=task.threads,
        progress=line.phase,
    )
    with closing(opened) as engine:
        line.send(Ready())
        output = OutputFolder(plan.job.output_folder)
        flow = Flow(plan, output, engine, stop=line, watcher=line)
        for shards in line.streams():
            flow.decode(shards, task.decode, line.stats)


def _end_with_parent() -> None:
    """A worker without its crew must not write: the lock went with the crew."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
