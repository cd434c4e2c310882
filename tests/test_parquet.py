from __future__ import annotations

import datetime
import json
import os
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.decode.types import ErrorCode, FinishReason, RowError, SpecCounts
from dspark_batch.errors import InputError, StorageError
from dspark_batch.job import parquet, parts
from dspark_batch.job.parquet import PromptFiles, column_values
from dspark_batch.job.parts import commit_part, output_schema, read_part
from dspark_batch.job.shard_plan import plan_shards
from dspark_batch.job.shards import OutputRow, Shard

WHEN = datetime.datetime(2026, 11, 23, 6, 0, tzinfo=datetime.UTC)

OK = OutputRow(
    "yes", FinishReason.STOP, None, 5, (1, 2, 3), SpecCounts(4, 12, 10, 6, (1, 1, 1, 1), 0, 4), 11
)
BAD = OutputRow(
    None,
    FinishReason.ERROR,
    RowError(ErrorCode.INVALID_ROW, "read", "prompt is null"),
    None,
    (),
    None,
    None,
)


def rich_table(num_rows: int) -> pa.Table:
    """Columns of every kind that Parquet gives back as it was."""
    words = pa.array(["a", None, "b"] * num_rows).slice(0, num_rows)
    return pa.table(
        {
            "prompt": [f"prompt {i}" for i in range(num_rows)],
            "category": words.dictionary_encode(),
            "tags": pa.array(
                [["x", "y"], None, []] * num_rows,
                type=pa.list_(pa.dictionary(pa.int32(), pa.string())),
            ).slice(0, num_rows),
            "meta": [{"k": i, "more": [{"z": None}]} for i in range(num_rows)],
            "map": pa.array([[("a", i)] for i in range(num_rows)], pa.map_(pa.string(), pa.int8())),
            "when": pa.array([WHEN] * num_rows, pa.timestamp("us", tz="UTC")),
            "price": pa.array([Decimal("1.50")] * num_rows, pa.decimal128(12, 2)),
            "pair": pa.array([[1, 2]] * num_rows, pa.list_(pa.int32(), 2)),
            "view": pa.array(["v"] * num_rows, pa.string_view()),
            "nothing": pa.nulls(num_rows),
            "bits": [b"\xff\x00"] * num_rows,
        },
        metadata={"owner": "night shift"},
    )


def write(folder: Path, table: pa.Table, name: str = "in.parquet", row_group_size: int = 7) -> str:
    path = folder / name
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@settings(derandomize=True)
@given(
    sizes=st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=3),
    part_rows=st.integers(1, 9),
    limit=st.none() | st.integers(1, 40),
)
def test_shards_cover_every_row_once_and_cross_no_row_group(sizes, part_rows, limit):
    shards = plan_shards(sizes, part_rows=part_rows, limit=limit)
    total = sum(map(sum, sizes))
    expected = total if limit is None else min(total, limit)
    rows = [row for s in shards for row in range(s.first_row, s.first_row + s.num_rows)]
    assert rows == list(range(expected))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    if expected:
        assert all(1 <= s.num_rows <= part_rows for s in shards)
        assert all(s.offset + s.num_rows <= sizes[s.file][s.row_group] for s in shards)
    else:
        assert [s.num_rows for s in shards] == [0]


