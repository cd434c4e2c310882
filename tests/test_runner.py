from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeDecode, FakeEngine, FakeStats, FakeTokenizer, open_fake
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.decode.types import ErrorCode, RowError
from dspark_batch.errors import (
    DSparkError,
    InputError,
    OutputLocked,
    RowErrorsExceeded,
    StoppedEarly,
    StorageError,
    UsageError,
)
from dspark_batch.job import flow, runner
from dspark_batch.job.check import check_job
from dspark_batch.job.definition import Job
from dspark_batch.job.output import OutputFolder
from dspark_batch.job.progress import Progress, RunState
from dspark_batch.job.prompts import row_seed
from dspark_batch.job.status import read_status
from dspark_batch.job.summary import Summary

ARGV = ["run", "in.parquet", "--overwrite"]


class Killed(BaseException):
    """Stands for the end of the process."""


def prompts(num_rows: int) -> list[str]:
    return [f"{i}:" + "ab" * (i * 7 % 23) for i in range(num_rows)]


def table(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "id": [f"id-{i}" for i in range(num_rows)],
            "prompt": prompts(num_rows),
            "n": pa.array([i if i % 3 else None for i in range(num_rows)], pa.int16()),
        }
    )


def job_of(folder: Path, data: pa.Table, *, row_group_size: int = 8, **options: object) -> Job:
    pq.write_table(data, folder / "in.parquet", row_group_size=row_group_size)
    return Job(
        **{"input": str(folder / "in.parquet"), "max_error_rate": 1.0, "part_rows": 5, **options}
    )


def run(
    job: Job,
    *,
    decode: FakeDecode | None = None,
    engine: FakeEngine | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: object,
) -> Summary:
    return runner.run(
        job,
        open_engine=open_fake(engine or FakeEngine()),
        decode=decode or FakeDecode(),
        stats=FakeStats(),
        progress=progress or Progress(),
        argv=ARGV,
        overwrite=overwrite,
        **options,
    )


def result(job: Job) -> pa.Table:
    paths = sorted((job.output_folder / "data").iterdir())
    assert all(path.suffix == ".parquet" for path in paths)
    return pa.concat_tables([pq.read_table(path) for path in paths])


def names(job: Job) -> list[str]:
    return sorted(path.name for path in (job.output_folder / "data").iterdir())


def at(count: int, action: Callable[[], None]) -> Callable[[int], None]:
    """A `before_yield` that acts once, before completion number `count` is given."""
    return lambda num_done: action() if num_done == count else None


def killing(count: int) -> Callable[[int], None]:
    def kill() -> None:
        raise Killed

    return at(count, kill)


def test_every_row_is_answered_in_input_order_beside_its_columns(tmp_path):
    data = table(23)
    job = job_of(tmp_path, data)
    engine = FakeEngine()
    summary = run(job, engine=engine)
    out = result(job)
    assert out.select(data.schema.names).equals(data)
    tokenizer = FakeTokenizer()
    texts = [tokenizer.render([{"role": "user", "content": p}]) for p in prompts(23)]
    assert out["completion"].to_pylist() == [text[::-1] for text in texts]
    assert out["seed"].to_pylist() == [row_seed(0, row) for row in range(23)]
    assert set(out["status"].to_pylist()) == {"ok"}
    assert summary.failure is None
    assert (summary.num_parts, summary.num_run_rows) == (len(names(job)), 23)
    assert engine.closed


def test_parts_are_named_by_shard_and_first_row(tmp_path):
    job = job_of(tmp_path, table(18), row_group_size=8)
    run(job)
    assert names(job) == [
        "part-00000-r0000000000.parquet",
        "part-00001-r0000000005.parquet",
        "part-00002-r0000000008.parquet",
        "part-00003-r0000000013.parquet",
        "part-00004-r0000000016.parquet",
    ]


