"""The output folder of a job: `data/` with parts only, `run/` with the record and the lock.

Readers glob `data/`, so nothing else is ever in it: temporary files live in `run/`, on the same
file system.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dspark_batch.engine import sync_folder, write_json
from dspark_batch.errors import OutputLocked, StorageError
from dspark_batch.job.parts import Part, read_part


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
        another run holds it, `StorageError` if it cannot be made.
        """
        is_new = not self.folder.exists()
        try:
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
            for leftover in self.run.glob("*.tmp"):
                leftover.unlink()
            self._write(self._holder, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            self._holder.unlink(missing_ok=True)
            if is_new and not self._record.exists():
                with suppress(OSError):  # a part is in it after all
                    self.data.rmdir()
                    shutil.rmtree(self.folder)
            lock.release()

    def _holder_name(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError):
            return "another run"  # it has just started or is just ending

    def parts(self) -> list[Part]:
        """The committed parts in input order. Raises `StorageError` for a foreign file."""
        return [read_part(path) for path in sorted(self.data.glob("*.parquet"))]

    def temporary(self, name: str) -> Path:
        """Where a file is written before it gets its name."""
        return self.run / f"{name}.tmp"

    def set_aside(self) -> None:
        """Take the parts out of `data/`; they are deleted only when all new ones are there."""
        try:
            if self._replaced.exists():  # an overwriting run was stopped: its parts are the newer
                shutil.rmtree(self.data)
            else:
                self.data.rename(self._replaced)
            self.data.mkdir()
            sync_folder(self.folder)
        except OSError as exc:
            raise StorageError(f"cannot replace {self.data}: {exc.strerror or exc}") from exc

    def drop_replaced(self) -> None:
        """Delete what `set_aside` kept."""
        try:
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
        except OSError as exc:
            raise StorageError(f"cannot delete {self._replaced}: {exc.strerror or exc}") from exc

    def write_record(self, record: Mapping[str, object]) -> None:
        """Replace the run record. Raises `StorageError`."""
        self._write(self._record, record)

    def read_record(self) -> dict[str, Any] | None:
        """The record of the last run; None if there was none. Raises `StorageError`."""
        try:
            record: dict[str, Any] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise StorageError(f"cannot read {self._record}: {exc}") from exc
        return record

    def _write(self, path: Path, values: Mapping[str, object]) -> None:
        write_json(path, values, temporary=self.temporary(path.name))


def now() -> str:
    """The time as records have it: UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
