"""The dry run: read, render and tokenize every row, decode none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_batch.engine import Tokenizer, read_manifest
from dspark_batch.job.definition import Job
from dspark_batch.job.prompts import EngineText, PromptPreparer
from dspark_batch.job.shard_plan import ShardPlan
from dspark_batch.job.summary import Counts, rows_line


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found in an input."""

    num_rows: int
    num_errors: int
    errors: Mapping[str, int]
    """Error code -> rows."""
    first_error: str | None
    prompt_tokens: Mapping[str, int]
    """Quantiles of the prompt length in tokens, and `total`; over rows that could be tokenized."""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "num_rows": self.num_rows,
            "num_errors": self.num_errors,
            "errors": dict(self.errors),
            "first_error": self.first_error,
            "prompt_tokens": dict(self.prompt_tokens),
        }

    def lines(self) -> list[str]:
        """The same as text for a terminal."""
        counts = Counts(num_rows=self.num_rows, errors=self.errors)
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.prompt_tokens.items())
        return [f"rows      {rows_line(counts)}", f"tokens    {lengths or 'none'}"]


def length_quantiles(lengths: Mapping[int, int]) -> dict[str, int]:
    """Length -> rows, to minimum, quantiles, maximum and total; empty without rows."""
    if not lengths:
        return {}
    ordered = sorted(lengths.items())
    num_rows = sum(lengths.values())
    found = {"min": ordered[0][0]}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found[name] = _quantile(ordered, share * num_rows)
    found["max"] = ordered[-1][0]
    found["total"] = sum(length * rows for length, rows in ordered)
    return found


def _quantile(ordered: Sequence[tuple[int, int]], rank: float) -> int:
    """The smallest length that at least `rank` rows do not exceed."""
    seen = 0
    for length, rows in ordered:
        seen += rows
        if seen >= rank:
            return length
    return ordered[-1][0]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is needed of an engine to prepare prompts; its graphs stay closed."""

    tokenizer: Tokenizer | None
    max_tokens: int
    vocab_size: int


def read_engine(folder: Path) -> EngineFacts:
    """Read manifest and tokenizer of an engine folder. Raises `EngineError`."""
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.open(folder) if manifest.has_tokenizer else None
    return EngineFacts(tokenizer, manifest.limits.max_tokens, manifest.target.vocab_size)


def check_job(job: Job, engine: EngineText) -> CheckReport:
    """Prepare every row of the job's input as `run` would, and count.

    Raises what `run` raises before it decodes: wrong columns, an engine that does not fit.
    """
    plan = ShardPlan.open(job)
    preparer = PromptPreparer(job, plan.columns, engine)
    lengths: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    first_error = None
    for shard, table in plan.files.read(plan.shards):
        for prepared in plan.prepare(shard, table, preparer):
            if prepared.num_prompt_tokens is not None:
                lengths[prepared.num_prompt_tokens] += 1
            if prepared.error is not None:
                errors[str(prepared.error.code)] += 1
                first_error = first_error or f"row {prepared.row}: {prepared.error.message}"
    return CheckReport(
        plan.num_rows,
        errors.total(),
        dict(sorted(errors.items())),
        first_error,
        length_quantiles(lengths),
    )