def test_several_files_are_one_input_with_rows_counted_through(tmp_path):
    folder = tmp_path / "night"
    folder.mkdir()
    pq.write_table(table(7).slice(0, 3), folder / "a.parquet")
    pq.write_table(table(7).slice(3), folder / "b.parquet")
    job = Job(input=str(folder))
    run(job)
    out = result(job)
    assert out["id"].to_pylist() == [f"id-{i}" for i in range(7)]
    assert out["seed"].to_pylist() == [row_seed(0, row) for row in range(7)]


def test_an_input_without_rows_gives_a_part_with_a_schema(tmp_path):
    job = job_of(tmp_path, table(0))
    summary = run(job)
    assert summary.num_parts == summary.num_run_parts == 1
    assert result(job).num_rows == 0
    assert "completion" in result(job).schema.names
    assert "nothing to do" in run(job).lines()[0]


def test_limit_reads_the_first_rows(tmp_path):
    job = job_of(tmp_path, table(20), limit=9)
    run(job)
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(9)]


def test_token_ids_and_prefix_shape_the_output(tmp_path):
    data = pa.table({"prompt": ["ab"], "status": ["mine"]})
    job = job_of(tmp_path, data, token_ids=True, output_prefix="o_", chat_template=False)
    run(job)
    out = result(job).to_pylist()[0]
    assert (out["status"], out["o_status"], out["o_completion"]) == ("mine", "ok", "ba")
    assert out["o_output_token_ids"] == [98, 97, 256]


def test_shards_are_one_stream_that_never_drains(tmp_path):
    # With 4 slots and 5-row shards, rows of the next shard must be admitted before all rows of
    # the one before it are done.
    decode = FakeDecode(num_slots=4)
    job = job_of(tmp_path, table(20), row_group_size=20)
    in_flight: list[int] = []
    decode.before_yield = lambda num_done: in_flight.append(len(decode.admitted) - num_done)
    run(job, decode=decode)
    assert in_flight[:17] == [4] * 17


def test_rows_of_a_shard_come_by_length_turning_round_at_each_shard(tmp_path):
    decode = FakeDecode()
    job = job_of(tmp_path, table(20), row_group_size=20)
    run(job, decode=decode)
    lengths = [len(prompt.token_ids) for prompt in decode.admitted]
    for shard in range(4):
        part = lengths[shard * 5 : shard * 5 + 5]
        assert part == sorted(part, reverse=shard % 2 == 1)
        assert {p.row // 5 for p in decode.admitted[shard * 5 : shard * 5 + 5]} == {shard}


def test_no_more_shards_are_open_than_rows_are_running(tmp_path, monkeypatch):
    # One row that never ends keeps its shard open; all the others must be committed meanwhile.
    class Straggler(FakeDecode):
        def __call__(self, prompts, engine, **options):
            held = None
            for prompt in prompts:
                if held is None:
                    held = prompt
                else:
                    yield self.answer(prompt, engine)
            yield self.answer(held, engine)

    opened = committed = most = 0

    def count(amount: int) -> None:
        nonlocal opened, most
        opened += amount
        most = max(most, opened)

    class Counted(flow.OpenShard):
        def __init__(self, *args):
            super().__init__(*args)
            count(1)

    commit = flow.commit_part

    def counted_commit(*args, **kwargs):
        nonlocal committed
        committed += 1
        count(-1)
        return commit(*args, **kwargs)

    monkeypatch.setattr(flow, "OpenShard", Counted)
    monkeypatch.setattr(flow, "commit_part", counted_commit)
    run(job_of(tmp_path, table(60)), decode=Straggler())
    assert committed > 10
    assert most == 2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 30),
    kills=st.lists(st.integers(0, 12), max_size=4),
    part_rows=st.integers(1, 7),
    num_slots=st.integers(1, 9),
)
def test_a_run_killed_anywhere_and_continued_equals_an_uninterrupted_one(
    tmp_path_factory, num_rows, kills, part_rows, num_slots
):
    folder = tmp_path_factory.mktemp("job")
    job = job_of(folder, table(num_rows), part_rows=part_rows)
    whole = job.model_copy(update={"output": folder / "whole"})
    run(whole, decode=FakeDecode())

    for count in kills:
        decode = FakeDecode(num_slots=num_slots, before_yield=killing(count))
        before = {path: path.stat().st_mtime_ns for path in job.output_folder.glob("data/*")}
        try:
            run(job, decode=decode)
        except Killed:
            assert json.loads((job.output_folder / "run/record.json").read_text())["state"] == (
                "failed"
            )
        after = {path: path.stat().st_mtime_ns for path in job.output_folder.glob("data/*")}
        assert before.items() <= after.items()  # what is committed is never touched again
    decoded = run(job, decode=FakeDecode(num_slots=num_slots)).num_run_rows
    assert result(job).equals(result(whole))
    assert names(job) == names(whole)
    assert decoded <= num_rows


