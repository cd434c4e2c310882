"""ONNX Runtime on a device: the same text from arrays that are addresses, and every refusal.

`DeviceMemory` runs here on the device `cpu`, through the calls that it makes on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_engine import export_tiny, make_prompts, run, start, step, stop, texts

from dspark_batch.engine import engine as engine_module
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.hardware import Gpu, Gpus
from dspark_batch.engine.manifest import EngineManifest, read_manifest
from dspark_batch.engine.runtimes import cache, ort, ort_devices
from dspark_batch.engine.runtimes.memory import DeviceArray, DeviceMemory, HostMemory, Memory
from dspark_batch.engine.runtimes.session import Placement
from dspark_batch.errors import EngineError
from dspark_batch.models.graph.builder import copy_graph

GPU = Gpu("NVIDIA L4", "GPU-0a", 89, 1, 1)
ONE_GPU = Gpus(gpus=(GPU,))
CUDA = Placement(device="cuda")


def device_memory() -> DeviceMemory:
    return DeviceMemory(
        "cpu", ort_devices.open_on(copy_graph(), "cpu", onnxruntime.SessionOptions())
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = export_tiny(tmp_path_factory.mktemp("devices"), "llama", max_tokens=160)
    exported.engine.close()
    return exported.engine.folder


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_FIRST_LIMIT", 32)
    monkeypatch.setattr(cache, "_RATIO", 2)


@pytest.fixture
def on_device(
    folder: Path, small_buckets: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    monkeypatch.setattr(ort, "memory_of", lambda device: device_memory())
    with closing(open_engine(folder)) as engine:
        assert isinstance(runtime(engine)._memory, DeviceMemory)
        yield engine


@pytest.fixture
def on_host(folder: Path, small_buckets: None) -> Iterator[Engine]:
    with closing(open_engine(folder)) as engine:
        assert isinstance(runtime(engine)._memory, HostMemory)
        yield engine


def runtime(engine: Engine) -> Any:
    return engine._runtime


@pytest.mark.parametrize("spec", ["off", "on"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_does_not_depend_on_where_arrays_live(
    on_host: Engine, on_device: Engine, spec: str, temperature: float
) -> None:
    prompts = make_prompts((100, 1, 31, 17, 33, 64, 5, 120), temperature=temperature)
    assert texts(run(on_device, prompts, spec)) == texts(run(on_host, prompts, spec))


def test_what_is_large_stays_on_the_device(on_device: Engine) -> None:
    rows = start(on_device, (20, 3, 9), temperature=1.0)
    step(on_device, rows)
    held = runtime(on_device)
    for row in held._rows.values():
        assert all(isinstance(part, DeviceArray) for part in row.pending)
        assert sum(len(part) for part in row.pending) == row.num_cached
    for bucket in held._buckets:
        buffers = [buffer for cached in bucket.caches() for buffer in cached.buffers]
        assert all(isinstance(buffer, DeviceArray) for buffer in buffers)
    on_device.draft_raw(rows)
    assert all(isinstance(row.draft_logits, DeviceArray) for row in held._rows.values())
    stop(on_device, rows)


def test_device_caches_have_their_limit_at_once_and_are_written_in_place(
    on_device: Engine,
) -> None:
    rows = start(on_device, (10, 4))
    held = runtime(on_device)._buckets[0].target
    assert held.capacity == 32
    before = [(buffer.address, device_memory().fetch(buffer).copy()) for buffer in held.buffers]
    step(on_device, rows)
    for (address, old), buffer in zip(before, held.buffers, strict=True):
        assert buffer.address == address
        new = device_memory().fetch(buffer)
        for row, length in ((0, 10), (1, 4)):
            np.testing.assert_array_equal(old[row, :, :length], new[row, :, :length])
            assert (old[row, :, length] != new[row, :, length]).any()
    stop(on_device, rows)


def test_a_broken_row_is_wiped_on_the_device(on_device: Engine) -> None:
    rows = start(on_device, (12, 7))
    held = runtime(on_device)._buckets[0].target
    memory = device_memory()
    nans = memory.zeros(held.buffers[-1][0].shape, np.float32)
    nans.owner.numpy()[...] = np.nan
    memory.copy(held.buffers[-1][0], nans)
    assert np.isnan(memory.fetch(held.buffers[-1][0])).all()
    on_device.release(rows[0])
    assert np.isfinite(memory.fetch(held.buffers[-1])).all()
    stop(on_device, rows[1:])


@pytest.fixture(params=[HostMemory, device_memory])
def memory(request: pytest.FixtureRequest) -> Memory:
    made: Memory = request.param()
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("capacities", [(6, 6), (4, 6), (6, 4)])
def test_cells_are_copied_as_far_as_both_reach(
    memory: Memory, dtype: type, capacities: tuple[int, int]
) -> None:
    from_capacity, to_capacity = capacities
    source = memory.zeros((3, 2, from_capacity, 5), dtype)
    values = memory.fetch(source) if isinstance(source, np.ndarray) else source.owner.numpy()
    values[...] = np.arange(values.size).reshape(values.shape) + 1
    target = memory.zeros((3, 2, to_capacity, 5), dtype)
    memory.copy(target[1:], source[:2])
    kept = min(capacities)
    expected = np.zeros(target.shape, dtype)
    expected[1:, :, :kept] = values[:2, :, :kept]
    np.testing.assert_array_equal(memory.fetch(target), expected)
    memory.clear(target[2])
    expected[2] = 0
    np.testing.assert_array_equal(memory.fetch(target), expected)
    joined = memory.concatenate([source[2:], source[:1], source[1:1]])
    np.testing.assert_array_equal(memory.fetch(joined), values[[2, 0]])


def manifest_of(folder: Path, precision: str = "fp32") -> EngineManifest:
    return read_manifest(folder).model_copy(update={"precision": precision})


def with_gpu(monkeypatch: pytest.MonkeyPatch, *, found: Gpus = ONE_GPU) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(ort_devices, "find_gpus", lambda: found)


def test_auto_is_the_gpu_where_there_is_one_and_it_has_all_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ort_devices.chosen_device("fp32") == "cpu"
    with_gpu(monkeypatch)
    assert ort_devices.chosen_device("fp32") == "cuda"
    assert ort_devices.chosen_device("int8") == "cpu"
    assert ort_devices.chosen_device("fp32", "cpu") == "cpu"
    assert ort.refusal(folder, manifest_of(folder)) is None
    assert ort.refusal(folder, manifest_of(folder, "int8")) is None
    with_gpu(monkeypatch, found=Gpus(problem="no NVIDIA driver"))
    assert ort_devices.chosen_device("fp32") == "cpu"


def test_costs_of_a_gpu_and_of_a_number_of_threads_are_kept_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(folder)
    on_cpu = ort.hardware_key(manifest)
    assert "1 threads" in ort.hardware_key(manifest, Placement(threads=1))
    with_gpu(monkeypatch)
    assert ort.hardware_key(manifest) == f"NVIDIA L4, sm_89, onnxruntime {onnxruntime.__version__}"
    assert ort.hardware_key(manifest, Placement(device="cpu")) == on_cpu


@pytest.mark.parametrize(
    ("precision", "found", "words"),
    [
        ("int8", ONE_GPU, "no int8 kernels for cuda"),
        ("fp32", Gpus(problem="no NVIDIA driver"), "no GPU to run on: no NVIDIA driver"),
    ],
)
def test_a_device_that_was_asked_for_is_never_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str, found: Gpus, words: str
) -> None:
    with_gpu(monkeypatch, found=found)
    problem = ort.refusal(folder, manifest_of(folder, precision), CUDA)
    assert problem is not None
    assert words in str(problem)


def test_onnxruntime_for_the_cpu_refuses_cuda(folder: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime-gpu"):
        open_engine(folder, placement=CUDA)


def test_libraries_that_do_not_load_are_an_error_and_no_fallback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself would go on with the CPU."""
    with_gpu(monkeypatch)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    on_cpu = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: on_cpu)
    with pytest.raises(EngineError, match="could not load the libraries of CUDA"):
        open_engine(folder, placement=CUDA)


def test_threads_reach_the_sessions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = onnxruntime.InferenceSession

    def session(path: object, options: onnxruntime.SessionOptions, **rest: Any) -> object:
        seen.append(options.intra_op_num_threads)
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine_module.open_engine(folder, placement=Placement(threads=1)).close()
    assert seen == [1, 1, 1]  # target, draft, and the draft of a narrower block


@pytest.mark.gpu
def test_text_on_a_gpu_is_that_of_the_cpu(folder: Path) -> None:
    if ort_devices.chosen_device("fp32") != "cuda":
        pytest.skip("needs onnxruntime-gpu and a GPU")
    prompts = make_prompts((100, 1, 31, 17, 33, 64, 5, 120))
    with (
        closing(open_engine(folder, placement=CUDA)) as gpu,
        closing(open_engine(folder, placement=Placement(device="cpu"))) as cpu,
    ):
        for spec in ("off", "on"):
            assert texts(run(gpu, prompts, spec)) == texts(run(cpu, prompts, spec))
