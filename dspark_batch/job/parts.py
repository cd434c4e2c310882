"""Parts: the output table of a shard, committed atomically, and what their footers say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch import __version__
from dspark_batch.engine import replacing
from dspark_batch.errors import InputError, StorageError
from dspark_batch.job.shards import OutputRow
from dspark_batch.job.summary import Counts, count_rows

_ROW_GROUP_ROWS = 8192  # the next reader should not need more memory than this one did
_VERSION, _FINGERPRINT, _COUNTS = (
    f"dspark_batch.{key}".encode() for key in ("version", "fingerprint", "counts")
)

_SCHEMAS_OF_OTHERS = frozenset(
    [
        b"org.apache.spark.sql.parquet.row.metadata",
        b"huggingface",
        b"iceberg.schema",
        b"parquet.avro.schema",
        b"avro.schema",
        b"parquet.proto.descriptor",
        b"parquet.thrift.descriptor",
        b"thrift.descriptor",
    ]
)
"""Footer keys with the columns of a file: a reader that goes by them would not see ours."""

_FIELDS = (
    pa.field("completion", pa.large_string()),
    pa.field("finish_reason", pa.string()),
    pa.field("status", pa.string()),
    pa.field(
        "error",
        pa.struct([("code", pa.string()), ("stage", pa.string()), ("message", pa.string())]),
    ),
    pa.field(
        "usage", pa.struct([("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32())])
    ),
    pa.field(
        "spec",
        pa.struct(
            [
                ("num_rounds", pa.int32()),
                ("num_draft_tokens", pa.int32()),
                ("num_verified_tokens", pa.int32()),
                ("num_accepted_tokens", pa.int32()),
                ("accepted_length", pa.float32()),
                ("acceptance_rate", pa.float32()),
                ("accepted_histogram", pa.list_(pa.int32())),
            ]
        ),
    ),
    pa.field("seed", pa.int64()),
)
_TOKEN_IDS = pa.field("output_token_ids", pa.list_(pa.int32()))


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part, as its footer describes it."""

    path: Path
    num_rows: int
    fingerprint: Mapping[str, str]
    """Field -> value: the input, the engine and the settings that its rows come from."""
    counts: Counts


def output_schema(schema: pa.Schema, *, prefix: str, token_ids: bool) -> pa.Schema:
    """The columns of a part: all of the input's, then ours. Raises `InputError` on a clash."""
    for field in (*_FIELDS, *([_TOKEN_IDS] if token_ids else [])):
        name = prefix + field.name
        if name in schema.names:
            raise InputError(
                f"the input has a column {name!r}, and the output writes one of that name",
                hint="give the output columns a prefix: --output-prefix PREFIX",
            )
        schema = schema.append(field.with_name(name))
    return schema


def commit_part(
    path: Path,
    table: pa.Table,
    rows: Sequence[OutputRow],
    *,
    schema: pa.Schema,
    fingerprint: Mapping[str, str],
    temporary: Path,
) -> Part:
    """Write one part: under a temporary name, read back, synced, renamed.

    `table` holds the input rows, `schema` is that of `output_schema`. After a crash `path` is
    either absent or complete. Raises `StorageError`.
    """
    columns = [*table.columns, *_columns(rows, schema.types[table.num_columns :])]
    counts = count_rows(rows)
    schema = schema.with_metadata(
        {
            **_still_true(schema.metadata or {}),
            _VERSION: __version__,
            _FINGERPRINT: json.dumps(dict(fingerprint), sort_keys=True),
            _COUNTS: json.dumps(counts.to_json(), sort_keys=True),
        }
    )
    # Completions hardly repeat: a dictionary of them costs memory and saves nothing.
    repeating = [*table.schema.names, *schema.names[table.num_columns + 1 : table.num_columns + 3]]
    with replacing(path, temporary=temporary):
        pq.write_table(
            pa.table(columns, schema=schema),
            temporary,
            compression="zstd",
            use_dictionary=repeating,
            row_group_size=_ROW_GROUP_ROWS,
        )
        part = read_part(temporary)
        if (part.num_rows, part.fingerprint) != (table.num_rows, fingerprint):
            raise StorageError(f"{temporary} holds {part.num_rows} rows, not {table.num_rows}")
    return Part(path, part.num_rows, part.fingerprint, part.counts)


def _still_true(metadata: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What the input's footer says that holds for a part too.

    Not the columns, and not pandas' index where that counts the rows of the input.
    """
    kept = {key: value for key, value in metadata.items() if key not in _SCHEMAS_OF_OTHERS}
    try:
        index = json.loads(kept.get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        index = [{}]
    if any(isinstance(column, dict) for column in index):
        del kept[b"pandas"]
    return kept


def _columns(rows: Sequence[OutputRow], types: Sequence[pa.DataType]) -> list[pa.Array]:
    values: list[list[object]] = [
        [row.completion for row in rows],
        [str(row.finish_reason) for row in rows],
        ["ok" if row.error is None else "error" for row in rows],
        [_error(row) for row in rows],
        [
            {"prompt_tokens": row.num_prompt_tokens, "completion_tokens": len(row.token_ids)}
            for row in rows
        ],
        [_spec(row) for row in rows],
        [row.seed for row in rows],
        [list(row.token_ids) if row.error is None else None for row in rows],
    ]
    return [pa.array(column, type=kind) for column, kind in zip(values, types, strict=False)]


def _error(row: OutputRow) -> dict[str, str] | None:
    error = row.error
    if error is None:
        return None
    return {"code": str(error.code), "stage": error.stage, "message": error.message}


def _spec(row: OutputRow) -> dict[str, object] | None:
    spec = row.spec
    if spec is None:
        return None
    return {
        "num_rounds": spec.num_rounds,
        "num_draft_tokens": spec.num_draft_tokens,
        "num_verified_tokens": spec.num_verified_tokens,
        "num_accepted_tokens": spec.num_accepted_tokens,
        "accepted_length": spec.accepted_length,
        "acceptance_rate": spec.acceptance_rate,
        "accepted_histogram": list(spec.accepted_histogram),
    }


def read_part(path: Path) -> Part:
    """What the footer of a part says. Raises `StorageError` for a file that is none of ours."""
    try:
        footer = pq.read_metadata(path)
        metadata = footer.metadata or {}
        return Part(
            path,
            footer.num_rows,
            json.loads(metadata[_FINGERPRINT]),
            Counts.from_json(json.loads(metadata[_COUNTS])),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError) as exc:
        raise StorageError(
            f"{path} is not a file that dspark-batch wrote ({exc})",
            hint="move it away, or write elsewhere with -o FOLDER",
        ) from exc