def test_a_continued_run_decodes_only_rows_without_a_part(tmp_path):
    job = job_of(tmp_path, table(30))
    with pytest.raises(Killed):
        run(job, decode=FakeDecode(before_yield=killing(17)))
    kept = result(job).num_rows
    assert kept > 0
    decode = FakeDecode()
    summary = run(job, decode=decode)
    assert len(decode.admitted) == summary.num_run_rows == 30 - kept
    assert summary.counts.num_rows == 30
    assert summary.lines()[0] == f"this run  {30 - kept} rows; the others are of earlier runs"


@pytest.mark.parametrize("moment", ["write_table", "replace"])
def test_a_kill_inside_a_commit_leaves_only_whole_parts(tmp_path, monkeypatch, moment):
    job = job_of(tmp_path, table(20))
    commits = 0

    def kill_third(call):
        def wrapped(*args, **kwargs):
            nonlocal commits
            commits += 1
            if commits == 3:
                if moment == "write_table":
                    args[1].write_bytes(b"PAR1 torn")
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "write_table":
            patch.setattr(pq, "write_table", kill_third(pq.write_table))
        else:
            write = Path.replace

            def replace_part(self, target):
                if self.name.startswith("part-"):
                    return kill_third(write)(self, target)
                return write(self, target)

            patch.setattr(Path, "replace", replace_part)
        with pytest.raises(Killed):
            run(job)
    assert len(names(job)) == 2
    assert list((job.output_folder / "run").glob("part-*.tmp"))
    (job.output_folder / "run/part-00099-r0000000099.parquet.tmp").write_text("of an older plan")
    run(job)
    assert not list((job.output_folder / "run").glob("*.tmp"))
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(20)]


SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeDecode, FakeEngine, FakeStats, open_fake
from dspark_batch.job.definition import Job
from dspark_batch.job.progress import Progress, RunState
from dspark_batch.job.runner import run

def slow(num_done):
    print(num_done, flush=True)
    time.sleep(0.005)

run(Job(input=sys.argv[2], part_rows=2), open_engine=open_fake(FakeEngine()),
    decode=FakeDecode(before_yield=slow), stats=FakeStats(), progress=Progress(), argv=[])
