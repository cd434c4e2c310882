"""Counts that add up over parts, and the summary of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_batch.decode import SpecCounts
from dspark_batch.decode.algorithm import metrics
from dspark_batch.errors import DSparkError
from dspark_batch.job.shards import OutputRow

NO_SPEC = SpecCounts(0, 0, 0, 0, ())


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals over the rows of a part, or of many."""

    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    """Error code -> rows."""
    spec: SpecCounts = NO_SPEC

    @property
    def num_errors(self) -> int:
        """Rows with an error."""
        return sum(self.errors.values())

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.num_rows + other.num_rows,
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_new_tokens + other.num_new_tokens,
            dict(sorted((Counter(self.errors) + Counter(other.errors)).items())),
            metrics.add([self.spec, other.spec]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        return {
            "num_rows": self.num_rows,
            "num_errors": self.num_errors,
            "errors": dict(self.errors),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": self.num_new_tokens,
            "spec": {
                "num_rounds": self.spec.num_rounds,
                "num_draft_tokens": self.spec.num_draft_tokens,
                "num_looked_up_tokens": self.spec.num_looked_up_tokens,
                "num_verified_tokens": self.spec.num_verified_tokens,
                "num_accepted_tokens": self.spec.num_accepted_tokens,
                "accepted_length": self.spec.accepted_length,
                "acceptance_rate": self.spec.acceptance_rate,
                "num_drafted_rounds": self.spec.num_drafted_rounds,
                "acceptance_by_position": _by_position(self.spec),
                "accepted_histogram": list(self.spec.accepted_histogram),
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Counts:
        """What `to_json` wrote. Raises `KeyError` for anything else."""
        spec = values["spec"]
        return cls(
            values["num_rows"],
            values["num_prompt_tokens"],
            values["num_new_tokens"],
            values["errors"],
            SpecCounts(
                spec["num_rounds"],
                spec["num_draft_tokens"],
                spec["num_verified_tokens"],
                spec["num_accepted_tokens"],
                tuple(spec["accepted_histogram"]),
                spec.get("num_looked_up_tokens", 0),  # not in parts from before it was counted
                spec["num_drafted_rounds"],
            ),
        )


def count_rows(rows: Iterable[OutputRow]) -> Counts:
    """The counts of a part."""
    num_rows = num_prompt_tokens = num_new_tokens = 0
    errors: Counter[str] = Counter()
    spec = NO_SPEC
    for row in rows:
        num_rows += 1
        num_prompt_tokens += row.num_prompt_tokens or 0
        num_new_tokens += len(row.token_ids)
        if row.error is not None:
            errors[str(row.error.code)] += 1
        if row.spec is not None:
            spec = metrics.add([spec, row.spec])
    return Counts(num_rows, num_prompt_tokens, num_new_tokens, dict(sorted(errors.items())), spec)


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run: the whole output, and what this run added to it."""

    output: Path
    counts: Counts
    """Of every part that is there, also from earlier runs."""
    num_input_rows: int
    num_parts: int
    num_planned_parts: int
    num_run_parts: int
    num_run_rows: int
    """Rows of the parts that this run wrote."""
    num_run_new_tokens: int
    """Tokens that this run decoded, also for rows whose part is not complete."""
    num_workers: int
    load_seconds: float
    """Until the first worker had opened its engine."""
    wall_seconds: float
    """Of decoding; loading the engine is not in it."""
    phase_seconds: Mapping[str, float]
    """`draft`, `verify`, `prefill`, `host` -> seconds, added up over the workers."""
    saved_seconds: float
    """What drafting saved against plain rounds of this run; 0 where it had none."""
    failure: DSparkError | None
    """Why the exit code is not 0."""

    @property
    def new_tokens_per_second(self) -> float:
        """Of this run."""
        return self.num_run_new_tokens / self.wall_seconds if self.wall_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """One JSON object, documented in `docs/jobs.md`."""
        return {
            "output": str(self.output / "data"),
            "exit_code": self.failure.exit_code if self.failure else 0,
            "num_input_rows": self.num_input_rows,
            "num_parts": self.num_parts,
            "num_planned_parts": self.num_planned_parts,
            **self.counts.to_json(),
            "run": {
                "num_parts": self.num_run_parts,
                "num_rows": self.num_run_rows,
                "num_new_tokens": self.num_run_new_tokens,
                "new_tokens_per_second": self.new_tokens_per_second,
                "num_workers": self.num_workers,
                "load_seconds": self.load_seconds,
                "wall_seconds": self.wall_seconds,
                "phase_seconds": dict(self.phase_seconds),
                "saved_seconds": self.saved_seconds,
            },
        }

    def lines(self) -> list[str]:
        """The same as text for a terminal."""
        counts, spec = self.counts, self.counts.spec
        lines = [
            f"rows      {rows_line(counts)}",
            f"tokens    {counts.num_prompt_tokens:,} prompt, {counts.num_new_tokens:,} new",
        ]
        if self.num_run_parts == 0 and self.failure is None:
            lines.insert(0, "nothing to do: the output is complete")
        elif self.num_run_parts < self.num_parts:
            lines.insert(0, f"this run  {self.num_run_rows:,} rows; the others are of earlier runs")
        whole = self.wall_seconds * self.num_workers
        if self.wall_seconds:
            lines.append(
                f"speed     {self.new_tokens_per_second:,.1f} new tokens/s "
                f"in {duration(self.wall_seconds)}"
                + (f", {self.num_workers} workers" if self.num_workers > 1 else "")
            )
            shares = (
                f"{name} {duration(seconds)} ({seconds / whole:.0%})"
                for name, seconds in self.phase_seconds.items()
            )
            lines.append(f"time      {', '.join(shares)}")
        drafted = spec.num_drafted_rounds
        if drafted:
            length = 1 + spec.num_accepted_tokens / drafted
            lookups = ""
            if spec.num_looked_up_tokens:
                share = spec.num_looked_up_tokens / spec.num_draft_tokens
                lookups = f"; {share:.0%} of the drafts by prompt lookup"
            lines.append(f"drafted   {drafted:,} of {spec.num_rounds:,} row rounds{lookups}")
            lines.append(
                f"verified  {spec.num_verified_tokens:,} draft tokens, "
                f"{spec.acceptance_rate:.0%} accepted"
            )
            lines.append(
                f"per round {length:.2f} tokens where drafted, {spec.accepted_length:.2f} overall"
            )
            shares = (f"{k}: {share:.0%}" for k, share in enumerate(_by_position(spec), start=1))
            lines.append(f"          accepted up to position {', '.join(shares)}")
            if self.saved_seconds:
                what = "saved" if self.saved_seconds > 0 else "lost"
                seconds = abs(self.saved_seconds)
                share = seconds / (whole + self.saved_seconds)
                lines.append(
                    f"{what:9} {duration(seconds)} ({share:.0%}) against plain rounds of this run"
                )
        elif spec.num_rounds:
            lines.append("drafted   nothing: plain decoding")
        return [*lines, f"output    {self.output / 'data'}"]


def _by_position(spec: SpecCounts) -> list[float]:
    """[γ] share of the rounds that drafted whose block was accepted up to each position."""
    drafted = spec.num_drafted_rounds
    shares = metrics.acceptance_by_position(spec.accepted_histogram, num_rounds=drafted)
    return [float(share) for share in shares]


def rows_line(counts: Counts) -> str:
    """Good and bad rows, the bad ones by error code."""
    plural = "" if counts.num_errors == 1 else "s"
    text = f"{counts.num_rows - counts.num_errors:,} ok, {counts.num_errors:,} error{plural}"
    if counts.errors:
        text += f" ({', '.join(f'{code} {number:,}' for code, number in counts.errors.items())})"
    return text


def duration(seconds: float) -> str:
    """A time as a person would say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"
