"""Every command that the documentation shows is run, in a workspace with a tiny engine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny import VOCAB, target_config, write_draft, write_target
from tiny import draft_config as tiny_draft_config
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "jobs" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "dspark_batch" / "cli").glob("*.py")),
]


MASK = VOCAB - 2
TRAINING = f"""
[target]
weights = "{{target}}"
max_tokens = 400
[prompts]
files = ["jobs/prompts.parquet"]
[[responses]]
max_new_tokens = 16
[draft]
mask_token_id = {MASK}
[training]
steps = 2
"""


def shown_commands() -> list[str]:
    """Indented lines that start with the command, in order, each once; comments cut off.

    A line that ends in a backslash goes on in the next one.
    """
    found: dict[str, None] = {}
    for page in PAGES:
        text = re.sub(r"\\\n *", "", page.read_text())
        for line in re.findall(r"^ {4,}(dspark-batch .+)$", text, re.MULTILINE):
            found[line.split("  #")[0].strip()] = None
    return list(found)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("*.completions"))
    target = write_target(folder / "target", target_config("llama"))
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(target / "tokenizer.json"))
    draft = write_draft(folder / "draft", tiny_draft_config())
    (folder / "export" / "drafts").mkdir(parents=True)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"][MASK] = 0.0  # never said, so it can be a mask token
    save_file(tensors, target / "model.safetensors")
    for recipe in (ROOT / "export" / "drafts").glob("*.toml"):
        (folder / "export" / "drafts" / recipe.name).write_text(TRAINING.format(target=target))
    for recipe in (ROOT / "export").glob("*.toml"):
        (folder / "export" / recipe.name).write_text(
            f'[target]\nweights = "{target}"\n[draft]\nweights = "{draft}"\n'
            "[engine]\nmax_rows = 4\nmax_tokens = 400\n"
        )
    return folder


@pytest.mark.slow
def test_every_shown_command_runs(workspace: Path) -> None:
    commands = shown_commands()
    assert "dspark-batch export model" in commands
    assert "dspark-batch run jobs/prompts.parquet" in commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if importlib.util.find_spec("torch") is None:
        commands = [command for command in commands if "tutorial" not in command]
    if importlib.util.find_spec("tensorrt_rtx") is None:
        commands = [command for command in commands if "tensorrt-rtx" not in command]
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=workspace,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list((workspace / "jobs" / "prompts.completions" / "data").glob("*.parquet"))


def test_the_makefile_runs_what_the_readme_shows() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("dspark-batch export model", "dspark-batch run jobs/prompts.parquet"):
        assert f"$(BIN)/{command}\n" in makefile