"""


def start(job: Job, *, until: int) -> subprocess.Popen[str]:
    """A run in a process of its own that has decoded `until` rows."""
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tests), job.input],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= until:
            break
    return process


def test_a_process_killed_outright_is_continued_and_its_lock_is_gone(tmp_path):
    job = job_of(tmp_path, table(40), part_rows=2)
    process = start(job, until=15)
    with pytest.raises(OutputLocked, match=f"in use by process {process.pid} on "):
        run(job)
    assert read_status(job.output_folder).state == "running"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = len(names(job))
    assert 0 < kept < 20
    assert read_status(job.output_folder).state == "died"
    assert run(job).num_run_parts == 20 - kept
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(40)]


def test_a_complete_output_is_left_alone(tmp_path):
    job = job_of(tmp_path, table(12))
    run(job)
    record = (job.output_folder / "run/record.json").read_text()
    decode = FakeDecode()
    summary = run(job, decode=decode)
    assert decode.admitted == []
    assert summary.failure is None
    assert summary.lines()[0] == "nothing to do: the output is complete"
    assert (job.output_folder / "run/record.json").read_text() == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "job.temperature was 0.0 and is 0.5"),
        ({"seed": 3}, "job.seed was 0 and is 3"),
        ({"stop": ("x",)}, 'job.stop was [] and is ["x"]'),
        ({"prompt_column": "id"}, "job.prompt was prompt in prompt and is prompt in id"),
        ({"limit": 3}, "input.rows was 0-4 and is 0-2"),
        ({"part_rows": 4}, "input.rows was 0-4 and is 0-3"),
        ({"part_rows": 100, "limit": 5}, "part-00001-r0000000005.parquet is the result of"),
    ],
)
def test_parts_of_another_job_are_refused_field_by_field(tmp_path, change, message):
    job = job_of(tmp_path, table(12))
    run(job)
    with pytest.raises(InputError) as info:
        run(job.model_copy(update=change))
    assert message in str(info.value)
    assert "--overwrite" in str(info.value)


def test_parts_of_another_engine_or_input_are_refused(tmp_path):
    job = job_of(tmp_path, table(12))
    run(job)
    other = FakeEngine(fingerprint={"target": "b" * 64, "precision": "int8"})
    with pytest.raises(InputError, match=r"engine\.precision was not there and is int8, engine\.t"):
        run(job, engine=other)
    pq.write_table(table(12).replace_schema_metadata({"new": "1"}), job.input, row_group_size=8)
    with pytest.raises(InputError, match=r"input\.sha256 was [0-9a-f]{16}… and is [0-9a-f]{16}…"):
        run(job)


def test_settings_that_leave_the_result_alone_may_change(tmp_path):
    job = job_of(tmp_path, table(30))
    with pytest.raises(Killed):
        run(job, decode=FakeDecode(before_yield=killing(12)))
    decode = FakeDecode()
    update = {"spec": "on", "scheduler": "threshold", "confidence_threshold": 0.7}
    changed = job.model_copy(update=update | {"max_rows": 2, "max_error_rate": 0.5})
    assert run(changed, decode=decode).num_parts == 8
    assert (decode.spec, decode.scheduler) == ("on", "threshold")
    assert decode.confidence_threshold == 0.7


def test_a_moved_input_folder_is_still_the_same_input(tmp_path):
    (tmp_path / "old").mkdir()
    job = job_of(tmp_path / "old", table(12))
    run(job)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = job.model_copy(update={"input": str(tmp_path / "new/in.parquet")})
    assert "nothing to do" in run(moved).lines()[0]


def test_overwrite_keeps_the_old_parts_until_all_new_ones_are_there(tmp_path):
    job = job_of(tmp_path, table(12))
    run(job)
    old = result(job)
    colder = job.model_copy(update={"max_new_tokens": 2})
    replaced = job.output_folder / "run/replaced"
    with pytest.raises(Killed):
        run(colder, decode=FakeDecode(before_yield=killing(9)), overwrite=True)
    assert len(list(replaced.iterdir())) == 3
    with pytest.raises(Killed):
        run(colder, decode=FakeDecode(before_yield=killing(0)), overwrite=True)
    assert names(colder) == []
    kept = pa.concat_tables([pq.read_table(path) for path in sorted(replaced.iterdir())])
    assert kept.equals(old)
    run(colder)
    assert not replaced.exists()
    assert result(colder)["completion"].to_pylist() == [
        t[:2] for t in old["completion"].to_pylist()
    ]


class Watch(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.states: list[RunState] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def update(self, state: RunState) -> None:
        self.states.append(replace(state))


def test_progress_counts_rows_of_earlier_runs_but_only_this_runs_tokens(tmp_path):
    job = job_of(tmp_path, pa.table({"prompt": [None, *prompts(20)]}))
    with pytest.raises(Killed):
        run(job, decode=FakeDecode(before_yield=killing(12)))
    kept = result(job).num_rows
    watch = Watch()
    summary = run(job, progress=watch)
    assert watch.phases == ["loading engine engines/model", f"decoding {21 - kept} rows"]
    assert [state.num_done for state in watch.states] == list(range(kept + 1, 22))
    last = watch.states[-1]
    assert (last.num_rows, last.num_done_before, last.num_errors) == (21, kept, 1)
    assert last.num_new_tokens == summary.num_run_new_tokens
    assert (last.num_rounds, last.num_accepted_tokens) == (4 * (21 - kept), 6 * (21 - kept))
    assert last.seconds > 0


def test_parts_are_listed_in_input_order_though_they_end_in_another(tmp_path):
    class Backwards(FakeDecode):
        def __call__(self, prompts, engine, **options):
            for prompt in reversed(list(prompts)):
                yield self.answer(prompt, engine)

    job = job_of(tmp_path, table(60))
    run(job, decode=Backwards())
    parts = [part.path.name for part in OutputFolder(job.output_folder).parts()]
    assert parts == sorted(parts)
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(60)]


def test_sigterm_lets_running_rows_end_and_says_how_to_continue(tmp_path):
    job = job_of(tmp_path, table(40))
    handler = signal.getsignal(signal.SIGTERM)
    decode = FakeDecode(before_yield=at(18, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    watch = Watch()
    summary = run(job, decode=decode, progress=watch)
    assert watch.phases[2:] == ["stopping for SIGTERM: the running rows are finished first"]
    assert isinstance(summary.failure, StoppedEarly)
    assert str(summary.failure) == (
        f"stopped early for SIGTERM: {summary.num_parts} of 10 parts are written\n\n"
        "hint: continue with: dspark-batch run in.parquet"
    )
    # 18 rows were done and the next was on its way; of the 4 slots none was filled again.
    assert len(decode.admitted) == 22
    assert 0 < summary.num_parts < 10
    assert signal.getsignal(signal.SIGTERM) is handler
    assert read_status(job.output_folder).state == "stopped"
    run(job)
    assert result(job).num_rows == 40


def test_a_deadline_stops_the_run(tmp_path):
    clock = iter(range(1000))
    job = job_of(tmp_path, table(40), deadline=60.0)
    decode = FakeDecode()
    summary = run(job, decode=decode, clock=lambda: float(next(clock)))
    assert isinstance(summary.failure, StoppedEarly)
    assert "stopped early for the deadline of 60 s" in str(summary.failure)
    assert 0 < len(decode.admitted) < 40


def test_a_deadline_that_everything_met_is_no_failure(tmp_path):
    assert run(job_of(tmp_path, table(9), deadline=3600.0)).failure is None


def test_a_stop_during_loading_admits_nothing(tmp_path):
    job = job_of(tmp_path, table(9))

    def open_slowly(folder: Path, *, max_rows: int | None = None) -> FakeEngine:
        os.kill(os.getpid(), signal.SIGTERM)
        return FakeEngine()

    decode = FakeDecode()
    summary = runner.run(
        job,
        open_engine=open_slowly,
        decode=decode,
        stats=FakeStats(),
        progress=Progress(),
        argv=ARGV,
    )
    assert isinstance(summary.failure, StoppedEarly)
    assert decode.admitted == []


def test_a_run_works_outside_the_main_thread(tmp_path):
    job = job_of(tmp_path, table(9))
    thread = threading.Thread(target=run, args=(job,))
    thread.start()
    thread.join()
    assert result(job).num_rows == 9


def test_ctrl_c_is_recorded_and_passed_on(tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    job = job_of(tmp_path, table(20))
    engine = FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        run(job, engine=engine, decode=FakeDecode(before_yield=at(13, interrupt)))
    assert read_status(job.output_folder).state == "interrupted"
    assert engine.closed
    assert names(job)


def test_bad_rows_become_error_rows_and_never_reach_decode(tmp_path):
    data = pa.table({"prompt": ["ok", None, "", "%broken%", "x" * 600, "fine", "\x00"]})
    job = job_of(tmp_path, data)
    decode = FakeDecode()
    summary = run(job, decode=decode)
    assert sorted(prompt.row for prompt in decode.admitted) == [0, 5]
    out = result(job).to_pylist()
    assert [row["status"] for row in out] == ["ok", *["error"] * 4, "ok", "error"]
    assert [row["error"] and row["error"]["code"] for row in out] == [
        None,
        "invalid_row",
        "invalid_row",
        "template_error",
        "prompt_too_long",
        None,
        "tokenize_error",
    ]
    assert all(row["completion"] is None for row in out if row["status"] == "error")
    assert all(row["finish_reason"] == "error" for row in out if row["status"] == "error")
    assert out[4]["usage"] == {"prompt_tokens": 617, "completion_tokens": 0}
    assert out[1]["spec"] is None
    assert summary.counts.num_errors == 5


def test_shards_of_nothing_but_errors_are_committed_too(tmp_path):
    data = pa.table({"prompt": pa.array([None] * 12 + ["ok"], pa.string())})
    job = job_of(tmp_path, data)
    assert run(job).num_parts == 3
    assert result(job)["status"].to_pylist() == ["error"] * 12 + ["ok"]


def test_a_row_that_fails_in_decode_keeps_its_counts_and_loses_its_text(tmp_path):
    error = RowError(ErrorCode.NUMERICAL, "decode", "the logits were not finite")
    decode = FakeDecode(failing=lambda prompt: error if prompt.row == 2 else None)
    job = job_of(tmp_path, table(5), token_ids=True)
    run(job, decode=decode)
    row = result(job).to_pylist()[2]
    assert row["error"] == {
        "code": "numerical",
        "stage": "decode",
        "message": "the logits were not finite",
    }
    assert row["completion"] is None
    assert row["output_token_ids"] is None
    assert row["spec"]["num_rounds"] == 4
    assert row["usage"]["completion_tokens"] > 0
    assert row["seed"] == row_seed(0, 2)


def test_too_many_errors_are_a_failure_after_everything_was_written(tmp_path):
    data = pa.table({"prompt": ["a", None, "b", None]})
    job = job_of(tmp_path, data, max_error_rate=0.4)
    for _ in range(2):  # also when there is nothing left to do
        summary = run(job)
        assert isinstance(summary.failure, RowErrorsExceeded)
        assert str(summary.failure).startswith(
            "2 ok, 2 errors (invalid_row 2): more than --max-error-rate 0.4 allows"
        )
        assert result(job).num_rows == 4
    assert run(job.model_copy(update={"max_error_rate": 0.5})).failure is None


def test_a_failed_write_stops_the_run(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    job = job_of(tmp_path, table(20))
    decode = FakeDecode()
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left"):
        run(job, decode=decode)
    assert len(decode.admitted) < 20
    status = read_status(job.output_folder)
    assert (status.state, status.num_parts) == ("failed", 0)


def test_status_knows_a_run_that_could_not_write_how_it_ended(tmp_path, monkeypatch):
    job = job_of(tmp_path, table(20))
    output = OutputFolder(job.output_folder)

    def full(*args, **options):
        monkeypatch.setattr(OutputFolder, "write_record", refused)
        raise OSError(28, "No space left on device")

    def refused(self, record):
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        run(job)
    assert output.read_record()["state"] == "running"
    assert read_status(job.output_folder).state == "died"
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    for other, state in [
        ({}, "running"),
        ({"host": "elsewhere"}, "running"),
        ({"pid": 2**22 + 1}, "died"),
    ]:
        (output.run / "holder.json").write_text(json.dumps(holder | other))
        assert read_status(job.output_folder).state == state
    (output.run / "holder.json").write_text(json.dumps(holder))
    os.utime(output.run / "holder.json", (0, 0))  # of a process that had this number before
    assert read_status(job.output_folder).state == "died"


def test_status_of_a_run_that_ends_while_it_is_asked(tmp_path, monkeypatch):
    job = job_of(tmp_path, table(3))
    run(job)
    output = OutputFolder(job.output_folder)
    finished = output.read_record()
    output.write_record(finished | {"state": "running"})

    def ends(self):
        output.write_record(finished)
        return False

    monkeypatch.setattr(OutputFolder, "is_held", ends)
    assert read_status(job.output_folder).state == "finished"


def test_an_output_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    job = job_of(tmp_path, table(3), output=tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="cannot write to "):
        run(job)


def test_a_foreign_file_in_data_is_refused(tmp_path):
    job = job_of(tmp_path, table(3))
    (job.output_folder / "data").mkdir(parents=True)
    pq.write_table(table(3), job.output_folder / "data/theirs.parquet")
    with pytest.raises(
        StorageError, match=r"theirs\.parquet is not a file that dspark-batch wrote"
    ):
        run(job)


def tree(folder):
    """Every path below a folder, with the bytes of the files."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "theirs.parquet", "part-00001-r0000000004-copy.parquet", "sub"]
)
@pytest.mark.parametrize("killed", [False, True])
def test_overwrite_deletes_no_file_of_others(tmp_path, name, killed):
    job = job_of(tmp_path, table(12))
    run(job)
    if killed:  # the parts in data/ are those of an overwriting run that was stopped
        with pytest.raises(Killed):
            run(job, decode=FakeDecode(before_yield=killing(9)), overwrite=True)
    theirs = job.output_folder / "data" / name
    if name == "sub":
        theirs.mkdir()
    elif "part" in name:  # a reader that wrote its result beside: pyarrow copies our footer
        part = next((job.output_folder / "data").glob("part-*"))
        pq.write_table(pq.read_table(part).slice(1), theirs)
    else:
        theirs.write_text("theirs")
    before = tree(job.output_folder / "data"), tree(job.output_folder / "run")
    with pytest.raises(StorageError, match=re.escape(f"{theirs} is not a file that dspark-batch")):
        run(job, overwrite=True)
    after = tree(job.output_folder / "data"), tree(job.output_folder / "run")
    assert after == before


