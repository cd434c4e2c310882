"""TensorRT and a GPU in host memory: the real `TrtRuntime` decodes on a CPU.

`HostDevice` is a `runtimes.device.Device` whose stream runs when somebody waits for it, so what is
read or overwritten too early shows. `FakeTrt` has those classes and methods of TensorRT that the
runtime uses; `test_trt_runtime` compares their names with the real module's. A plan names an ONNX
file, and a step runs it with ONNX Runtime on the addresses that were bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from dspark_batch.engine.hardware import Gpu, Gpus
from dspark_batch.engine.manifest import (
    FILE_NAME,
    EngineManifest,
    PlansInfo,
    ProfileInfo,
    describe_file,
    read_manifest,
)
from dspark_batch.engine.runtimes.ort import open_session
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin.contract import PLUGIN_VERSION

VERSION = "9.8.7"
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


def fake_gpus(arch: int) -> Gpus:
    """A machine with one GPU."""
    return Gpus((Gpu("Fake", "GPU-0", arch, 0, 0),), "580", "13.0")


class HostDevice:
    """Host memory as device memory. Every access must lie inside one allocation."""

    def __init__(self) -> None:
        self.stream = 4711
        self.uploads: list[tuple[int, int]] = []  # address, bytes
        self.downloads: list[tuple[int, int]] = []
        self.num_waits = 0
        self.num_replays = 0
        self.refuses_capture = False
        self.room = 10**9
        self.closed = False
        self._memory: list[NDArray[np.uint8]] = []
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None

    def allocate(self, num_bytes: int) -> int:
        assert num_bytes > 0
        assert self._recording is None, "an allocation ends a capture"
        if num_bytes > self.room:
            raise EngineError("no room")
        self.room -= num_bytes
        raw = np.zeros(num_bytes + 256, np.uint8)
        memory = raw[-raw.ctypes.data % 256 :][:num_bytes]
        self._memory.append(memory)
        return int(memory.ctypes.data)

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        return np.full(num_bytes, 0xEE, np.uint8)

    def view(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        for memory in self._memory:
            begin = address - memory.ctypes.data
            if begin >= 0 and begin + num_bytes <= len(memory):
                return memory[begin : begin + num_bytes]
        raise AssertionError(f"{num_bytes} bytes at {address} are nobody's")

    def enqueue(self, work: Callable[[], None]) -> None:
        assert not self.closed
        (self._queue if self._recording is None else self._recording).append(work)

    @property
    def is_capturing(self) -> bool:
        return self._recording is not None

    def upload(self, target: int, source: NDArray[np.uint8]) -> None:
        self.uploads.append((target, source.nbytes))
        self.enqueue(lambda: np.copyto(self.view(target, source.nbytes), source))

    def download(self, target: NDArray[np.uint8], source: int) -> None:
        self.downloads.append((source, target.nbytes))
        self.enqueue(lambda: np.copyto(target, self.view(source, target.nbytes)))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        def work() -> None:
            np.copyto(self.view(target, num_bytes), self.view(source, num_bytes))

        self.enqueue(work)

    def zero(self, target: int, num_bytes: int) -> None:
        self.enqueue(lambda: self.view(target, num_bytes).fill(0))

    def synchronize(self) -> None:
        self.num_waits += 1
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        self._recording = []
        try:
            enqueue()
            return None if self.refuses_capture else self._recording
        except EngineError:
            return None
        finally:
            self._recording = None

    def replay(self, graph: Any) -> None:
        self.num_replays += 1
        for work in graph:
            self.enqueue(work)

    def free_bytes(self) -> int:
        return self.room

    def close(self) -> None:
        self.closed = True


class DataType(Enum):
    FLOAT, HALF, BF16, INT64, INT32 = range(5)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class Strategy(Enum):
    STATIC, USER_MANAGED = range(2)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class Specialization(Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    """Opens plans; `device` and `folder` are what a real one has from the process."""

    device: HostDevice
    native_graphs: bool
    folder: Path
    engines: list[Engine]

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "magic tag")
            return None
        engine = Engine(plan, self.folder / plan["onnx"], self.device)
        engine.native_graphs = self.native_graphs
        self.engines.append(engine)
        return engine


class Engine:
    """A plan: `{"onnx": file, "sizes": fixed sizes, "profiles": [{letter: [least, most]}]}`."""

    def __init__(self, plan: dict[str, Any], path: Path, device: HostDevice) -> None:
        self.device = device
        self.native_graphs = False
        self.session = open_session(path, threads=0)  # with the options of the other runtime
        graph = onnx.load(path, load_external_data=False).graph
        tensors = [*graph.input, *(v for v in graph.output if v.name != "logits")]  # as plans are
        self.values = {v.name: v.type.tensor_type for v in tensors}
        self._given = {v.name for v in graph.input}
        self.sizes, self._profiles = plan["sizes"], plan["profiles"]
        self.num_io_tensors = len(self.values)
        self.num_optimization_profiles = len(self._profiles)
        self.device_memory_size_v2 = 1000
        self.streamable_weights_size = plan.get("streamable", 0)
        self.weight_streaming_scratch_memory_size = 10**6
        self.weight_streaming_budget_v2: int | None = None
        self.contexts: list[Context] = []
        self.num_compiled = 0

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._given else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return {1: DataType.FLOAT, 10: DataType.HALF, 7: DataType.INT64}[
            self.values[name].elem_type
        ]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [self._size(dim, {}, -1) for dim in self.values[name].shape.dim]

    def _size(self, dim: Any, chosen: dict[str, int], unknown: int) -> int:
        if not dim.dim_param:
            return int(dim.dim_value)
        return int({**chosen, **self.sizes}.get(dim.dim_param, unknown))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        profile, dims = self._profiles[profile_index], self.values[name].shape.dim
        least, most = (
            [self._size(d, {letter: s[i] for letter, s in profile.items()}, -2) for d in dims]
            for i in (0, 1)
        )
        assert -2 not in most, (name, most)
        return [least, most, most]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any = Strategy.STATIC) -> Context:
        context = Context(self, how)
        self.contexts.append(context)
        return context


class RuntimeConfig:
    """How TensorRT-RTX makes a context; these are its defaults."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Kernels by what they were compiled for; it takes back only what it wrote, and once."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview | None:
        return memoryview(json.dumps(sorted(self.kernels)).encode())

    def deserialize(self, blob: Any) -> bool:
        found = json.loads(bytes(blob))
        assert not self.kernels
        if "refused" in found:
            return False
        self.kernels = set(found)
        return True


