"""What is measured or recorded: greedy prompts of a Parquet file, prepared as `run` does it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dspark_batch.decode import Completion, DecodeStats, Prompt, SamplingParams, decode
from dspark_batch.engine import Engine
from dspark_batch.errors import DSparkError, InputError
from dspark_batch.job import Job, PromptFiles, PromptPreparer, Shard, choose_columns, column_values

MODES = ("off", "on", "auto")
"""The values of `spec`: plain decoding, which the others are compared with, comes first."""

_SOURCE = "source"


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, numbered by their place in the input."""

    prompts: tuple[Prompt, ...]
    sources: tuple[str | None, ...]
    """The column `source` of each prompt."""
    num_rejected: int
    """Rows that `run` would give back as error rows."""

    def resized(self, num_prompts: int) -> Workload:
        """`num_prompts` prompts evenly over these, shortest first, renumbered.

        Begins again where there are fewer: the same prompt twice is as good as two, since nothing
        is shared between rows. Shortest first, because `run` also puts like lengths together.
        """
        size = len(self.prompts)
        if num_prompts <= size:
            chosen = [i * size // num_prompts for i in range(num_prompts)]
        else:
            chosen = [i % size for i in range(num_prompts)]
        chosen.sort(key=lambda i: len(self.prompts[i].token_ids))
        prompts = [replace(self.prompts[i], row=row) for row, i in enumerate(chosen)]
        return Workload(tuple(prompts), tuple(self.sources[i] for i in chosen), 0)

    def of_each_source(self, num_prompts: int | None) -> Workload:
        """At most `num_prompts` prompts of every source, evenly over them; None for all."""
        rows_of: dict[str | None, list[int]] = {}
        for i, source in enumerate(self.sources):
            rows_of.setdefault(source, []).append(i)
        chosen = sorted(
            rows[i * len(rows) // number]
            for rows in rows_of.values()
            for number in [min(num_prompts or len(rows), len(rows))]
            for i in range(number)
        )
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in chosen),
            sources=tuple(self.sources[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decode of a workload: its completions in the order of the prompts, and its times."""

    completions: tuple[Completion, ...]
    stats: DecodeStats
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the wall clock, prefill and host included."""
        return self.stats.num_new_tokens / self.seconds


def read_workload(path: Path, engine: Engine, *, new_tokens: int, limit: int | None) -> Workload:
    """Greedy prompts of a file that `run` would read; `limit` of them, evenly over the file.

    The columns that override settings by row are ignored: every row is greedy.

    Raises:
        InputError: no prompt column, or not one row that the engine can take.
    """
    settings = {"max_new_tokens": new_tokens, "token_ids": engine.tokenizer is None}
    job = Job.model_validate({"input": str(path), **settings})
    files = PromptFiles(job.input)
    columns = replace(choose_columns(files.kinds, files.types, job), params=())
    preparer = PromptPreparer(job, columns, engine)
    size = files.num_rows
    num_chosen = min(limit or size, size)
    chosen = {i * size // num_chosen for i in range(num_chosen)}
    prompts, sources = [], []
    for shard, rows in files.read(_whole(files)):
        values = column_values(rows, columns.name)
        names = column_values(rows, _SOURCE) if _SOURCE in files.types else [None] * len(values)
        for row, (value, name) in enumerate(zip(values, names, strict=True), shard.first_row):
            if row not in chosen:
                continue
            prompt = preparer.prepare(row, {columns.name: value}).prompt
            if prompt is not None:
                params = SamplingParams(max_new_tokens=new_tokens)
                prompts.append(replace(prompt, params=params))
                sources.append(None if name is None else str(name))
    if not prompts:
        raise InputError(f"{path} has no row that the engine {engine.folder} can decode")
    return Workload(tuple(prompts), tuple(sources), num_chosen - len(prompts))


def decode_all(engine: Engine, prompts: Sequence[Prompt], spec: str) -> Decoded:
    """Decode the prompts in one of `MODES`.

    Raises:
        DSparkError: a row failed; there is nothing to measure then.
    """
    stats = DecodeStats()
    begin = time.perf_counter()
    completions = {c.row: c for c in decode(prompts, engine, spec=spec, stats=stats)}
    seconds = time.perf_counter() - begin
    for completion in completions.values():
        if completion.error is not None:
            raise DSparkError(f"row {completion.row} failed: {completion.error.message}")
    return Decoded(tuple(completions[prompt.row] for prompt in prompts), stats, seconds)


def _whole(files: PromptFiles) -> list[Shard]:
    """One shard per row group."""
    shards: list[Shard] = []
    first_row = 0
    for file, prompt_file in enumerate(files.files):
        for row_group, size in enumerate(prompt_file.row_groups):
            shards.append(Shard(len(shards), file, row_group, 0, first_row, size))
            first_row += size
    return shards