@pytest.mark.parametrize(
    "name", ["results.tmp", "model.pt", "record.json", "holder.json", "lock", "replaced/notes.txt"]
)
def test_a_folder_of_others_is_not_written_to(tmp_path, name):
    output = tmp_path / "project"
    for file in (f"run/{name}", "data/notes.txt"):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).write_text("{}")
    before = tree(output)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")) as info:
        run(job_of(tmp_path, table(3), output=output))
    assert "-o FOLDER" in info.value.hint
    after = tree(output)
    if name != "lock":
        after.pop(Path("run/lock"), None)  # ours, and empty
    assert after == before


def test_what_others_put_beside_the_parts_stays(tmp_path):
    job = job_of(tmp_path, table(12))
    run(job)
    colder = job.model_copy(update={"max_new_tokens": 2})
    with pytest.raises(Killed):
        run(colder, decode=FakeDecode(before_yield=killing(9)), overwrite=True)
    theirs = job.output_folder / "run/replaced/notes.txt"
    theirs.write_text("theirs")
    before = tree(job.output_folder)
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=r"replaced/notes\.txt is not a file"):
            run(colder, overwrite=overwrite)
        assert tree(job.output_folder) == before
    theirs.rename(job.output_folder / "notes.txt")
    run(colder)
    assert not theirs.parent.exists()
    assert (job.output_folder / "notes.txt").read_text() == "theirs"