def test_part_names_sort_like_their_rows():
    assert Shard(12, 0, 3, 0, 48000, 10).part_name == "part-00012-r0000048000.parquet"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 30),
    row_group_size=st.integers(1, 31),
    part_rows=st.integers(1, 9),
    batch_rows=st.integers(1, 9),
    data=st.data(),
)
def test_reading_any_shards_gives_exactly_their_rows(
    tmp_path_factory, num_rows, row_group_size, part_rows, batch_rows, data
):
    table = rich_table(num_rows)
    source = write(tmp_path_factory.mktemp("in"), table, row_group_size=row_group_size)
    files = PromptFiles(source)
    shards = plan_shards([files.files[0].row_groups], part_rows=part_rows, limit=None)
    wanted = [shard for shard in shards if data.draw(st.booleans())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_BATCH_ROWS", batch_rows)
        read = list(files.read(wanted))
    assert [shard for shard, _ in read] == wanted
    for shard, rows in read:
        expected = table.slice(shard.first_row, shard.num_rows)
        assert rows.schema.equals(expected.schema)
        assert rows.to_pylist() == expected.to_pylist()


def test_reading_one_large_row_group_holds_a_small_share_of_it(tmp_path):
    num_rows, row_bytes = 24_000, 2_000
    noise = np.random.default_rng(3).integers(97, 123, size=num_rows * row_bytes, dtype=np.uint8)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * row_bytes
    column = pa.Array.from_buffers(
        pa.string(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(noise)]
    )
    source = write(tmp_path, pa.table({"prompt": column}), row_group_size=num_rows)
    del column, noise
    files = PromptFiles(source)
    shards = plan_shards([files.files[0].row_groups], part_rows=512, limit=None)
    before, highest = pa.total_allocated_bytes(), 0
    for _shard, table in files.read(shards):
        highest = max(highest, pa.total_allocated_bytes() - before)
        assert table.num_rows <= 512
    assert 0 < highest < 12 << 20, f"{highest >> 20} MiB of 46 were held"


def test_a_folder_and_a_pattern_are_read_in_the_order_of_names(tmp_path):
    for name, prompts in (("b.parquet", ["3"]), ("a.parquet", ["1", "2"])):
        write(tmp_path, pa.table({"prompt": prompts}), name)
    (tmp_path / "notes.txt").write_text("not read")
    for source in (tmp_path, tmp_path / "*.parquet"):
        files = PromptFiles(str(source))
        shards = plan_shards([f.row_groups for f in files.files], part_rows=9, limit=None)
        read = [rows.column("prompt").to_pylist() for _, rows in files.read(shards)]
        assert read == [["1", "2"], ["3"]]
        assert [shard.first_row for shard in shards] == [0, 2]


def test_the_identity_of_a_file_is_its_content(tmp_path):
    first = PromptFiles(write(tmp_path, pa.table({"prompt": ["2 + 2"]}))).files[0]
    again = PromptFiles(write(tmp_path, pa.table({"prompt": ["2 + 2"]}))).files[0]
    edited = PromptFiles(write(tmp_path, pa.table({"prompt": ["3 + 3"]}))).files[0]
    assert first.sha256 == again.sha256
    assert first.size == edited.size
    assert first.sha256 != edited.sha256


def test_the_identity_of_a_large_file_reads_samples_and_the_footer(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_SAMPLE_BYTES", 16)
    monkeypatch.setattr(parquet, "_NUM_SAMPLES", 4)
    path = tmp_path / "large"
    content = bytearray(range(200)) + b"footer"
    path.write_bytes(content)

    def digest() -> str:
        return parquet._digest(path, size=len(content), footer_bytes=40)

    first = digest()
    for position, seen in ((0, True), (70, True), (30, False), (170, True), (204, True)):
        content[position] ^= 1
        path.write_bytes(content)
        assert (digest() != first) is seen
        content[position] ^= 1


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path):
    files = PromptFiles(write(tmp_path, pa.table({"prompt": ["a", "b"]}), row_group_size=1))
    shards = plan_shards([files.files[0].row_groups], part_rows=1, limit=None)
    reading = files.read(shards)
    next(reading)
    write(tmp_path, pa.table({"prompt": ["a", "b", "c"]}), row_group_size=1)
    with pytest.raises(InputError, match="was changed while the run read it"):
        next(reading)


def test_a_damaged_page_is_a_storage_error_that_names_the_row_group(tmp_path):
    table = pa.table({"prompt": [f"prompt number {i}" for i in range(200)]})
    path = Path(write(tmp_path, table, row_group_size=100))
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    files = PromptFiles(str(path))
    reading = files.read(plan_shards([files.files[0].row_groups], part_rows=100, limit=None))
    next(reading)
    with pytest.raises(StorageError, match="cannot read row group 1 of"):
        next(reading)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.parquet", "no file or folder"),
        (lambda folder: folder, "no Parquet file in"),
        (lambda folder: folder / "*.parquet", "no Parquet file in"),
        (lambda folder: folder / "x.csv", "is not a Parquet file"),
    ],
)
def test_an_input_that_is_none_is_an_input_error(tmp_path, make, message):
    (tmp_path / "x.csv").write_text("prompt\nhello\n")
    with pytest.raises(InputError, match=message):
        PromptFiles(str(make(tmp_path)))


def test_files_with_different_columns_are_refused_by_name(tmp_path):
    write(tmp_path, pa.table({"prompt": ["a"], "n": [1]}), "a.parquet")
    write(tmp_path, pa.table({"prompt": ["a"], "n": ["1"]}), "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has other columns than .*n is string, not"):
        PromptFiles(str(tmp_path))


