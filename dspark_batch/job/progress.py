"""Progress on stderr: a bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from dspark_batch.job.summary import duration

_LINE_SECONDS = 30.0


@dataclass(slots=True)
class RunState:
    """The progress of a run: written by the runner, read by a display."""

    num_rows: int = 0
    """Rows of the whole job."""
    num_done: int = 0
    """Rows that are finished, those of earlier runs included."""
    num_done_before: int = 0
    num_errors: int = 0
    num_new_tokens: int = 0
    num_rounds: int = 0
    num_accepted_tokens: int = 0
    seconds: float = 0.0
    """Since the first row was admitted."""

    def text(self) -> str:
        """Rows, time left, errors, speed and accepted length: the first words matter most."""
        parts = [f"{self.num_done:,}/{self.num_rows:,} rows"]
        num_done_now = self.num_done - self.num_done_before
        if num_done_now:
            left = self.seconds / num_done_now * (self.num_rows - self.num_done)
            parts.append(f"{duration(left)} left")
        parts.append(f"{self.num_errors:,} errors")
        if self.seconds:
            parts.append(f"{self.num_new_tokens / self.seconds:,.1f} tok/s")
        if self.num_rounds:
            accepted_length = 1 + self.num_accepted_tokens / self.num_rounds
            parts.append(f"accepted length {accepted_length:.2f}")
        return ", ".join(parts)


class State(Protocol):
    """What a display shows: `RunState`, or that of a training."""

    @property
    def num_rows(self) -> int:
        """Rows, or steps, in all."""

    @property
    def num_done(self) -> int:
        """How many of them are done."""

    def text(self) -> str:
        """The line behind the bar."""


class Progress:
    """Says nothing; the base of the displays that do. Closed where a `with` block ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def phase(self, text: str) -> None:
        """A phase begins, such as "loading engine"."""

    def update(self, state: State) -> None:
        """A row is finished."""

    def close(self) -> None:
        """Remove the display; may be called twice."""


class PlainProgress(Progress):
    """Lines: every phase, and rows at most every 30 s."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._next_line = clock() + _LINE_SECONDS

    def phase(self, text: str) -> None:
        """Print the phase."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def update(self, state: State) -> None:
        """Print a line if the last one is old enough."""
        now = self._clock()
        if now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            self.phase(state.text())


class BarProgress(Progress):
    """A bar with the phase before it. `NO_COLOR` and `TERM=dumb` are honoured."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn(
                "{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, text="")
        self._bar.start()

    def phase(self, text: str) -> None:
        """Put the phase before the bar."""
        self._bar.update(self._task, description=text)

    def update(self, state: State) -> None:
        """Move the bar."""
        self._bar.update(
            self._task, total=state.num_rows, completed=state.num_done, text=state.text()
        )

    def close(self) -> None:
        """Take the bar away; the summary follows."""
        self._bar.stop()


def open_progress(mode: str) -> Progress:
    """`bar`, `plain` or `none`; `auto` is a bar where stderr is a terminal."""
    if mode == "none":
        return Progress()
    if mode == "bar" or (mode == "auto" and sys.stderr.isatty()):
        return BarProgress()
    return PlainProgress()
