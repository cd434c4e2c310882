"""What a job will read and write: columns, shards, and what a part must come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dspark_batch.errors import InputError
from dspark_batch.job.columns import PromptColumns, choose_columns
from dspark_batch.job.definition import RESULT_FIELDS, Job
from dspark_batch.job.parquet import PromptFiles, column_values
from dspark_batch.job.parts import Part, output_schema
from dspark_batch.job.prompts import PreparedRow, PromptPreparer
from dspark_batch.job.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A job, its input, and the shards that the input is cut into. Knows no engine."""

    job: Job
    files: PromptFiles
    columns: PromptColumns
    schema: pa.Schema
    """Of the parts."""
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, job: Job) -> Self:
        """Look at the input. Raises `InputError` where it cannot be the input of this job."""
        files = PromptFiles(job.input)
        columns = choose_columns(files.kinds, files.types, job)
        schema = output_schema(files.schema, prefix=job.output_prefix, token_ids=job.token_ids)
        sizes = [file.row_groups for file in files.files]
        shards = plan_shards(sizes, part_rows=job.part_rows, limit=job.limit)
        return cls(job, files, columns, schema, tuple(shards))

    @property
    def num_rows(self) -> int:
        """Rows that the job reads."""
        return sum(shard.num_rows for shard in self.shards)

    def prepare(
        self, shard: Shard, table: pa.Table, preparer: PromptPreparer
    ) -> Iterator[PreparedRow]:
        """The rows of a shard, in input order."""
        names = (self.columns.name, *self.columns.params)
        columns = [column_values(table, name) for name in names]
        for row, values in enumerate(zip(*columns, strict=True), start=shard.first_row):
            yield preparer.prepare(row, dict(zip(names, values, strict=True)))

    def fingerprint(self, shard: Shard, *, engine: Mapping[str, str]) -> dict[str, str]:
        """Everything that decides what the part of `shard` holds, field by field."""
        file = self.files.files[shard.file]
        settings = self.job.model_dump(mode="json", include=set(RESULT_FIELDS))
        return {
            "input.file": file.name,
            "input.size": str(file.size),
            "input.sha256": file.sha256,
            "input.rows": f"{shard.first_row}-{shard.first_row + shard.num_rows - 1}",
            "job.prompt": f"{self.columns.kind} in {self.columns.name}",
            **{f"job.{key}": json.dumps(settings[key]) for key in RESULT_FIELDS},
            **{f"engine.{key}": value for key, value in engine.items()},
        }

    def pending(self, parts: Sequence[Part], *, engine: Mapping[str, str]) -> list[Shard]:
        """The shards without a part. Raises `InputError` for a part of another job."""
        shards = {shard.part_name: shard for shard in self.shards}
        for part in parts:
            shard = shards.pop(part.path.name, None)
            if shard is None:
                problem = "this one writes no such file"
            else:
                problem = difference(part.fingerprint, self.fingerprint(shard, engine=engine))
            if problem:
                raise InputError(
                    f"{part.path} is the result of another job: {problem}",
                    hint="write elsewhere with -o FOLDER, or replace it with --overwrite",
                )
        return list(shards.values())


def plan_shards(
    row_groups: Sequence[Sequence[int]], *, part_rows: int, limit: int | None
) -> list[Shard]:
    """Cut the input into shards of at most `part_rows` rows that cross no row group.

    `row_groups[file]` are the row counts of a file's row groups. An input without rows has one
    empty shard, so that its output has a schema.
    """
    shards: list[Shard] = []
    first_row = 0
    end = sum(map(sum, row_groups)) if limit is None else limit
    for file, sizes in enumerate(row_groups):
        for row_group, size in enumerate(sizes):
            size = min(size, end - first_row)
            for offset in range(0, size, part_rows):
                num_rows = min(part_rows, size - offset)
                shards.append(
                    Shard(len(shards), file, row_group, offset, first_row + offset, num_rows)
                )
            first_row += max(size, 0)
    return shards or [Shard(0, 0, 0, 0, 0, 0)]


def difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The fields in which two fingerprints differ, in words; empty if they agree."""
    return ", ".join(
        f"{key} was {_short(found.get(key))} and is {_short(wanted.get(key))}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    )


def _short(value: str | None) -> str:
    """A value that fits into a message: hashes and long texts are cut."""
    if value is None:
        return "not there"
    return value if len(value) <= 24 else f"{value[:16]}…"