def test_files_that_differ_in_metadata_only_are_one_input(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path, pa.table({"prompt": [name]}, metadata={"made": name}), name)
    files = PromptFiles(str(tmp_path))
    shards = plan_shards([f.row_groups for f in files.files], part_rows=9, limit=None)
    assert [rows.num_rows for _, rows in files.read(shards)] == [1, 1]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(InputError, match="two columns named 'prompt'"):
        PromptFiles(write(tmp_path, table))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.string(), "string"),
        (pa.large_string(), "string"),
        (pa.string_view(), "string"),
        (pa.dictionary(pa.int8(), pa.string()), "string"),
        (pa.uint8(), "integer"),
        (pa.float32(), "number"),
        (pa.null(), "null"),
        (pa.bool_(), "other"),
        (pa.binary(), "other"),
        (pa.timestamp("us"), "other"),
        (pa.list_(pa.int64()), "integers"),
        (pa.large_list(pa.uint32()), "integers"),
        (pa.list_(pa.string()), "strings"),
        (pa.list_(pa.float64()), "other"),
        (pa.list_(pa.list_(pa.string())), "other"),
        (pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), "messages"),
        (
            pa.large_list(
                pa.struct(
                    [
                        ("content", pa.large_string()),
                        ("name", pa.string()),
                        ("role", pa.dictionary(pa.int8(), pa.string())),
                    ]
                )
            ),
            "messages",
        ),
        (pa.list_(pa.struct([("role", pa.string())])), "other"),
        (pa.list_(pa.struct([("role", pa.string()), ("content", pa.int8())])), "other"),
    ],
)
def test_a_column_is_what_its_type_can_serve_as(kind, expected):
    assert parquet._kind(kind) == expected


def test_text_that_is_not_utf8_spoils_its_own_row_only():
    broken = pa.array([b"good", b"\xff\xfe", None]).cast(pa.binary()).view(pa.string())
    assert column_values(pa.table({"prompt": broken}), "prompt") == ["good", b"", None]


def commit(folder: Path, table: pa.Table, rows: list[OutputRow], *, prefix: str = "") -> Path:
    path = folder / "part.parquet"
    commit_part(
        path,
        table,
        rows,
        schema=output_schema(table.schema, prefix=prefix, token_ids=True),
        fingerprint={"input.rows": "0-2"},
        temporary=folder / "part.tmp",
    )
    return path


def test_a_footer_keeps_only_what_is_true_of_a_part(tmp_path):
    spark = {"type": "struct", "fields": [{"name": "prompt", "type": "string"}]}
    by_range = {"index_columns": [{"kind": "range", "start": 0, "stop": 3, "step": 1}]}
    by_column = {"index_columns": ["prompt"], "columns": [{"name": "prompt"}]}
    for pandas, kept in [(by_range, False), (by_column, True), (["odd"], False)]:
        metadata = {
            "owner": "night shift",
            "org.apache.spark.version": "3.5.1",
            "org.apache.spark.sql.parquet.row.metadata": json.dumps(spark),
            "huggingface": json.dumps({"info": {"features": {"prompt": {"dtype": "string"}}}}),
            "parquet.avro.schema": "{}",
            "pandas": json.dumps(pandas),
        }
        path = commit(tmp_path, rich_table(3).replace_schema_metadata(metadata), [OK, BAD, OK])
        written = set(pq.read_schema(path).metadata)
        theirs = {key for key in written if not key.startswith(b"dspark_batch.")}
        expected = {b"owner", b"org.apache.spark.version"} | ({b"pandas"} if kept else set())
        assert theirs == expected


def test_a_part_holds_the_input_untouched_and_then_the_output(tmp_path):
    table = rich_table(3)
    path = commit(tmp_path, table, [OK, BAD, OK])
    written = pq.read_table(path)
    assert written.schema.names[: table.num_columns] == table.schema.names
    assert written.select(table.schema.names).schema.equals(table.schema)
    assert written.select(table.schema.names).to_pylist() == table.to_pylist()
    assert written.schema.metadata[b"owner"] == b"night shift"
    assert written.select(range(table.num_columns, written.num_columns)).to_pylist()[:2] == [
        {
            "completion": "yes",
            "finish_reason": "stop",
            "status": "ok",
            "error": None,
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
            "spec": {
                "num_rounds": 4,
                "num_draft_tokens": 12,
                "num_verified_tokens": 10,
                "num_accepted_tokens": 6,
                "accepted_length": 2.5,
                "acceptance_rate": pytest.approx(0.6),
                "accepted_histogram": [1, 1, 1, 1],
            },
            "seed": 11,
            "output_token_ids": [1, 2, 3],
        },
        {
            "completion": None,
            "finish_reason": "error",
            "status": "error",
            "error": {"code": "invalid_row", "stage": "read", "message": "prompt is null"},
            "usage": {"prompt_tokens": None, "completion_tokens": 0},
            "spec": None,
            "seed": None,
            "output_token_ids": None,
        },
    ]


