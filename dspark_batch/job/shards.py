"""A shard: a contiguous row range of the input that becomes one part, and its open rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark_batch.decode import Completion, FinishReason, Prompt, RowError, SpecCounts
from dspark_batch.errors import DSparkError

if TYPE_CHECKING:
    import pyarrow as pa

    from dspark_batch.job.prompts import PreparedRow

PART_NAME = re.compile(r"part-\d{5,}-r\d{10,}\.parquet", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shard:
    """A row range inside one row group of one input file."""

    index: int
    """Position in the plan; parts in this order are the input in its order."""
    file: int
    row_group: int
    offset: int
    """First row, counted in the row group."""
    first_row: int
    """First row, counted over the whole input."""
    num_rows: int

    @property
    def part_name(self) -> str:
        """File name of the part; sorting names sorts rows."""
        return f"part-{self.index:05d}-r{self.first_row:010d}.parquet"


@dataclass(frozen=True, slots=True)
class OutputRow:
    """What is written for one input row."""

    completion: str | None
    """None for an error row, and where the engine has no tokenizer."""
    finish_reason: FinishReason
    error: RowError | None
    num_prompt_tokens: int | None
    """None where the row failed before it was tokenized."""
    token_ids: tuple[int, ...]
    spec: SpecCounts | None
    """None where the row never reached decode."""
    seed: int | None
    """The seed that was used; None where the row's parameters are invalid."""


class OpenShard:
    """A shard whose rows are being decoded.

    Invariant: a row is filled in exactly once; complete means that every row is. Breaking it is a
    bug of ours and raises `DSparkError`.
    """

    def __init__(self, shard: Shard, table: pa.Table) -> None:
        self.shard = shard
        self.table = table
        """The input rows."""
        self._rows: dict[int, OutputRow] = {}
        self._seeds: dict[int, int] = {}

    def admit(self, prompt: Prompt) -> None:
        """The row goes to decode."""
        self._seeds[prompt.row] = prompt.params.seed

    def fail(self, prepared: PreparedRow) -> None:
        """The row never reaches decode."""
        output = OutputRow(
            completion=None,
            finish_reason=FinishReason.ERROR,
            error=prepared.error,
            num_prompt_tokens=prepared.num_prompt_tokens,
            token_ids=(),
            spec=None,
            seed=prepared.seed,
        )
        self._fill(prepared.row, output)

    def complete(self, completion: Completion) -> None:
        """Decode is done with the row."""
        failed = completion.error is not None
        self._fill(
            completion.row,
            OutputRow(
                None if failed else completion.text,
                FinishReason.ERROR if failed else completion.finish_reason,
                completion.error,
                completion.num_prompt_tokens,
                completion.token_ids,
                completion.spec,
                self._seeds[completion.row],
            ),
        )

    def _fill(self, row: int, output: OutputRow) -> None:
        first = self.shard.first_row
        if not first <= row < first + self.shard.num_rows:
            raise DSparkError(f"row {row} is not of {self.shard}")
        if row in self._rows:
            raise DSparkError(f"row {row} was completed twice")
        self._rows[row] = output

    @property
    def is_complete(self) -> bool:
        """Whether every row of the shard is there."""
        return len(self._rows) == self.shard.num_rows

    def rows(self) -> list[OutputRow]:
        """The rows in input order; the shard must be complete."""
        if not self.is_complete:
            raise DSparkError(f"{self.shard} has only {len(self._rows)} rows")
        return [self._rows[row] for row in sorted(self._rows)]
