"""What every command prints, whole: help, results, errors. What varies is masked.

UPDATE_SNAPSHOTS=1 python -m pytest tests/test_snapshots.py   # after a change of words
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from test_cli import Fakes, fakes  # noqa: F401 (a fixture)
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.cli import main
from dspark_batch.engine import hardware

SNAPSHOTS = Path(__file__).with_name("snapshots")
COMMANDS = ("export", "train", "run", "check", "status", "doctor", "bench")
MASKS = (
    (r"\b\d+\.\d+ s\b", "N s"),
    (r"\b[\d,]+\.\d+ new tokens/s", "N new tokens/s"),
    (r"\(\d+%\)", "(N%)"),
    (r'((?:_per_second|_seconds)"): [\d.e+-]+', r"\1: N"),
    (r"process \d+ on \S+", "process N on HOST"),
    (r"\b[\d,]+\.\d [MG]B\b", "N GB"),
)


def matches(name: str, command: str) -> None:
    """Run a command in the current folder and compare all that it says with its snapshot."""
    result = CliRunner().invoke(main, shlex.split(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = f"$ dspark-batch {command}\n"
    for stream, said in (("stdout", result.stdout), ("stderr", result.stderr)):
        text += f"--- {stream}\n{said}" if said else ""
    text += f"--- exit code {result.exit_code}\n"
    text = text.replace(str(Path.cwd()), "WORKSPACE")
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    matches(f"help-{command or 'main'}", f"{command} --help".strip())


@pytest.fixture
def workspace(fakes: Fakes) -> Fakes:  # noqa: F811
    """A folder with prompts, and an engine that answers with the prompt backwards."""
    table = pa.table({"id": [1, 2, 3], "prompt": ["one", None, "three"]})
    pq.write_table(table, "prompts.parquet")
    pq.write_table(pa.table({"text": ["one"], "temperature": ["hot"]}), "other.parquet")
    pq.write_table(pa.table({"prompt": ["one"], "status": ["new"]}), "clash.parquet")
    Path("night.toml").write_text('input = "prompts.parquet"\ntempature = 0.7\n')
    Path("words.txt").write_text("no Parquet")
    return fakes


WORKING = {
    "export": "export tiny",
    "run": "run prompts.parquet --max-error-rate 0.5",
    "run-json": "run prompts.parquet --max-error-rate 0.5 --json --progress none",
    "check": "check prompts.parquet",
}
FAILING = {
    "no-input": "run missing.parquet",
    "not-parquet": "run words.txt",
    "no-prompt-column": "run other.parquet",
    "wrong-column-type": "run other.parquet --prompt-column text",
    "clash-of-columns": "run clash.parquet",
    "unknown-column": "run prompts.parquet --prompt-column promt",
    "unknown-key": "run night.toml",
    "bad-value": "run prompts.parquet --top-p 2",
    "bad-choice": "run prompts.parquet --spec maybe",
    "unknown-flag": "run prompts.parquet --tempature 1",
    "no-engine": "run prompts.parquet --engine missing",
    "too-many-errors": "run prompts.parquet",
    "deadline": "run prompts.parquet --deadline 1e-9 --part-rows 1",
    "not-an-output": "status nowhere",
    "bench-without-prompts": "bench",
    "bench-flag-of-another-mode": "bench prompts.parquet --gpu h100",
}


@pytest.mark.parametrize("name", WORKING)
def test_a_command_that_works(name: str, workspace: Fakes) -> None:
    matches(name, WORKING[name])


@pytest.mark.parametrize("name", FAILING)
def test_a_command_that_fails(name: str, workspace: Fakes) -> None:
    matches(f"error-{name}", FAILING[name])


def test_the_life_of_an_output(workspace: Fakes) -> None:
    run = "run prompts.parquet --max-error-rate 0.5"
    matches("run-first", run)
    matches("status", "status prompts.completions")
    matches("run-again", run)
    matches("error-another-job", f"{run} --temperature 0.7")


def test_export_says_what_is_wrong_with_a_recipe(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("export").mkdir()
    Path("export/other.toml").write_text('[target]\nweights = "lost.gguf"\n')
    Path("export/wrong.toml").write_text('[target]\nweight = "a"\n[draft]\nlongest_mach = 3\n')
    matches("error-no-recipe", "export othr")
    matches("error-no-weights", "export other")
    matches("error-wrong-keys", "export wrong")


def test_train_says_that_there_is_no_recipe(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    matches("error-no-training-recipe", "train missing")


@pytest.mark.slow
def test_a_tiny_engine_from_export_to_doctor(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    export_pair(tmp_path, target, draft)
    monkeypatch.chdir(tmp_path)
    for path in ("dspark_batch.cli.diagnosis", "dspark_batch.engine.hardware"):
        monkeypatch.setattr(f"{path}.find_cpu", lambda: hardware.Cpu("A CPU", 2, ("AVX2",)))
        gpus = hardware.Gpus(problem="no NVIDIA driver")
        monkeypatch.setattr(f"{path}.find_gpus", lambda gpus=gpus: gpus)
    monkeypatch.setattr("dspark_batch.cli.diagnosis._int8", lambda: None)
    monkeypatch.setattr("dspark_batch.cli.diagnosis._versions", lambda: {"dspark-batch": "0"})
    monkeypatch.setattr("dspark_batch.cli.diagnosis._providers", lambda: ["CPUExecutionProvider"])
    matches("export-again", "export tiny")
    matches("doctor", "doctor")
    tokens = pa.table({"prompt_token_ids": [[1, 2, 3], [4, 5, 6, 7]]})
    pq.write_table(tokens, "tokens.parquet")
    options = "--engine engines/tiny --token-ids --max-new-tokens 4 --spec off"
    matches("run-tiny", f"run tokens.parquet {options}")
    (Path("engines/tiny") / "target.onnx").write_bytes(b"")
    matches("error-changed-engine", f"run tokens.parquet {options} -o elsewhere")