def test_an_input_inside_the_output_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    job = job_of(tmp_path / "data", table(3), output=tmp_path)
    with pytest.raises(InputError, match="lies in the output"):
        run(job)


class Lossy(FakeDecode):
    """Breaks the promise of one completion for each prompt."""

    how = "drop"

    def __call__(self, prompts, engine, **options):
        for index, completion in enumerate(super().__call__(prompts, engine, **options)):
            if index == 3 and self.how == "twice":
                yield completion
            if index == 3 and self.how == "foreign":
                completion = replace(completion, row=999)
            if index != 3 or self.how != "drop":
                yield completion


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("drop", r"decode ended without row \d+"),
        ("twice", r"decode completed row \d+, which was not running"),
        ("foreign", r"decode completed row 999, which was not running"),
    ],
)
def test_rows_in_equal_rows_out_or_the_run_fails(tmp_path, how, message):
    decode = Lossy()
    decode.how = how
    with pytest.raises(DSparkError, match=message) as info:
        run(job_of(tmp_path, table(20)), decode=decode)
    assert info.value.exit_code == 1


def test_the_lock_is_free_after_a_run_and_held_during_it(tmp_path):
    job = job_of(tmp_path, table(6))

    def second_run() -> None:
        with pytest.raises(OutputLocked, match=f"in use by process {os.getpid()} on "):
            run(job)

    run(job, decode=FakeDecode(before_yield=at(2, second_run)))
    assert not (job.output_folder / "run/holder.json").exists()
    assert "nothing to do" in run(job).lines()[0]


