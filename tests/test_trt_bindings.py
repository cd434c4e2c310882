"""The real bindings take what the TensorRT runtime passes: no typo can hide behind a fake."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fake_trt
import numpy as np
import pytest
import rtx
from interpreted import prepare
from test_triton_kernel import has_driver
from test_trt_plugin import model, profile

from dspark_batch.engine.runtimes import kernels, plan_file
from dspark_batch.engine.runtimes.device import CudaDevice
from dspark_batch.engine.runtimes.plan_file import ITEM_SIZES
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin.launch import compile_kernels

# Fakes, and what they stand for; names that only a fake has.
CLASSES = {
    fake_trt.Runtime: "Runtime",
    fake_trt.Engine: "ICudaEngine",
    fake_trt.Context: "IExecutionContext",
    fake_trt.ILogger: "ILogger",
    fake_trt.RuntimeConfig: "IRuntimeConfig",
    fake_trt.RuntimeCache: "IRuntimeCache",
}
PROPERTIES = {
    "ICudaEngine": {
        "num_io_tensors",
        "num_optimization_profiles",
        "device_memory_size_v2",
        "streamable_weights_size",
        "weight_streaming_scratch_memory_size",
        "weight_streaming_budget_v2",
    },
    "IRuntimeConfig": {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"},
}
ENUMS = {
    fake_trt.DataType: "DataType",
    fake_trt.TensorIOMode: "TensorIOMode",
    fake_trt.Strategy: "ExecutionContextAllocationStrategy",
    fake_trt.CudaGraphStrategy: "CudaGraphStrategy",
    fake_trt.Specialization: "DynamicShapesKernelSpecializationStrategy",
}


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """A process that imports TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx_libs")
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare) as executor:
        yield executor


def test_the_fakes_have_the_names_and_parameters_of_tensorrt_rtx(process: Executor) -> None:
    names = {*CLASSES.values(), *PROPERTIES, *ENUMS.values()}
    real = process.submit(rtx.described, names).result()
    num_methods = 0
    for fake, name in CLASSES.items():
        for method, function in vars(fake).items():
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            num_methods += 1
            overloads = re.findall(rf"{method}\(self: [\w.]+,? ?(.*)\) -> ", real[name][method])
            taken = [re.findall(r"(\w+): ", overload) for overload in overloads]
            mine = list(inspect.signature(function).parameters)[1:]
            # `how` stands for one of two: a strategy or a runtime config.
            assert mine in [*taken, ["how"]], (name, method, taken)
    assert num_methods > 12
    for name, properties in PROPERTIES.items():
        assert properties <= set(real[name])
    for fake_enum, name in ENUMS.items():
        assert {member.name for member in fake_enum} <= set(real[name])
    assert set(ITEM_SIZES) <= set(real["DataType"])


def test_every_call_of_the_runtime_is_one_of_the_fakes() -> None:
    """So the names that were compared are all that it uses."""
    text = "".join(Path(module.__file__).read_text() for module in (plan_file, kernels))
    source = re.sub(r"(?m)^from .*", "", text)
    used = set(re.findall(r"(?:engine|context|_runtime|config|_native)\.([a-z]\w+)", source))
    used -= {"context", "bind"}
    known = {name for fake in CLASSES for name in vars(fake)}.union(*PROPERTIES.values())
    assert used <= known, used - known
    assert len(used) > 12


def test_a_real_plan_is_read_as_far_as_it_goes_without_a_driver(
    process: Executor, tmp_path: Path
) -> None:
    """TensorRT-RTX returns None then; what it logged is in the error."""
    if has_driver():
        pytest.skip("there is a GPU")
    built = process.submit(rtx.build, model(), compile_kernels([89]), profile()).result()
    path = tmp_path / "target.plan"
    path.write_bytes(built.plan)
    problem = process.submit(rtx.open_plan, path).result()
    assert f"{path} cannot be opened: tensorrt_rtx 1.7" in problem
    assert "CUDA driver version is insufficient" in problem
    path.write_bytes(built.plan[:1000])
    assert "cannot be opened" in process.submit(rtx.open_plan, path).result()


class Cudart:
    """The real functions take the arguments, and find no driver; then each answers as if it did."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.calls: list[str] = []
        self.refused: set[str] = set()
        self._memory = np.zeros(4096, np.uint8)
        self._answers = {
            "cudaStreamCreateWithFlags": real.cudaStream_t(7),
            "cudaMalloc": 0x1000,
            "cudaMallocHost": self._memory.ctypes.data,
            "cudaStreamEndCapture": real.cudaGraph_t(8),
            "cudaGraphInstantiate": real.cudaGraphExec_t(9),
            "cudaGetErrorString": b"out of memory",
        }

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if not callable(real) or isinstance(real, type):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            status, *_ = real(*arguments)
            assert int(status) in (0, 35)
            self.calls.append(name)
            if name == "cudaMemGetInfo":
                return 0, 2_000_000_000, 4_000_000_000
            if name in self.refused:
                return 2, None
            return (0, self._answers[name]) if name in self._answers else (0,)

        return call


@pytest.fixture
def cudart() -> Cudart:
    if has_driver():
        pytest.skip("there is a GPU")
    return Cudart(pytest.importorskip("cuda.bindings.runtime"))


def test_the_real_cuda_bindings_take_what_is_passed(cudart: Cudart) -> None:
    device = CudaDevice(cudart)
    assert device.stream == 7
    address = device.allocate(100)
    host = device.pinned(64)
    host[:] = 5
    assert (cudart._memory[:64] == 5).all()
    device.upload(address, host)
    device.download(host[:8], address)
    device.copy(address, address + 8, 8)
    device.zero(address, 100)
    device.synchronize()
    ran = []
    graph = device.capture(lambda: ran.append(1))
    assert ran
    device.replay(graph)
    assert device.free_bytes() == 2_000_000_000
    device.close()
    calls = cudart.calls
    assert calls.index("cudaStreamBeginCapture") < calls.index("cudaStreamEndCapture")
    for name in ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaGraphDestroy"):
        assert calls.count(name) == 1
    assert calls[-1] == "cudaStreamDestroy"
    with pytest.raises(TypeError):
        cudart.cudaMemcpyAsync(address, object(), 1, cudart.cudaMemcpyKind(1), None)


def test_a_full_gpu_is_named(cudart: Cudart) -> None:
    device = CudaDevice(cudart)
    cudart.refused.add("cudaMalloc")
    with pytest.raises(EngineError, match=r"(?s)no room for 3.0 GB .* 2.0 GB are free.*--max-rows"):
        device.allocate(3_000_000_000)


@pytest.mark.parametrize("where", ["step", "capture"])
def test_a_capture_that_fails_is_none(cudart: Cudart, where: str) -> None:
    device = CudaDevice(cudart)

    def enqueue() -> None:
        if where == "step":
            raise EngineError("refused")

    if where == "capture":
        cudart.refused.add("cudaStreamEndCapture")
    assert device.capture(enqueue) is None
    assert "cudaGraphInstantiate" not in cudart.calls
    assert cudart.calls[-1] == ("cudaGetLastError" if where == "capture" else "cudaGraphDestroy")
    device.close()
