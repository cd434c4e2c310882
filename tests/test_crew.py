"""Several workers on one job: the same rows, whatever becomes of a worker.

Workers are real processes around a fake engine, so everything that they are given is importable.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fake_engine import FakeDecode, FakeEngine, FakeStats
from test_runner import Watch, job_of, names, result, table
from test_runner import run as run_alone
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.cli import main
from dspark_batch.decode.types import Completion, Prompt
from dspark_batch.engine.hardware import Gpu, Gpus, num_cores
from dspark_batch.errors import DSparkError, EngineError, StoppedEarly, StorageError
from dspark_batch.job import crew as crew_module
from dspark_batch.job import runner
from dspark_batch.job.crew import Crew, open_crew
from dspark_batch.job.definition import Job
from dspark_batch.job.opening import open_measured
from dspark_batch.job.progress import Progress
from dspark_batch.job.status import read_status
from dspark_batch.job.summary import Summary

MANIFEST: Any = SimpleNamespace(
    name="fake", draft=None, fingerprint=lambda: FakeEngine().fingerprint
)


def open_fake(
    folder: Path, *, max_rows: int | None, threads: int, progress: Callable[[str], None]
) -> FakeEngine:
    progress(f"opened with {threads} threads")
    return FakeEngine()


def open_nothing(folder: Path, **options: object) -> FakeEngine:
    raise EngineError("no engine here")


def nothing(num_done: int) -> None:
    pass


@dataclass(frozen=True)
class Decoding:
    """`FakeDecode` in a worker, with something that happens before its completions."""

    before_yield: Callable[[int], None] = nothing

    def __call__(
        self, prompts: Iterable[Prompt], engine: FakeEngine, **options: Any
    ) -> Iterator[Completion]:
        return FakeDecode(before_yield=self.before_yield)(prompts, engine, **options)


@dataclass(frozen=True)
class DieOnce:
    """The first worker that gets to completion `count` kills itself outright, after `seconds`."""

    marker: Path
    count: int
    seconds: float = 0.0

    def __call__(self, num_done: int) -> None:
        if num_done < self.count:
            return
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(0.01)
            return
        time.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)


def die(num_done: int) -> None:
    if num_done == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def disk_full(num_done: int) -> None:
    raise StorageError("no space left")


def bug(num_done: int) -> None:
    raise ZeroDivisionError("oh")


@dataclass(frozen=True)
class Leave:
    """Writes what the worker is to `folder`, waits for the other one to do so, and works on."""

    folder: Path
    seconds: float = 0.0

    def __call__(self, num_done: int) -> None:
        told = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(told))
        wait_for(lambda: len(list(self.folder.iterdir())) == 2)
        time.sleep(self.seconds)


def crew_of(
    before_yield: Callable[[int], None] = nothing,
    *,
    gpus: tuple[str | None, ...] = (None, None),
    open_engine: Callable[..., FakeEngine] = open_fake,
) -> Crew:
    decode: Any = Decoding(before_yield)
    opener: Any = open_engine
    return Crew(MANIFEST, opener, decode, threads=1, gpus=gpus)


def run(job: Job, crew: Crew, *, progress: Progress | None = None) -> Summary:
    """A run whose own engine must not be opened."""
    unused: Any = None
    return runner.run(
        job,
        open_engine=unused,
        decode=unused,
        stats=unused,
        progress=progress or Progress(),
        argv=["run", "in.parquet"],
        crew=crew,
    )


def rows_of(folder: Path) -> list[dict[str, object]]:
    paths = sorted((folder / "data").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_workers_write_what_one_process_writes(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(60), part_rows=3)
    alone = job.model_copy(update={"output": tmp_path / "alone"})
    expected = run_alone(alone)
    watch = Watch()
    (tmp_path / "told").mkdir()
    summary = run(job, crew_of(Leave(tmp_path / "told")), progress=watch)
    assert result(job).equals(result(alone))
    assert names(job) == names(alone)
    assert (summary.counts, summary.failure) == (expected.counts, None)
    assert summary.num_run_new_tokens == expected.num_run_new_tokens
    assert summary.phase_seconds == expected.phase_seconds
    assert len(list((tmp_path / "told").iterdir())) == 2
    assert watch.phases.count("opened with 1 threads") == 2
    record = json.loads((job.output_folder / "run" / "record.json").read_text())
    assert record["summary"]["run"]["num_workers"] == 2
    assert any(line.endswith(", 2 workers") for line in summary.lines())
    assert run(job, crew_of(open_engine=open_nothing)).num_run_parts == 0  # nobody is started


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(60), part_rows=3)
    watch = Watch()
    summary = run(job, crew_of(DieOnce(tmp_path / "dead", 8)), progress=watch)
    assert summary.failure is None
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(60)]
    assert [text for text in watch.phases if "was killed by signal 9; the others" in text]
    assert watch.states[-1].num_done == 60
    alone = job.model_copy(update={"output": tmp_path / "alone"})
    run_alone(alone)
    assert result(job).equals(result(alone))


@pytest.mark.slow
def test_an_idle_worker_takes_over_what_a_late_death_leaves(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(8), row_group_size=4, part_rows=4)
    summary = run(job, crew_of(DieOnce(tmp_path / "dead", 2, seconds=1.5)))
    assert summary.failure is None
    assert summary.num_run_rows == 8


@pytest.mark.slow
def test_without_workers_the_run_stops_early_and_can_be_continued(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(60), part_rows=3)
    summary = run(job, crew_of(die))
    assert isinstance(summary.failure, StoppedEarly)
    assert "its last worker, which was killed by signal 9 (out of memory?)" in str(summary.failure)
    assert "continue with: dspark-batch run in.parquet" in str(summary.failure)
    assert 0 < summary.num_parts < 20
    assert read_status(job.output_folder).state == "stopped"
    assert run(job, crew_of()).failure is None
    assert result(job).num_rows == 60


@pytest.mark.parametrize(
    ("crew", "kind", "message"),
    [
        (crew_of(disk_full), StorageError, "no space left"),
        (crew_of(bug), DSparkError, r"worker \d failed: ZeroDivisionError\('oh'\)"),
        (crew_of(open_engine=open_nothing), EngineError, "no engine here"),
    ],
)
def test_what_a_worker_raises_ends_the_run(
    tmp_path: Path, crew: Crew, kind: type[DSparkError], message: str
) -> None:
    job = job_of(tmp_path, table(60), part_rows=3)
    with pytest.raises(kind, match=message) as info:
        run(job, crew)
    assert info.value.exit_code == kind.exit_code
    assert read_status(job.output_folder).state == "failed"


class Term(Watch):
    """Sends SIGTERM to this process, and to its workers, when some rows are done."""

    def update(self, state: Any) -> None:
        super().update(state)
        if state.num_done == 20:
            os.kill(os.getpid(), signal.SIGTERM)
            for child in crew_module.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)


@pytest.mark.slow
def test_sigterm_lets_the_rows_of_all_workers_end(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(200), part_rows=2)
    watch = Term()
    (tmp_path / "told").mkdir()
    summary = run(job, crew_of(Leave(tmp_path / "told", 0.02)), progress=watch)
    assert isinstance(summary.failure, StoppedEarly)
    assert "stopped early for SIGTERM" in str(summary.failure)
    assert watch.phases.count("stopping for SIGTERM: the running rows are finished first") == 1
    assert 20 <= watch.states[-1].num_done < 200
    assert run(job, crew_of()).failure is None
    assert result(job)["id"].to_pylist() == [f"id-{i}" for i in range(200)]


def test_a_deadline_reaches_the_workers(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(60), part_rows=3, deadline=0.01)
    summary = run(job, crew_of())
    assert "stopped early for the deadline" in str(summary.failure)
    assert summary.num_parts == 0


def test_there_are_no_more_workers_than_shards(tmp_path: Path) -> None:
    summary = run(job_of(tmp_path, table(4)), crew_of(gpus=(None,) * 3))
    assert (summary.num_workers, summary.num_run_rows) == (1, 4)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
if __name__ == "__main__":
    from test_crew import Leave, crew_of, run
    from dspark_batch.job.definition import Job
    run(Job(input=sys.argv[2], part_rows=2), crew_of(Leave(Path(sys.argv[3]), 0.05)))
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(400), part_rows=2)
    told = tmp_path / "told"
    told.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, str(script), str(tests), job.input, str(told)],
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )
    wait_for(lambda: len(list(told.iterdir())) == 2)
    process.kill()
    process.wait()
    workers = [int(path.stem) for path in told.iterdir()]
    wait_for(lambda: not any(is_alive(pid) for pid in workers))
    assert run(job, crew_of()).failure is None  # the lock is free
    assert result(job).num_rows == 400


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_each_worker_sees_its_own_gpu(tmp_path: Path) -> None:
    job = job_of(tmp_path, table(60), part_rows=3)
    told = tmp_path / "told"
    told.mkdir()
    run(job, crew_of(Leave(told), gpus=("GPU-0a", "GPU-1a")))
    seen = {json.loads(path.read_text())["gpu"] for path in told.iterdir()}
    assert seen == {"GPU-0a", "GPU-1a"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("crew")
    target = write_target(built / "target", target_config("llama", eos_token_id=None))
    return export_pair(built, target, write_draft(built / "draft", draft_config()))


def crew_for(folder: Path, **settings: Any) -> Crew | None:
    decode: Any = Decoding()
    job = Job(input="in.parquet", engine=folder, **settings)
    return open_crew(job, open_engine=open_measured, decode=decode)


def test_gpus_get_a_worker_each_and_cores_are_divided(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert crew_for(folder) is None
    assert crew_for(folder, workers=1) is None
    monkeypatch.setattr(crew_module, "num_cores", lambda: 6)
    for workers, threads in ((2, 3), (7, 1)):
        crew = crew_for(folder, workers=workers)
        assert crew is not None
        assert (crew.threads, crew.gpus) == (threads, (None,) * workers)
    gpus = Gpus(gpus=tuple(Gpu("L4", f"GPU-{i}a", 89, 1, 1) for i in range(2)))
    monkeypatch.setattr(crew_module, "find_gpus", lambda: gpus)
    monkeypatch.setattr(
        "dspark_batch.engine.runtimes.ort.uses_gpu", lambda manifest, placement: True
    )
    crew = crew_for(folder)
    assert crew is not None
    assert (crew.threads, crew.gpus) == (0, ("GPU-0a", "GPU-1a"))
    assert crew_for(folder, workers=1) is None
    crew = crew_for(folder, workers=3)
    assert crew is not None
    assert crew.gpus == ("GPU-0a", "GPU-1a", "GPU-0a")


@pytest.mark.slow
def test_text_does_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    data = table(23).append_column(
        "prompt_token_ids", [[[1 + (i * 7 + j) % 30 for j in range(1 + i)] for i in range(23)]]
    )
    job = job_of(tmp_path, data, row_group_size=9)
    command = f"run {job.input} --engine {folder} --token-ids-column prompt_token_ids --part-rows 4"
    for workers in (1, 2):
        options = f"--workers {workers} --max-new-tokens 12 --token-ids -o {tmp_path}/{workers}"
        outcome = CliRunner().invoke(main, [*command.split(), *options.split()])
        assert outcome.exit_code == 0, outcome.output
    one, two = (rows_of(tmp_path / name) for name in "12")
    for row in (*one, *two):
        del row["spec"]  # `auto` drafts by what it has seen
    assert one == two
    assert all(row["usage"]["completion_tokens"] == 12 for row in two)  # type: ignore[index]
    costs = json.loads((folder / "costs.json").read_text())
    assert any(f"{max(num_cores() // 2, 1)} threads" in key for key in costs)


def test_stats_of_fakes_have_the_phases_of_real_ones() -> None:
    from dspark_batch.job.worker import PHASES

    assert all(hasattr(FakeStats(), f"{phase}_seconds") for phase in PHASES)
