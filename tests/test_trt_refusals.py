"""Why plans cannot run on a machine: each reason a sentence with the command that mends it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_trt import VERSION, HostDevice, fake_gpus, fake_trt, write_plans
from test_triton_kernel import has_driver
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.engine.engine import open_engine
from dspark_batch.engine.hardware import Gpus
from dspark_batch.engine.manifest import EngineManifest, describe_file, read_manifest
from dspark_batch.engine.runtimes import device, trt
from dspark_batch.errors import EngineError

LIBRARIES = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    target = write_target(folder / "t", target_config("llama"))
    return export_pair(folder, target, write_draft(folder / "d", draft_config()), max_tokens=80)


@pytest.fixture
def planned(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine folder with plans, on a machine where they run."""
    folder = tmp_path / "engine"
    shutil.copytree(exported, folder)
    write_plans(folder)
    host = HostDevice()
    module = fake_trt(host, folder, native_graphs=True)
    monkeypatch.setattr(trt, "usable_gpus", lambda: fake_gpus(89))
    monkeypatch.setattr(trt, "CudaDevice", lambda: host)
    monkeypatch.setattr(trt.trt_body, "import_library", lambda _: module)
    assert trt.refusal(folder, read_manifest(folder)) is None
    return folder


def refused(folder: Path, manifest: Any = None) -> str:
    """The sentence; `open_pair` raises it as well."""
    manifest = manifest or read_manifest(folder)
    problem = trt.refusal(folder, manifest)
    assert problem is not None
    with pytest.raises(EngineError) as raised:
        trt.open_pair(folder, manifest, 4)
    assert str(raised.value) == str(problem)
    return str(problem)


def changed(folder: Path, **plans: Any) -> Any:
    manifest = read_manifest(folder)
    assert manifest.plans is not None
    return manifest.model_copy(update={"plans": manifest.plans.model_copy(update=plans)})


def test_another_gpu_is_refused(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "usable_gpus", lambda: fake_gpus(120))
    problem = refused(planned)
    assert "built for sm_89, but Fake is sm_120" in problem
    assert (
        "dspark-batch export tiny --runtime tensorrt-rtx --precision fp32 --force --gpu-arch 120"
        in problem
    )


