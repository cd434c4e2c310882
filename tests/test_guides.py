"""The guides in docs/: their steps, performed on a copy of the project, do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("add-*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"add-a-target-family": "transformers"}


def steps(guide: Path) -> Iterator[tuple[str, str | None, str]]:
    """Blocks of code in order: language, the file that a first comment names, the rest."""
    for language, text in BLOCK.findall(guide.read_text()):
        first, _, rest = text.partition("\n")
        named = re.fullmatch(r"# (\S+\.py)", first)
        yield language, named[1] if named else None, rest if named else text


def changed(text: str, diff: str) -> str:
    """`text` with the lines of a diff, whose context stands in it exactly once."""
    old = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in " +")
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_there_is_a_guide_for_every_axis_of_growth() -> None:
    assert [guide.stem for guide in GUIDES] == [
        "add-a-drafter",
        "add-a-runtime",
        "add-a-target-family",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_steps_of_a_guide_work(guide: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(guide.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dspark_batch", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    commands = []
    for language, file, text in steps(guide):
        if language == "sh":
            commands += [line for line in text.splitlines() if line]
            continue
        assert file is not None
        path = tmp_path / file
        if language == "diff":
            path.write_text(changed(path.read_text(), text))
        else:
            assert not path.exists()
            path.write_text(text)
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = done.stdout.splitlines()
        assert not any(" failed" in line for line in report)
        assert any("passed" in line or line.endswith("[100%]") for line in report), done.stdout


def test_a_change_that_does_not_fit_is_noticed() -> None:
    assert changed("a\nb\n", " a\n+c\n b\n") == "a\nc\nb\n"
    with pytest.raises(AssertionError):
        changed("a\na\n", " a\n+c\n")
