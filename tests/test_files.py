"""Writing a file whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dspark_batch.engine import files
from dspark_batch.engine.files import replacing, write_json
from dspark_batch.errors import StorageError


def test_the_file_has_its_new_content_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_raised_inside_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as scratch:
            scratch.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(StorageError, match=f"cannot write {path}: No space"), replacing(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(StorageError, match="cannot write"), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    with pytest.raises(StorageError, match=r"cannot write .*missing"):
        write_json(tmp_path / "missing" / "a", {})


def test_a_read_only_file_system_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses the temporary file, and then to delete it."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path / 'a'}: Read-only"):
        write_json(tmp_path / "a", {})


def test_the_order_is_write_sync_rename_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed before it is synced, a file may be empty after a power cut."""
    path, scratch = tmp_path / "a", tmp_path / "elsewhere"
    events = []

    def fsync(descriptor: int) -> None:
        synced = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append((synced.name, path.exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with replacing(path, temporary=scratch) as given:
        assert given == scratch
        given.write_text("new")
    assert events == [("elsewhere", False), (tmp_path.name, True)]
