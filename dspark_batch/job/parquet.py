"""Input files: find them, identify them, read them shard by shard in bounded memory.

With `parts` the only module that imports pyarrow. Reading holds about one batch of rows, whatever
the size of the row group; all columns are handed through as they are.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.errors import InputError, StorageError
from dspark_batch.job.shards import Shard

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 20, 64
_OWN_METADATA = b"dspark_batch"


@dataclass(frozen=True, slots=True)
class PromptFile:
    """One input file and what identifies its content."""

    path: Path
    name: str
    """The file's name: a moved folder is still the same input."""
    size: int
    """Bytes."""
    sha256: str
    """Of the footer and of 64 evenly spread MiB: of everything up to a size of 64 MiB."""
    modified_ns: int
    row_groups: tuple[int, ...]
    """Rows in each row group."""


class PromptFiles:
    """The input of a job: Parquet files with one schema, in the order of their names.

    Raises `InputError` if there is none, if one is not Parquet or if their columns differ.
    """

    def __init__(self, source: str) -> None:
        paths = _find(source)
        self.schema: pa.Schema = None
        files = []
        for path in paths:
            file, schema = _inspect(path)
            files.append(file)
            if self.schema is None:
                self.schema = schema
            elif not schema.equals(self.schema):
                difference = _schema_difference(schema, self.schema)
                raise InputError(
                    f"{path} has other columns than {paths[0]}: {difference}",
                    hint="give files of equal columns, one run for each kind",
                )
        self.files = tuple(files)
        repeated = {name for name in self.schema.names if self.schema.names.count(name) > 1}
        if repeated:
            raise InputError(
                f"{source} has two columns named {min(repeated)!r}", hint="rename one of them"
            )

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return sum(sum(file.row_groups) for file in self.files)

    @property
    def types(self) -> dict[str, str]:
        """Column name -> type in words."""
        return {field.name: str(field.type) for field in self.schema}

    @property
    def kinds(self) -> dict[str, str]:
        """Column name -> what it can serve as (`columns.KIND_NAMES`, `null` or `other`)."""
        return {field.name: _kind(field.type) for field in self.schema}

    def read(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """The rows of each shard; `shards` in the order of the plan, gaps allowed.

        A shard is asked for when the one before it was taken, not sooner.
        """
        for (file, row_group), group in groupby(shards, key=lambda s: (s.file, s.row_group)):
            yield from self._read_row_group(self.files[file], row_group, group)

    def _read_row_group(
        self, file: PromptFile, row_group: int, shards: Iterator[Shard]
    ) -> Iterator[tuple[Shard, pa.Table]]:
        first = next(shards)
        if first.num_rows == 0:
            yield first, self.schema.empty_table()
            return
        batches = _batches(file, row_group, min(_BATCH_ROWS, first.num_rows))
        batch, batch_offset = next(batches), 0
        for shard in chain([first], shards):
            pieces = []
            offset, end = shard.offset, shard.offset + shard.num_rows
            while offset < end:
                while batch_offset + batch.num_rows <= offset:
                    batch_offset += batch.num_rows
                    batch = next(batches)
                start = offset - batch_offset
                pieces.append(batch.slice(start, min(batch.num_rows - start, end - offset)))
                offset += pieces[-1].num_rows
            yield shard, pa.Table.from_batches(pieces, schema=self.schema)


def _find(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob("*.parquet"))
    elif path.exists():
        return [path]
    elif glob.has_magic(source):
        paths = sorted(Path(name) for name in glob.glob(source, recursive=True))
    else:
        raise InputError(f"there is no file or folder {source}")
    if not paths:
        raise InputError(f"there is no Parquet file in {source}")
    return paths


def _inspect(path: Path) -> tuple[PromptFile, pa.Schema]:
    try:
        with pq.ParquetFile(path) as parquet:
            footer = parquet.metadata
            row_groups = tuple(
                footer.row_group(index).num_rows for index in range(footer.num_row_groups)
            )
            stat = path.stat()
            digest = _digest(path, size=stat.st_size, footer_bytes=footer.serialized_size + 8)
            file = PromptFile(path, path.name, stat.st_size, digest, stat.st_mtime_ns, row_groups)
            return file, parquet.schema_arrow
    except pa.ArrowInvalid as exc:
        raise InputError(f"{path} is not a Parquet file: {exc}") from exc
    except OSError as exc:
        raise StorageError(f"cannot read {path}: {exc}") from exc


def _digest(path: Path, *, size: int, footer_bytes: int) -> str:
    spans = [(max(0, size - footer_bytes), footer_bytes)]
    if size <= _SAMPLE_BYTES * _NUM_SAMPLES:
        spans.append((0, size))
    else:
        step = (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1)
        spans += [(index * step, _SAMPLE_BYTES) for index in range(_NUM_SAMPLES)]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _schema_difference(schema: pa.Schema, other: pa.Schema) -> str:
    fields = {field.name: str(field.type) for field in schema}
    others = {field.name: str(field.type) for field in other}
    for name in [*others, *fields]:
        if fields.get(name) != others.get(name):
            return f"{name} is {fields.get(name, 'missing')}, not {others.get(name, 'missing')}"
    return "their order or nullability"


def _batches(file: PromptFile, row_group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The row group's batches; ends in an error, never early."""
    try:
        stat = file.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.modified_ns):
            raise InputError(
                f"{file.path} was changed while the run read it",
                hint="run the same command again with --overwrite",
            )
        # The convenient readers hold whole row groups: 300 to 1,200 MiB where this holds 27.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
            yield from parquet.iter_batches(batch_rows, row_groups=[row_group])
    except (OSError, pa.ArrowException) as exc:
        raise StorageError(f"cannot read row group {row_group} of {file.path}: {exc}") from exc
    raise StorageError(f"row group {row_group} of {file.path} ends before its last row")


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if _is_text(kind):
        return "string"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    if pa.types.is_null(kind):
        return "null"
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return "other"
    item = kind.value_type
    if pa.types.is_struct(item):
        names = [item.field(index).name for index in range(item.num_fields)]
        parts = [item.field(name).type for name in ("role", "content") if names.count(name) == 1]
        return "messages" if len(parts) == 2 and all(map(_is_text, parts)) else "other"
    return {"string": "strings", "integer": "integers"}.get(_kind(item), "other")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def column_values(table: pa.Table, name: str) -> list[object]:
    """A column as Python values; empty `bytes` stand for text that is not UTF-8."""
    column = table.column(name)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""


def write_columns(
    path: Path, columns: Mapping[str, Sequence[object]], *, metadata: Mapping[str, object]
) -> None:
    """Write a small table of our own, with `metadata` as JSON in its footer.

    A list of arrays becomes a column of lists. Raises `StorageError`.
    """
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({_OWN_METADATA: json.dumps(metadata)})
    try:
        pq.write_table(table, path, compression="zstd")
    except OSError as exc:
        raise StorageError(f"cannot write {path}: {exc.strerror or exc}") from exc


def read_columns(path: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The columns and the metadata of `write_columns`; no metadata in a file of another origin.

    Raises `InputError` where there is no Parquet file.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as exc:
        raise InputError(f"cannot read {path}: {exc}") from exc
    about = (table.schema.metadata or {}).get(_OWN_METADATA, b"{}")
    return table.to_pydict(), json.loads(about)