def test_the_record_tells_the_whole_story(tmp_path):
    job = job_of(tmp_path, table(12), seed=4)
    summary = run(job)
    record = json.loads((job.output_folder / "run/record.json").read_text())
    assert record["state"] == "finished"
    assert record["argv"] == ARGV
    assert record["job"]["seed"] == 4
    assert record["schedule"] == {
        "spec": "auto",
        "scheduler": "early-stop",
        "confidence_threshold": None,
    }
    assert record["engine"]["fingerprint"] == {"target": "a" * 64}
    assert record["input"][0]["num_rows"] == 12
    assert record["versions"]["pyarrow"] == pa.__version__
    assert record["summary"] == summary.to_json()
    assert record["started_at"] <= record["finished_at"]


def test_the_summary_adds_up(tmp_path):
    job = job_of(tmp_path, table(12))
    summary = run(job)
    values = summary.to_json()
    usage = result(job)["usage"].to_pylist()
    assert values["num_prompt_tokens"] == sum(row["prompt_tokens"] for row in usage)
    assert values["num_new_tokens"] == sum(row["completion_tokens"] for row in usage)
    assert values["run"]["num_new_tokens"] == values["num_new_tokens"]
    assert values["spec"]["num_rounds"] == 48
    assert values["spec"]["accepted_length"] == 2.5
    assert values["spec"]["acceptance_rate"] == 0.6
    assert values["spec"]["acceptance_by_position"] == [0.75, 0.5, 0.25]
    assert values["run"]["phase_seconds"]["verify"] == 6.0
    text = "\n".join(summary.lines())
    assert "12 ok, 0 errors" in text
    assert "drafted   48 of 48 row rounds\n" in text
    assert "verified  120 draft tokens, 60% accepted" in text
    assert "per round 2.50 tokens where drafted, 2.50 overall" in text
    assert "accepted up to position 1: 75%, 2: 50%, 3: 25%" in text
    assert str(job.output_folder / "data") in text


