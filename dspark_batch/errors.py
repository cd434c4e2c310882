"""Every error that a person can cause, and the exit code that it becomes.

    DSparkError                 1   internal: a bug of ours
    ├── UsageError              2   a flag, a job file, a recipe
    ├── InputError              3   the prompts: schema, column, file
    ├── RowErrorsExceeded       4   finished, but too many rows failed
    ├── EngineError             5   engine missing, incompatible, cannot be built or loaded
    ├── StorageError            6   cannot read or write, disk full
    ├── OutputLocked            7   another run holds the output
    └── StoppedEarly           75   deadline or signal; run the same command again to continue

The message says what happened and where. The hint says what to do, best as a command to type. Only
`cli` turns an error into an exit code; 130 is Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DSparkError(Exception):
    """Base of the tree; raised as such only for a broken invariant.

    `str()` gives what a terminal shows: the message, and below it the hint.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())  # of other libraries it may have many lines
        self.hint = hint

    @property
    def line(self) -> str:
        """Message and hint in one line."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class UsageError(DSparkError):
    """A flag, a job file or a recipe is wrong."""

    exit_code = 2


class InputError(DSparkError):
    """The prompt file cannot be used: missing, not Parquet, wrong columns."""

    exit_code = 3


class RowErrorsExceeded(DSparkError):
    """The run finished, but more rows failed than the job allows."""

    exit_code = 4


class EngineError(DSparkError):
    """An engine is missing, does not fit, or cannot be built."""

    exit_code = 5


class StorageError(DSparkError):
    """A file cannot be read or written."""

    exit_code = 6


class OutputLocked(DSparkError):
    """Another run holds the output folder."""

    exit_code = 7


class StoppedEarly(DSparkError):
    """A deadline or a signal ended the run early. What is finished is kept."""

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, to put behind a message; else empty."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
