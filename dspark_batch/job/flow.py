"""From shards to parts: read, prepare, decode, commit, in one continuous stream.

decode() sees a single stream of prompts, so the batch never drains where a shard ends. A shard is
open from its first prompt to its commit; each open shard but the newest has a row in the batch, so
no more of them than rows in the batch are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dspark_batch.decode import Completion, Prompt
from dspark_batch.errors import DSparkError
from dspark_batch.job.output import OutputFolder
from dspark_batch.job.parts import Part, commit_part
from dspark_batch.job.prompts import PromptPreparer
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.shards import OpenShard, Shard

if TYPE_CHECKING:
    from dspark_batch.decode import DecodeStats
    from dspark_batch.engine import Engine


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


class Stopping(Protocol):
    """Says when no further row may be admitted."""

    @property
    def reason(self) -> str | None:
        """Why none may, in words; None while they may."""


@dataclass(frozen=True, slots=True)
class RowDone:
    """A row that needs nothing more, as progress counts it."""

    shard: int
    is_error: bool
    num_new_tokens: int = 0
    num_rounds: int = 0
    num_accepted_tokens: int = 0


class Watcher(Protocol):
    """Is told what happens to rows and shards."""

    def row(self, done: RowDone) -> None:
        """A row is done."""

    def part(self, shard: Shard, part: Part) -> None:
        """A shard became a part."""


class Flow:
    """Rows between input and part. Invariant: `_running` has a row from admission to end."""

    def __init__(
        self,
        plan: ShardPlan,
        output: OutputFolder,
        engine: Engine,
        *,
        stop: Stopping,
        watcher: Watcher,
    ) -> None:
        self._plan = plan
        self._output = output
        self._engine = engine
        self._preparer = PromptPreparer(plan.job, plan.columns, engine)
        self._stop = stop
        self._watcher = watcher
        self._running: dict[int, OpenShard] = {}

    def decode(self, shards: Iterable[Shard], decode: Decode, stats: DecodeStats) -> None:
        """Decode shards, in the order of the plan, and commit those that become complete."""
        job = self._plan.job
        completions = decode(
            self._prompts(shards),
            self._engine,
            spec=job.spec,
            scheduler=job.scheduler,
            confidence_threshold=job.confidence_threshold,
            stats=stats,
        )
        for completion in completions:
            self._take(completion)
        if self._running:
            raise DSparkError(f"decode ended without row {min(self._running)}")

    def _prompts(self, shards: Iterable[Shard]) -> Iterator[Prompt]:
        """The prompts of all shards in one stream; ends early once there is a reason to stop."""
        for shard, table in self._plan.files.read(shards):
            opened = OpenShard(shard, table)
            prompts = []
            for prepared in self._plan.prepare(shard, table, self._preparer):
                if prepared.prompt is None:
                    opened.fail(prepared)
                    self._watcher.row(RowDone(shard.index, is_error=True))
                else:
                    prompts.append(prepared.prompt)
            if opened.is_complete:
                self._commit(opened)
            # Rows of like length share a cache bucket; turning round at every shard keeps the
            # neighbours alike across its border as well.
            prompts.sort(key=lambda prompt: len(prompt.token_ids), reverse=shard.index % 2 == 1)
            for prompt in prompts:
                if self._stop.reason:
                    return
                self._running[prompt.row] = opened
                opened.admit(prompt)
                yield prompt
            if self._stop.reason:
                return

    def _take(self, completion: Completion) -> None:
        opened = self._running.pop(completion.row, None)
        if opened is None:
            raise DSparkError(f"decode completed row {completion.row}, which was not running")
        opened.complete(completion)
        self._watcher.row(
            RowDone(
                opened.shard.index,
                completion.error is not None,
                len(completion.token_ids),
                completion.spec.num_rounds,
                completion.spec.num_accepted_tokens,
            )
        )
        if opened.is_complete:
            self._commit(opened)

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
        self._watcher.part(shard, part)