class Context:
    """Runs the graph on the addresses that were bound."""

    def __init__(self, engine: Engine, how: Any) -> None:
        self.engine, self.how = engine, how
        self.version = 0  # of what captured graphs refer to
        self._profile: int | None = None
        self._memory = how is not Strategy.USER_MANAGED
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._has_run = False

    def set_device_memory(self, memory: int, size: int) -> None:
        self.engine.device.view(memory, size)
        assert size >= self.engine.device_memory_size_v2
        self._memory = True

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == self.engine.device.stream
        self._profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        least, _, most = self.engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least):
            return False
        self._shapes[name], self._has_run = shape, False
        self.version += 1
        return all(a <= n <= z for a, n, z in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 16 == 0
        self._addresses[name] = memory
        return name in self.engine.values

    def execute_async_v3(self, stream_handle: int) -> bool:
        device, engine = self.engine.device, self.engine
        assert stream_handle == device.stream
        assert self._memory
        assert set(self._addresses) == set(engine.values), "every tensor has an address"
        if device.is_capturing:
            assert self._has_run, "a first launch cannot be captured"
            assert not engine.native_graphs
        self._has_run = True
        self._compile()
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        captured = self.version if device.is_capturing else None

        def work() -> None:
            assert captured in (None, self.version), "the context took another shape since"
            self._run(shapes, addresses)

        device.enqueue(work)
        return True

    def _compile(self) -> None:
        """TensorRT-RTX compiles a kernel for shapes that it has none for."""
        cache = getattr(self.how, "cache", None)
        kernel = f"{self._profile} {sorted(self._shapes.items())}"
        if cache is not None and kernel not in cache.kernels:
            cache.kernels.add(kernel)
            self.engine.num_compiled += 1

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(TYPES[self.engine.get_tensor_dtype(name).name])
        raw = self.engine.device.view(address, dtype.itemsize * math.prod(shape))
        return raw.view(dtype).reshape(shape)

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self.engine.session.io_binding()
        fetched = []
        for name in self.engine.values:
            if name.startswith("present_"):
                assert addresses[name] == addresses[name.replace("present", "past")]
            elif name not in shapes:
                binding.bind_output(name, "cpu")
                fetched.append(name)
        for name, shape in shapes.items():
            array = self._array(name, addresses[name], shape)
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_"):
                binding.bind_ortvalue_output(name.replace("past", "present"), value)
        self.engine.session.run_with_iobinding(binding)
        values = dict(zip(fetched, binding.get_outputs(), strict=False))
        for name, value in values.items():
            found = value.numpy()
            self._array(name, addresses[name], found.shape)[...] = found


class Registry:
    def register_creator(self, creator: Any, namespace: str) -> bool:
        return True

    def deregister_creator(self, creator: Any) -> bool:
        return True


def fake_trt(device: HostDevice, folder: Path, *, native_graphs: bool) -> Any:
    """A module: TensorRT-RTX if it has graphs of its own, else full TensorRT."""
    engines: list[Engine] = []
    runtime = type(
        "Runtime",
        (Runtime,),
        {"device": device, "folder": folder, "engines": engines, "native_graphs": native_graphs},
    )
    bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")
    module = SimpleNamespace(
        __name__="tensorrt_rtx" if native_graphs else "tensorrt",
        __version__=VERSION,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        ILogger=ILogger,
        Runtime=runtime,
        engines=engines,
        get_plugin_registry=Registry,
        IPluginCreatorV3One=type("IPluginCreatorV3One", (), {}),
        PluginFieldCollection=list,
        **{name: type(name, (), {}) for name in bases},
    )
    if native_graphs:
        module.CudaGraphStrategy = CudaGraphStrategy
        module.DynamicShapesKernelSpecializationStrategy = Specialization
    return _Hashable(module)


class _Hashable:
    """A module hashes by identity; a SimpleNamespace does not."""

    def __init__(self, found: SimpleNamespace) -> None:
        self.__dict__.update(found.__dict__)


def write_plans(
    folder: Path,
    *,
    rows: int = 4,
    prefill_rows: int = 3,
    prefill_tokens: int = 300,
    ring: int = 400,
    capacity: int | None = None,
    library: str = "tensorrt_rtx",
    streamable: int = 0,
) -> EngineManifest:
    """Make an engine of ONNX Runtime one of TensorRT: plans for `FakeTrt` beside its graphs."""
    manifest = read_manifest(folder)
    gamma = manifest.draft.block_size if manifest.draft else 1
    most = manifest.limits.max_tokens
    capacity = capacity or -(-(most + gamma + 1) // 8) * 8
    chunk = min(256, most)
    decode, block = rows * (gamma + 1), gamma + 1
    fixed = {"C": capacity, "G": gamma, "G1": block}
    target = [
        {"R": [1, rows], "S": [1, block], "T": [1, decode], "N": [1, decode]}
        | {"K": [0, gamma], "K1": [1, block]},
        {"R": [1, prefill_rows], "S": [1, chunk], "T": [1, prefill_tokens]}
        | {"N": [1, prefill_rows], "K": [0, 0], "K1": [1, 1]},
    ]
    draft = [
        {"R": [1, rows], "P": [1, block], "N": [1, decode], "M": [ring, ring]},
        {"R": [1, prefill_rows], "P": [1, 40], "N": [1, 100], "M": [ring, ring]},
    ]
    plans = {"target": target} | ({"draft": draft} if (folder / "draft.onnx").exists() else {})
    files = dict(manifest.files)
    for name, profiles in plans.items():
        text = {"onnx": f"{name}.onnx", "sizes": fixed, "profiles": profiles}
        text["streamable"] = streamable
        path = folder / f"{name}.plan"
        path.write_text(json.dumps(text))
        files[path.name] = describe_file(path)
    info = PlansInfo(
        library=library,
        library_version=VERSION,
        gpu_archs=(89,),
        capacity=capacity,
        profiles={
            "decode": ProfileInfo(
                rows=(1, rows, rows), row_tokens=(1, block, block), tokens=(1, decode, decode)
            ),
            "prefill": ProfileInfo(
                rows=(1, 1, prefill_rows),
                row_tokens=(1, chunk, chunk),
                tokens=(1, prefill_tokens, prefill_tokens),
            ),
        },
        plugin_version=PLUGIN_VERSION,
    )
    runtime = library.replace("_", "-")
    changed = manifest.model_copy(update={"runtime": runtime, "plans": info, "files": files})
    (folder / FILE_NAME).write_text(changed.model_dump_json())
    return changed
