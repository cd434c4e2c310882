"""`benchmarks/training.py` in miniature: a tiny target on a CPU, whole and cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

import training  # noqa: E402
from test_train_command import MASK, talking_target  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("training")
    talking_target(folder / "target")
    for name, texts in (("train", range(5, 30)), ("eval", range(30, 36))):
        columns = {
            "prompt": [f"w{i} w{i // 2}" for i in texts],
            "source": ["even" if i % 2 == 0 else "odd" for i in texts],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def run(folder: Path, *words: object, output: str) -> tuple[int, dict[str, Any]]:
    found = CliRunner().invoke(
        training.main,
        [
            *("--target", str(folder / "target"), "--prompts", str(folder / "train.parquet")),
            *("--evaluate", str(folder / "eval.parquet"), "--output", str(folder / output)),
            *("--self-written", "0", "--max-new-tokens", "24", "--max-tokens", "96"),
            *("--mask-token", str(MASK), "--memory-gb", "0.1", "--batch-size", "8"),
            *("--device", "cpu", "--temperature", "0.2", *map(str, words)),
        ],
    )
    assert found.exit_code in (0, training.CUT), found.output
    assert found.stdout, found.output
    return found.exit_code, json.loads(found.stdout.splitlines()[-1])


def test_a_training_says_what_it_reached_by_source(folder: Path) -> None:
    status, record = run(folder, "--steps", 40, output="whole")
    assert status == 0
    assert record["state"] == "finished"
    assert record["command"].startswith("python benchmarks/training.py --target")
    assert record["num_steps"] == 40
    assert record["num_responses"] > 50  # a greedy one and two others to each of 25 prompts
    assert record["num_held_out"] == 6
    assert set(record["tau_by_source"]) == {"even", "odd"}
    assert record["tau_greedy"] >= record["tau_at_start"]
    assert (Path(record["draft"]) / "model.safetensors").exists()


def test_a_training_that_is_cut_keeps_what_it_has(folder: Path) -> None:
    status, record = run(folder, "--steps", 10**6, "--minutes", 0.15, output="cut")
    assert status == training.CUT
    assert record["state"] == "cut"
    assert "the deadline of 9 s" in record["problem"]
    assert record["num_steps"] > 0
    assert record["tau_greedy"] >= 1.0
    assert (Path(record["draft"]) / "model.safetensors").exists()
    status, record = run(folder, "--steps", 10**6, "--minutes", 1e-5, output="at-once")
    assert status == training.CUT
    assert record["num_steps"] == 0
    assert record["draft"] is None


def test_the_time_for_training_is_a_share_of_all(folder: Path) -> None:
    options = {
        **{"target": training.MODEL, "prompts": (), "evaluate": "e.parquet", "start": "target"},
        **{"steps": None, "mask_token": None, "self_written": 5, "vocab_size": 100},
        **{"batch_size": 2, "max_new_tokens": 8, "max_tokens": 64, "memory_gb": 1.0},
        **{"device": "cpu", "temperature": 0.7},
    }
    recipe = folder / "shared.toml"
    recipe.write_text(training.recipe_text(options, seconds=600))
    loaded = training_recipe(recipe)
    assert loaded.training.seconds == pytest.approx(360)
    assert loaded.target.weights == training.MODEL
    assert loaded.prompts.self_written == 5


def training_recipe(path: Path) -> Any:
    from dspark_batch.training.recipe import load_training_recipe

    return load_training_recipe(path)
