"""The output folder of a job: `data/` with parts only, `run/` with the record and the lock.

Readers glob `data/`, so nothing else is ever in it: temporary files live in `run/`, on the same
file system. Only files that a run wrote are moved or deleted: parts by name and footer, the files
in `run/` by name. Anything else there is an error before anything changes.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dspark_batch.engine import is_running, sync_folder, write_json
from dspark_batch.errors import OutputLocked, StorageError
from dspark_batch.job.parts import Part, read_part
from dspark_batch.job.shards import PART_NAME

_RUN_NAME = re.compile(
    rf"lock|replaced|(holder|record)\.json(\.tmp)?|{PART_NAME.pattern}\.tmp", re.ASCII
)


class OutputFolder:
    """One output folder. Whoever writes holds the lock; reading never needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.run = folder / "run"
        self._record = self.run / "record.json"
        self._holder = self.run / "holder.json"
        self._replaced = self.run / "replaced"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, made if need be, without leftovers of a killed run.

        A new folder in which nothing was run is taken away again. Raises `OutputLocked` at once if
        another run holds it, `StorageError` if it cannot be made or if others' files are in `run/`.
        """
        is_new = not self.folder.exists()
        try:
            self._check_names()
            self.run.mkdir(parents=True, exist_ok=True)
            self.data.mkdir(exist_ok=True)
            lock = FileLock(self.run / "lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputLocked(
                f"{self.folder} is in use by {self._holder_name()}",
                hint="wait for it, or write elsewhere with -o FOLDER",
            ) from None
        except OSError as exc:
            raise StorageError(f"cannot write to {self.folder}: {exc.strerror or exc}") from exc
        try:
            self._check_contents()
            for leftover in self.run.glob("*.tmp"):
                leftover.unlink()
            self._write(self._holder, {"pid": os.getpid(), "host": socket.gethostname()})
            try:
                yield
            finally:
                self._holder.unlink(missing_ok=True)
        finally:
            if is_new and not self._record.exists():
                with suppress(OSError):  # something is in it after all
                    self.data.rmdir()
                    (self.run / "lock").unlink(missing_ok=True)
                    self.run.rmdir()
                    self.folder.rmdir()
            lock.release()

    def is_held(self) -> bool:
        """Whether a run holds the folder, told without taking the lock, which would disturb it.

        A run on another host cannot be looked up; it counts as alive.
        """
        try:
            holder = json.loads(self._holder.read_text())
            since = self._holder.stat().st_mtime
            if holder["host"] != socket.gethostname():
                return True
            return is_running(holder["pid"], before=since)
        except (OSError, ValueError, KeyError):
            return False

    def _holder_name(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError):
            return "another run"  # it has just started or is just ending

    def _check_names(self) -> None:
        """Raise `StorageError` for a name in `run/` that no run writes, and for a lock with text.

        Before the lock is taken, which empties the file, so other runs may come and go meanwhile.
        """
        for path in sorted(self.run.iterdir()) if self.run.exists() else ():
            is_lock = path.name == "lock"
            if not _RUN_NAME.fullmatch(path.name) or (is_lock and path.stat().st_size):
                raise _foreign(path)

    def _check_contents(self) -> None:
        """Raise `StorageError` for a file in `run/` that has the name of one of ours only."""
        for path, key in ((self._record, "num_planned_parts"), (self._holder, "host")):
            if path.exists() and key not in (_read_json(path) or {}):
                raise _foreign(path)
        if self._replaced.exists():
            _only_parts(self._replaced)

    def parts(self) -> list[Part]:
        """The committed parts in input order. Raises `StorageError` for a foreign file."""
        return [_part(path) for path in sorted(self.data.glob("*.parquet"))]

    def temporary(self, name: str) -> Path:
        """Where a file is written before it gets its name."""
        return self.run / f"{name}.tmp"

    def set_aside(self) -> None:
        """Take the parts out of `data/`; they are deleted only when all new ones are there.

        Raises `StorageError`, before anything is moved, for a file in `data/` that is none.
        """
        try:
            parts = _only_parts(self.data)
            if self._replaced.exists():  # an overwriting run was stopped: its parts are the newer
                for part in parts:
                    part.path.unlink()
            else:
                self.data.rename(self._replaced)
                self.data.mkdir()
            sync_folder(self.folder)
        except OSError as exc:
            raise StorageError(f"cannot replace {self.data}: {exc.strerror or exc}") from exc

    def drop_replaced(self) -> None:
        """Delete what `set_aside` kept. Raises `StorageError` where more is in its folder."""
        try:
            if self._replaced.exists():
                for part in _only_parts(self._replaced):
                    part.path.unlink()
                self._replaced.rmdir()
        except OSError as exc:
            raise StorageError(f"cannot delete {self._replaced}: {exc.strerror or exc}") from exc

    def write_record(self, record: Mapping[str, object]) -> None:
        """Replace the run record. Raises `StorageError`."""
        self._write(self._record, record)

    def read_record(self) -> dict[str, Any] | None:
        """The record of the last run; None if there was none. Raises `StorageError`."""
        return _read_json(self._record)

    def _write(self, path: Path, values: Mapping[str, object]) -> None:
        write_json(path, values, temporary=self.temporary(path.name))


def _read_json(path: Path) -> dict[str, Any] | None:
    """What is in a file; None if there is none. Raises `StorageError`."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise StorageError(f"cannot read {path}: {exc}", hint="move it away") from exc
    return values


def _only_parts(folder: Path) -> list[Part]:
    """The parts in a folder of nothing else. Raises `StorageError` for anything else."""
    return [_part(path) for path in sorted(folder.iterdir())]


def _part(path: Path) -> Part:
    """A part. Other programs copy footers into what they write, so its name counts too."""
    if not PART_NAME.fullmatch(path.name):
        raise _foreign(path)
    return read_part(path)


def _foreign(path: Path) -> StorageError:
    return StorageError(
        f"{path} is not a file that dspark-batch wrote",
        hint="move it away, or write elsewhere with -o FOLDER",
    )


def now() -> str:
    """The time as records have it: UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
