"""Open an engine as a job needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dspark_batch.engine import Engine, ensure_costs, open_engine
from dspark_batch.engine.runtimes import Placement
from dspark_batch.job.definition import Job


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
