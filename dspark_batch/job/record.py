"""The run record: what was run, with what, on what, and the result."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from dspark_batch import __version__
from dspark_batch.decode import Drafting, settled
from dspark_batch.engine import installed_versions
from dspark_batch.errors import DSparkError, StoppedEarly, StorageError
from dspark_batch.job.definition import Job
from dspark_batch.job.output import OutputFolder, now
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.summary import Summary

_PACKAGES = ("numpy", "onnxruntime", "pyarrow", "tokenizers")


class RecordedEngine(Drafting, Protocol):
    """What a record says of an engine."""

    @property
    def name(self) -> str:
        """That of its recipe."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Facts that decide what text comes out."""


class RunRecord:
    """`run/record.json`: written when the run begins and when it ends, however it ends."""

    def __init__(
        self, output: OutputFolder, plan: ShardPlan, engine: RecordedEngine, *, argv: Sequence[str]
    ) -> None:
        self.summary: Summary | None = None
        """Set it before the end of a run that came to its end."""
        self._output = output
        self._values: dict[str, Any] = {
            "state": "running",
            "argv": list(argv),
            "started_at": now(),
            "finished_at": None,
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "versions": _versions(),
            "engine": {
                "folder": str(plan.job.engine),
                "name": engine.name,
                "block_size": engine.block_size,
                "fingerprint": dict(engine.fingerprint),
            },
            "input": [
                {
                    "path": str(file.path),
                    "size": file.size,
                    "sha256": file.sha256,
                    "num_rows": sum(file.row_groups),
                }
                for file in plan.files.files
            ],
            "job": plan.job.model_dump(mode="json"),
            "schedule": _schedule(plan.job, engine),
            "num_input_rows": plan.num_rows,
            "num_planned_parts": len(plan.shards),
            "error": None,
            "summary": None,
        }

    def __enter__(self) -> Self:
        self._output.write_record(self._values)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._values["finished_at"] = now()
        if self.summary is not None:
            stopped = isinstance(self.summary.failure, StoppedEarly)
            self._values["state"] = "stopped" if stopped else "finished"
            failure = self.summary.failure
            self._values["error"] = failure.message if failure else None
            self._values["summary"] = self.summary.to_json()
            self._output.write_record(self._values)
            return
        self._values["state"] = "interrupted" if kind is KeyboardInterrupt else "failed"
        message = error.message if isinstance(error, DSparkError) else error
        self._values["error"] = f"{kind.__name__}: {message}" if kind else None
        with suppress(StorageError):  # the error on its way says more than a full disk here
            self._output.write_record(self._values)


def _schedule(job: Job, engine: Drafting) -> dict[str, Any]:
    """How the run drafts and verifies, with the defaults filled in."""
    spec, scheduler = settled(engine, job.spec, job.scheduler)
    threshold = job.confidence_threshold if scheduler == "threshold" else None
    return {"spec": spec, "scheduler": scheduler, "confidence_threshold": threshold}


def _versions() -> dict[str, str]:
    own = {"dspark_batch": __version__, "python": platform.python_version()}
    return own | installed_versions(_PACKAGES)