def test_the_output_columns_have_the_documented_types():
    schema = output_schema(pa.schema([]), prefix="", token_ids=False)
    assert [(field.name, str(field.type)) for field in schema] == [
        ("completion", "large_string"),
        ("finish_reason", "string"),
        ("status", "string"),
        ("error", "struct<code: string, stage: string, message: string>"),
        ("usage", "struct<prompt_tokens: int32, completion_tokens: int32>"),
        (
            "spec",
            "struct<num_rounds: int32, num_draft_tokens: int32, num_verified_tokens: int32, "
            "num_accepted_tokens: int32, accepted_length: float, acceptance_rate: float, "
            "accepted_histogram: list<item: int32>>",
        ),
        ("seed", "int64"),
    ]


def test_a_clash_of_names_says_which_flag_solves_it():
    schema = pa.schema([("prompt", pa.string()), ("status", pa.int8())])
    with pytest.raises(InputError, match=r"(?s)'status'.*--output-prefix PREFIX"):
        output_schema(schema, prefix="", token_ids=False)
    names = output_schema(schema, prefix="new_", token_ids=False).names
    assert names[:4] == ["prompt", "status", "new_completion", "new_finish_reason"]


def test_output_token_ids_clash_only_where_they_are_written():
    schema = pa.schema([("output_token_ids", pa.int8())])
    assert output_schema(schema, prefix="", token_ids=False)
    with pytest.raises(InputError, match="output_token_ids"):
        output_schema(schema, prefix="", token_ids=True)


def test_the_footer_says_where_a_part_comes_from(tmp_path):
    path = commit(tmp_path, rich_table(3), [OK, BAD, OK])
    part = read_part(path)
    assert (part.num_rows, part.fingerprint) == (3, {"input.rows": "0-2"})
    assert part.counts.num_rows == 3
    assert part.counts.errors == {"invalid_row": 1}
    assert (part.counts.num_prompt_tokens, part.counts.num_new_tokens) == (10, 6)
    assert part.counts.spec == SpecCounts(8, 24, 20, 12, (2, 2, 2, 2), 0, 8)
    metadata = pq.read_metadata(path).metadata
    assert json.loads(metadata[b"dspark_batch.fingerprint"]) == {"input.rows": "0-2"}
    assert b"dspark_batch.version" in metadata


def test_polars_reads_a_folder_of_parts(tmp_path):
    commit(tmp_path, rich_table(3).select(["prompt", "meta"]), [OK, BAD, OK])
    frame = pl.scan_parquet(tmp_path / "*.parquet").collect()
    assert frame["status"].to_list() == ["ok", "error", "ok"]
    assert frame["spec"].struct.field("accepted_length").to_list() == [2.5, None, 2.5]


def test_a_part_is_large_groups_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ROW_GROUP_ROWS", 2)
    path = commit(tmp_path, rich_table(3), [OK, BAD, OK])
    assert pq.read_metadata(path).num_row_groups == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_is_on_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    steps = []
    sync, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append(f"sync {path.name}")
        sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name} {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    commit(tmp_path, rich_table(1), [OK])
    assert steps == ["sync part.tmp", "rename part.tmp part.parquet", f"sync {tmp_path.name}"]


def test_a_commit_that_fails_leaves_no_part(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match=r"cannot write .*: No space left on device"):
        commit(tmp_path, rich_table(3), [OK, BAD, OK])
    assert not (tmp_path / "part.parquet").exists()


def test_a_commit_whose_file_lost_rows_is_refused(tmp_path, monkeypatch):
    whole = pq.write_table
    monkeypatch.setattr(
        pq, "write_table", lambda table, file, **kw: whole(table.slice(1), file, **kw)
    )
    with pytest.raises(StorageError, match="holds 2 rows, not 3"):
        commit(tmp_path, rich_table(3), [OK, BAD, OK])
    assert not (tmp_path / "part.parquet").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 something PAR1", None])
def test_a_file_that_is_no_part_is_refused(tmp_path, content):
    path = tmp_path / "part.parquet"
    if content is None:
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(StorageError, match="is not a file that dspark-batch wrote"):
        read_part(path)