def test_status_reads_files_and_needs_no_lock(tmp_path):
    job = job_of(tmp_path, table(20))
    with pytest.raises(UsageError, match="is not the output of a run"):
        read_status(job.output_folder)
    with pytest.raises(Killed):
        run(job, decode=FakeDecode(before_yield=killing(12)))
    with OutputFolder(job.output_folder).lock():
        status = read_status(job.output_folder)
    assert status.num_planned_parts == 5
    assert 0 < status.num_parts < 5
    assert status.counts.num_rows == result(job).num_rows
    assert status.lines()[:2] == ["last run  failed", f"parts     {status.num_parts} of 5"]
    assert status.to_json()["num_input_rows"] == 20


def test_check_counts_what_run_would_refuse(tmp_path):
    rows = ["a" * n for n in (1, 2, 3, 4)] + [None, "%broken%", "x" * 600]
    report = check_job(job_of(tmp_path, pa.table({"prompt": rows})), FakeEngine())
    assert (report.num_rows, report.num_errors) == (7, 3)
    assert report.errors == {"invalid_row": 1, "prompt_too_long": 1, "template_error": 1}
    assert report.first_error == "row 4: prompt is null"
    frame = len("<user><assistant>")
    assert report.prompt_tokens == {
        "min": frame + 1,
        "p50": frame + 3,
        "p90": frame + 600,
        "p99": frame + 600,
        "max": frame + 600,
        "total": 5 * frame + 610,
    }
    assert not list(tmp_path.glob("*.completions"))


def test_check_of_no_rows_has_no_lengths(tmp_path):
    report = check_job(job_of(tmp_path, table(0)), FakeEngine())
    assert report.lines() == ["rows      0 ok, 0 errors", "tokens    none"]
