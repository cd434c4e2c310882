"""Ending a run early: a deadline or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Why no further row should be admitted, once there is a reason: SIGTERM or the deadline."""

    def __init__(self, *, deadline: float | None, clock: Callable[[], float]) -> None:
        self._deadline = deadline
        self._clock = clock
        self._started = clock()
        self._signalled = False

    @property
    def reason(self) -> str | None:
        """The reason in words; None while there is none."""
        if self._signalled:
            return "SIGTERM"
        if self._deadline is not None and self._clock() - self._started >= self._deadline:
            return f"the deadline of {self._deadline:g} s"
        return None

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Stop on SIGTERM. Only the main thread can; in another this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
