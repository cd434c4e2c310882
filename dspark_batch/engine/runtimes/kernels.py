"""The kernels that TensorRT-RTX compiled for a plan file, kept beside it from run to run.

`target.plan.cache` is one line of JSON, then what the library wrote. The line says what the kernels
are for (GPU, driver, library) and has the SHA-256 of the rest. The library checks as much, but it
gets no byte that we did not write: nothing says what it does with others.

A cache spares seconds and is never needed. Whatever is wrong with it or its folder is a warning at
most, and the run compiles its kernels anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_batch.engine import CACHE_SUFFIX, replacing
from dspark_batch.errors import StorageError

logger = logging.getLogger(__name__)


class KernelCache:
    """The library's cache of one plan file, and the file that outlives it."""

    def __init__(self, plan: Path, key: str) -> None:
        """`key` names what kernels are for; those of another key are not used."""
        self.path = plan.with_name(plan.name + CACHE_SUFFIX)
        self._key = key
        self._native: Any = None
        self._is_useless = False
        """Whether the file is to be replaced, whatever it holds."""

    def attach(self, config: Any) -> None:
        """Let a context that is made by this runtime config take kernels from here, and add some.

        The first call reads the file, so a CUDA context must be current.
        """
        if self._native is None:
            self._native = config.create_runtime_cache()
            kept = self._read()
            if kept is not None and not self._native.deserialize(kept):
                self._is_useless = True
        config.set_runtime_cache(self._native)

    def save(self) -> None:
        """Write the file, unless it holds as much already. Never raises for what is on the disk."""
        if self._native is None:
            return
        found = self._native.serialize()
        if found is None:
            return
        kernels = bytes(found)
        try:
            with _alone_in(self.path.parent):
                # Another process may have written since: the one with more kernels is kept.
                kept = None if self._is_useless else self._read()
                if len(kernels) > len(kept or b""):
                    head = {"for": self._key, "sha256": hashlib.sha256(kernels).hexdigest()}
                    with replacing(self.path) as scratch:
                        scratch.write_bytes(json.dumps(head).encode() + b"\n" + kernels)
        except (OSError, StorageError) as problem:
            logger.warning("compiled kernels are not kept: %s", problem)

    def _read(self) -> bytes | None:
        """What the library wrote for this key; None if there is nothing, or nothing whole."""
        try:
            line, _, kernels = self.path.read_bytes().partition(b"\n")
            head = json.loads(line)
            if head["for"] != self._key:
                logger.info("%s holds kernels for %s", self.path, head["for"])
                return None
            if head["sha256"] == hashlib.sha256(kernels).hexdigest():
                return kernels
            problem: Exception = ValueError("it is damaged")
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = error
        except (ValueError, LookupError, TypeError):
            problem = ValueError("it is damaged")
        self._is_useless = True
        logger.warning("kernels are compiled again: %s: %s", self.path, problem)
        return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process that asks as well is in this block; a crash ends it too.

    Raises:
        OSError: the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
