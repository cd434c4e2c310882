"""Everything to be asked of a GPU that is there for ten minutes, without network.

Each step is a process of its own with a time limit: one that hangs or crashes costs itself alone.
Records are appended to `gpu.jsonl` as they come, and `gpu.md` is written anew after each step.
Exit code 0: all that was asked is there. 1: a test or a step failed, or a text differs by more
than rounding. 3: the time was over, or SIGTERM came; the page says what is missing.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from wheels import enter

    enter(sys.argv)  # before anything is imported that a wheel brings

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click
import wheels
from gpu_report import cells, page
from gpu_steps import Record, Settings, costs, facts, make_reference, speed, text
from report import BenchmarkCommand, origin

from dspark_batch.bench import MODES
from dspark_batch.engine import read_manifest
from dspark_batch.errors import UsageError

_HERE = Path(__file__)
_SHARES = {"facts": 0.1, "tests": 0.25, "text": 0.2, "costs": 0.2}
"""Of all the time, at the most; speed shares what is left."""
_LINE = re.compile(r"^(\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_POLL = 0.05  # seconds


class Results:
    """The two files of the output folder."""

    def __init__(self, folder: Path) -> None:
        self.lines, self.page, self.log = (folder / f"gpu.{end}" for end in ("jsonl", "md", "log"))

    def keep(self, record: Record) -> None:
        """Append a record, so that it is there whatever comes next."""
        with self.lines.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def read(self) -> list[Record]:
        """All records; a line that a killed step left unfinished is left out."""
        found = []
        for line in self.lines.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def show(self) -> None:
        """Write the page."""
        self.page.write_text(page(self.read()))


_PATH = click.Path(path_type=Path, exists=True)


@click.command(name="gpu", cls=BenchmarkCommand)
@click.option("--engine", type=_PATH, default=Path("engines/model"), show_default=True)
@click.option(
    "--prompts",
    type=_PATH,
    default=Path("jobs/prompts.parquet"),
    show_default=True,
    help="Parquet file as for `run`.",
)
@click.option("--set", "source", help="Only prompts with this value in the column `source`.")
@click.option("--reference", type=_PATH, help="Engine folder in fp32, or a written reference.")
@click.option(
    "--write-reference",
    "written",
    type=click.Path(path_type=Path),
    help="Decode --engine, in fp32, on the CPU into this file, and end.",
)
@click.option("--texts", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--text-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option(
    "--max-gap",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Logits that fp16 may be off by; what differs by more is a fault.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--minutes", type=click.FloatRange(min=0), default=8.0, show_default=True)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 4, 16, 64, 256),
    show_default=True,
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--bandwidth", type=click.FloatRange(min=0, min_open=True), help="GB/s of the card.")
@click.option("--wheels", "_wheels", type=_PATH, help="Install this folder's wheels first.")
@click.option("--tests", type=click.Path(path_type=Path), default=_HERE.parents[1] / "tests")
@click.option("--step", hidden=True)
@click.option("--seconds", type=float, default=0.0, hidden=True)
@click.pass_context
def main(
    ctx: click.Context,
    written: Path | None,
    output: Path | None,
    minutes: float,
    _wheels: Path | None,
    tests: Path,
    step: str | None,
    seconds: float,
    **options: Any,
) -> None:
    """Check and measure an engine on this machine's GPU, within --minutes.

    \b
    Example:
      python benchmarks/gpu.py --engine engines/model --output results --minutes 8
    """
    options["rows"] = tuple(sorted(set(options["rows"])))
    settings = Settings(**options)
    if written is not None:
        found = make_reference(settings, progress=_say)
        written.write_text(json.dumps(found))
        return
    if output is None:
        raise UsageError("where do the results go? add --output FOLDER")
    results = Results(output)
    if step is not None:
        _perform(step, settings, results, seconds)
        return
    if results.lines.exists():
        raise UsageError(f"{output} has results already; choose another --output")
    if read_manifest(settings.engine, verify=False).draft is None:
        raise UsageError(f"{settings.engine} has no draft: there is nothing to compare")
    output.mkdir(parents=True, exist_ok=True)
    results.keep({"kind": "begin", **origin(ctx)})
    try:
        code = Supervisor(results, settings, tests, minutes, ctx.meta["benchmarks.argv"]).run()
    finally:
        wheels.remove()
    click.echo(results.page.read_text())
    ctx.exit(code)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _perform(name: str, settings: Settings, results: Results, seconds: float) -> None:
    """One step, in its own process."""
    if name == "facts":
        results.keep(facts(settings))
        return
    steps: Mapping[str, Callable[[], Any]] = {
        "text": lambda: text(settings, progress=_say),
        "costs": lambda: costs(settings, progress=_say),
    }
    if name in steps:
        found = steps[name]()
    else:
        rows = int(name.removeprefix("speed "))
        found = speed(settings, rows, records=results.read(), seconds=seconds, progress=_say)
    for record in found:
        results.keep(record)


class Supervisor:
    """Starts the steps one after the other, and ends those that take too long."""

    def __init__(
        self,
        results: Results,
        settings: Settings,
        tests: Path,
        minutes: float,
        argv: Sequence[str],
    ) -> None:
        self._results, self._settings, self._tests = results, settings, tests
        self._argv = list(argv)
        self._begin = wheels.begun()
        self._total = 60 * minutes
        self._stopped = False

    def run(self) -> int:
        """All steps; returns the exit code."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            names = ["facts", "tests", *(["text"] if self._settings.reference else []), "costs"]
            names += [f"speed {rows}" for rows in self._settings.rows]
            for i, name in enumerate(names):
                if not self._is_refused(name):
                    share = self._left() / (len(names) - i)
                    share = self._total * _SHARES[name] if name in _SHARES else share
                    self._one(name, min(share, self._left()))
                self._results.show()
            for cell in cells(self._results.read()):
                self._results.keep(cell)
            code = self._exit_code()
            spent = time.time() - self._begin
            self._results.keep({"kind": "end", "exit_code": code, "seconds": spent})
            self._results.show()
            return code
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True

    def _left(self) -> float:
        return self._begin + self._total - time.time()

    def _is_refused(self, name: str) -> bool:
        refused = [r["rows"] for r in self._results.read() if r["kind"] == "refused"]
        return name in [f"speed {rows}" for rows in refused]

    def _one(self, name: str, seconds: float) -> None:
        if self._stopped or seconds <= 0:
            self._cut(name, "SIGTERM came" if self._stopped else "no time was left")
            return
        _say(f"{name}, {seconds:.0f} s at the most")
        if name == "tests":
            self._run_tests(seconds)
            return
        command = [sys.executable, str(_HERE), *self._argv, "--step", name]
        code = self._wait([*command, "--seconds", str(seconds)], self._results.log, seconds)
        if code is None:
            self._cut(name, self._why(seconds))
        elif code:
            last = self._results.log.read_text(errors="replace").strip().splitlines()[-1:]
            problem = f"ended with code {code}: {''.join(last)}"
            self._results.keep({"kind": "failed", "step": name, "problem": problem})

    def _why(self, seconds: float) -> str:
        return "SIGTERM came" if self._stopped else f"it was not done after {seconds:.0f} s"

    def _cut(self, name: str, problem: str) -> None:
        self._results.keep({"kind": "cut", "step": name, "problem": problem})

    def _run_tests(self, seconds: float) -> None:
        # Files without such a test need not be importable on this machine.
        files = [p for p in sorted(self._tests.glob("test_*.py")) if "mark.gpu" in p.read_text()]
        skipped = None
        if importlib.util.find_spec("pytest") is None:
            skipped = "pytest is not installed"
        elif not files:
            skipped = f"there is no GPU test in {self._tests}"
        if skipped:
            self._results.keep({"kind": "tests", "skipped": skipped})
            return
        log = self._results.log.with_name("gpu-tests.log")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-v",
            "-o",
            "addopts=",
            "--color=no",
        ]
        code = self._wait([*command, *map(str, files)], log, seconds)
        lines = _LINE.findall(log.read_text(errors="replace"))
        counts: dict[str, int] = {}
        for _, outcome in lines:
            counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
        failing = [test for test, outcome in lines if outcome in ("FAILED", "ERROR")]
        self._results.keep({"kind": "tests", "counts": counts, "failing": failing, "code": code})
        if code is None:
            self._cut("tests", self._why(seconds))

    def _wait(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        """The exit code; None if the process was ended because of time or SIGTERM."""
        end = time.time() + seconds
        with log.open("ab") as stream:
            # A session of its own, so that what it starts ends with it.
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            while process.poll() is None:
                if self._stopped or time.time() >= end:
                    return None
                time.sleep(_POLL)
            return process.returncode
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _exit_code(self) -> int:
        records = self._results.read()
        kinds = {record["kind"] for record in records}
        num_faults = sum(r["num_faults"] for r in records if r["kind"] == "text")
        # 0 and 5 of pytest: all passed or skipped, and none was chosen.
        failing = [r for r in records if r["kind"] == "tests" and r.get("code") not in (None, 0, 5)]
        failing += [r for r in records if r["kind"] == "tests" and r.get("failing")]
        refused = {r["rows"] for r in records if r["kind"] == "refused"}
        rows = set(self._settings.rows) - refused
        if num_faults or failing or "failed" in kinds or not rows:
            return wheels.FAILED
        found = {(r["rows"], r["spec"]) for r in records if r["kind"] == "cell"}
        missing = [(n, mode) for n in sorted(rows) for mode in MODES if (n, mode) not in found]
        return wheels.CUT if "cut" in kinds or missing else 0


if __name__ == "__main__":
    main()
