"""Write a file whole or not at all. Every file that a later run relies on is written here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_batch.errors import StorageError


@contextmanager
def replacing(path: Path, *, temporary: Path | None = None) -> Iterator[Path]:
    """Yield where to write; afterwards that file is synced and renamed to `path`.

    After a crash at any moment `path` is as it was before or as it is after, never between. If the
    block raises, `path` is as it was and the temporary file is gone. That file is `temporary`, on
    the same file system, or lies beside `path`.

    Raises:
        StorageError: the file cannot be written.
    """
    scratch = temporary or path.with_name(f"{path.name}.tmp")
    try:
        yield scratch
        _sync(scratch)
        scratch.replace(path)
        _sync(path.parent)
    except Exception as problem:  # not an interrupt: leftovers of one are cleared at the next start
        scratch.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise StorageError(f"cannot write {path}: {problem.strerror or problem}") from problem
        raise


def write_json(path: Path, values: Any, *, temporary: Path | None = None) -> None:
    """Replace a JSON file. Raises `StorageError`."""
    with replacing(path, temporary=temporary) as scratch:
        scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
