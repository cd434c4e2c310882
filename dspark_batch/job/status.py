"""The progress of an output folder, read from its files; takes no lock and never waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_batch.errors import UsageError
from dspark_batch.job.definition import RESULT_FIELDS, Job
from dspark_batch.job.output import OutputFolder
from dspark_batch.job.summary import Counts, rows_line

_CONTENT_FIELDS = (
    *("input", "prompt_column", "messages_column", "token_ids_column"),
    *RESULT_FIELDS,
)


@dataclass(frozen=True, slots=True)
class Status:
    """What is in an output folder."""

    folder: Path
    state: str
    """Of the last run: `running`, `finished`, `stopped`, `interrupted`, `failed`, or `died`: it is
    gone, and could not say how it ended."""
    num_parts: int
    num_planned_parts: int
    num_input_rows: int
    counts: Counts
    """Of the parts that are there."""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "output": str(self.folder / "data"),
            "state": self.state,
            "num_parts": self.num_parts,
            "num_planned_parts": self.num_planned_parts,
            "num_input_rows": self.num_input_rows,
            **self.counts.to_json(),
        }

    def lines(self) -> list[str]:
        """The same as text for a terminal."""
        return [
            f"last run  {self.state}",
            f"parts     {self.num_parts:,} of {self.num_planned_parts:,}",
            f"rows      {self.counts.num_rows:,} of {self.num_input_rows:,}: "
            f"{rows_line(self.counts)}",
            f"output    {self.folder / 'data'}",
        ]


def read_status(folder: Path) -> Status:
    """Read the record and the footers. Raises `UsageError` where no run has written."""
    output = OutputFolder(folder)
    record = output.read_record()
    if record is None:
        raise UsageError(
            f"{folder} is not the output of a run", hint="give the folder that run wrote to"
        )
    parts = output.parts()
    state = record["state"]
    if state == "running" and not output.is_held():
        # A run writes how it ended before it lets go, so it may just have done both.
        latest = output.read_record() or record
        state = "died" if latest == record else latest["state"]
    counts = sum((part.counts for part in parts), start=Counts())
    return Status(
        folder,
        state,
        len(parts),
        record["num_planned_parts"],
        record["num_input_rows"],
        counts,
    )


def read_finished_job(folder: Path) -> Job:
    """The job of a finished output, as far as it says what the prompts and results are.

    Raises `UsageError` for any other folder.
    """
    status = read_status(folder)
    record = OutputFolder(folder).read_record()
    if status.state != "finished" or record is None:
        raise UsageError(
            f"the job of {folder} is not finished: its last run is {status.state}",
            hint=f"dspark-batch status {folder}",
        )
    return Job.model_validate({key: record["job"][key] for key in _CONTENT_FIELDS})