@pytest.mark.parametrize("built_for", [89, 90])
def test_a_card_that_is_no_rtx_card_is_refused_first(
    planned: Path, built_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a driver, a library or a plan that something else would be wrong with."""

    def old_driver() -> Gpus:
        raise EngineError("the NVIDIA driver is for CUDA 12.4")

    monkeypatch.setattr(trt, "find_gpus", lambda: fake_gpus(90))
    monkeypatch.setattr(trt, "usable_gpus", old_driver)
    problem = refused(planned, changed(planned, gpu_archs=(built_for,)))
    assert f"{planned}: TensorRT-RTX runs on RTX cards only, and Fake is sm_90\n" in problem
    hint = "build another engine, dspark-batch export tiny: a data-centre card takes --runtime"
    assert f"{hint} tensorrt, or --runtime onnxruntime-cuda" in problem
    full = read_manifest(planned).model_copy(update={"runtime": "tensorrt"})
    assert "CUDA 12.4" in refused(planned, full)


def test_another_library_is_refused(planned: Path) -> None:
    problem = refused(planned, changed(planned, library_version="1.2.3"))
    assert f"built by tensorrt_rtx 1.2.3, but {VERSION} is installed" in problem
    assert 'pip install "tensorrt-rtx-cu13==1.2.3"' in problem


def test_another_plugin_is_refused(planned: Path) -> None:
    problem = refused(planned, changed(planned, plugin_version="0"))
    assert "version 0 of the verification plugin" in problem
    assert "dspark-batch export tiny" in problem


def test_an_engine_without_plans_is_refused(planned: Path) -> None:
    manifest = read_manifest(planned).model_copy(update={"plans": None})
    assert "describes no plan files" in refused(planned, manifest)


@pytest.mark.parametrize("name", ["target.plan", "draft.plan"])
def test_a_missing_or_truncated_plan_is_refused(planned: Path, name: str) -> None:
    manifest, path = read_manifest(planned), planned / name
    path.write_bytes(path.read_bytes()[:-5])
    assert f"{path} has " in refused(planned, manifest)
    path.unlink()
    assert "is missing\n\nhint: build the engine again: dspark" in refused(planned, manifest)


def test_a_changed_plan_is_refused(planned: Path) -> None:
    path = planned / "target.plan"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(EngineError, match=r"target.plan is not the file that the export wrote"):
        open_engine(planned)


def test_a_plan_that_tensorrt_does_not_take_is_named(planned: Path) -> None:
    path = planned / "target.plan"
    manifest = read_manifest(planned)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(EngineError, match=r"target.plan cannot be opened: tensorrt_rtx.*magic tag"):
        trt.open_pair(planned, manifest, 4)


def test_plans_of_another_version_are_refused(planned: Path) -> None:
    manifest, path = read_manifest(planned), planned / "draft.plan"
    shutil.copy(planned / "target.plan", path)
    with pytest.raises(EngineError, match=r"draft.plan was built by another version: .*anchors"):
        trt.open_pair(planned, resized(manifest, path), 4)


def resized(manifest: EngineManifest, path: Path) -> EngineManifest:
    """The manifest of an export that wrote `path` as it is now."""
    return manifest.model_copy(update={"files": manifest.files | {path.name: describe_file(path)}})


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("target.plan", '"S": [1, 80]', '"S": [1, 70]', "fewer than 80 tokens of a row at once"),
        ("draft.plan", '"M": [400, 400]', '"M": [90, 90]', "90 places for context are too few"),
    ],
)
def test_profiles_that_are_too_small_are_refused(
    planned: Path, file: str, old: str, new: str, problem: str
) -> None:
    manifest, path = read_manifest(planned), planned / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(EngineError, match=problem):
        trt.open_pair(planned, resized(manifest, path), 4)


@pytest.mark.skipif(has_driver(), reason="there is a GPU")
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_machine_without_a_driver_is_named(exported: Path, tmp_path: Path, library: str) -> None:
    """Really: this one."""
    pytest.importorskip("cuda.bindings.runtime")
    folder = tmp_path / "engine"
    shutil.copytree(exported, folder)
    write_plans(folder, library=library)
    with pytest.raises(EngineError, match=r"(?s)no NVIDIA driver.*nvidia-smi.*dspark-batch export"):
        open_engine(folder)
    with pytest.raises(EngineError, match=r"no NVIDIA driver"):
        trt.hardware_key(read_manifest(folder))


def test_a_missing_library_is_named(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(trt, "usable_gpus", lambda: fake_gpus(89))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    manifest = changed(planned, library="tensorrt")
    assert 'pip install "dspark-batch[tensorrt]"' in refused(planned, manifest)


def test_the_key_of_measured_costs_names_the_gpu(planned: Path) -> None:
    assert trt.hardware_key(read_manifest(planned)) == "Fake, sm_89, CUDA 13.0"


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (Gpus(problem="no NVIDIA driver (libnvidia-ml)"), "no NVIDIA driver"),
        (replace(fake_gpus(89), gpus=(), problem="the driver shows none"), "the driver shows none"),
        (replace(fake_gpus(89), cuda="12.4"), "driver is for CUDA 12.4, and TensorRT needs"),
    ],
)
def test_a_machine_without_a_usable_gpu_is_named(
    found: Gpus, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "find_gpus", lambda: found)
    with pytest.raises(EngineError, match=problem) as raised:
        device.usable_gpus()
    assert "nvidia-smi" in str(raised.value.hint)


def test_missing_bindings_are_named(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    problem = refused(planned)
    assert "cuda-bindings is not installed\n\nhint: pip install" in problem
