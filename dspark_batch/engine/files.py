"""Write a file or a folder whole or not at all, and delete nothing but what we wrote.

Every file that a later run relies on is written here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
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
        with suppress(OSError):  # a read-only file system refuses even to delete what is not there
            scratch.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise StorageError(f"cannot write {path}: {problem.strerror or problem}") from problem
        raise


def write_json(path: Path, values: Any, *, temporary: Path | None = None) -> None:
    """Replace a JSON file. Raises `StorageError`."""
    with replacing(path, temporary=temporary) as scratch:
        scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_replaceable(folder: Path, names: Collection[str], *, mark: str) -> None:
    """Raise `StorageError` unless a folder is missing, empty or ours.

    It is ours if it has the file `mark`, and files of these names only.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StorageError(
            f"{folder} is not a folder of its own", hint="move it away, or write elsewhere"
        )
    there = sorted(folder.iterdir()) if folder.exists() else []
    is_ours = (folder / mark).is_file()
    for path in there:
        if not is_ours or path.name not in names or path.is_dir():
            raise StorageError(
                f"{path} is not a file that dspark-batch wrote, and its folder is to be replaced",
                hint="move it away, or write elsewhere",
            )


def replace_folder(folder: Path, scratch: Path, names: Collection[str], *, mark: str) -> None:
    """Rename `scratch` to `folder`. What is there goes, if it is ours (`check_replaceable`).

    Raises:
        StorageError: something else is there; nothing was changed.
    """
    check_replaceable(folder, names, mark=mark)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.replace(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
