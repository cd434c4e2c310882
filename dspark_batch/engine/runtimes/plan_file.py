"""One opened plan file: its tensors, its profiles, and a step through one of its contexts.

`trt` is `tensorrt` or `tensorrt_rtx`; their classes have the same names. A step is enqueued on the
device's stream and never waits.

A step of the first profile becomes a CUDA graph. Full TensorRT is captured here, by sizes and
addresses: a step that is met for the second time gets a context of its own, runs, is captured, and
is replayed from then on. It runs before, because TensorRT settles new shapes and the plugin loads
its kernel in a run that is not captured; and it has its own context, because a context that takes
another shape changes what its graphs refer to. The contexts take turns, so they share their working
memory. TensorRT-RTX captures by itself: it alone knows which kernels serve a shape.

TensorRT-RTX compiles kernels for a shape when it first meets it. By default it does so in the
background, and general ones serve until then: costs would be measured on those, and the same step
would round differently a second later. Here it waits for them (`EAGER`): a shape's first step is
slow, all others are what they will always be. `kernels` keeps them for the next run.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dspark_batch.engine.runtimes.device import Device
from dspark_batch.engine.runtimes.kernels import KernelCache
from dspark_batch.errors import EngineError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
ITEM_SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}
ALIGNMENT = 256  # bytes, of every tensor that is placed here
_MAX_GRAPHS = 128  # a context each
_STREAMED_SPARE = 2**28  # bytes left free beside streamed weights


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output; a dimension that a call chooses is -1."""

    dtype: str
    """TensorRT's name of it: a key of `ITEM_SIZES`."""
    shape: Shape

    def num_bytes(self, shape: Shape) -> int:
        """What a tensor of this type and that shape takes."""
        return ITEM_SIZES[self.dtype] * math.prod(shape)


class _Context:
    """An execution context and what it was told last."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def bind(self, shapes: Shapes, addresses: Mapping[str, int]) -> str | None:
        """Tell it what differs from its last step; what it refused, if it did."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                if not self.context.set_input_shape(name, shape):
                    return f"{name} of shape {shape}"
                self._shapes[name] = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self.context.set_tensor_address(name, address):
                    return f"the address of {name}"
                self._addresses[name] = address
        return None


class PlanFile:
    """Invariant: after `open_contexts`, one context per profile, used by one stream."""

    def __init__(
        self,
        trt: Any,
        device: Device,
        path: Path,
        *,
        again: str = "",
        graphs: bool = True,
        kernels_for: str = "",
    ) -> None:
        """Read the plan file; the plugin is registered already. `again` is what builds it.

        Kernels that are compiled here are kept, under the name `kernels_for`; without one not.

        Raises:
            EngineError: TensorRT does not take it.
        """
        self.path = path
        self.again = f"build the engine again: {again}" if again else None
        self._trt, self._device, self._graphs_on = trt, device, graphs
        self._log = _log_class(trt)()
        self._runtime = trt.Runtime(self._log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused("cannot be opened")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        tensors = {name: self._describe(name) for name in names}
        given = trt.TensorIOMode.INPUT
        self.inputs = {n: t for n, t in tensors.items() if self._engine.get_tensor_mode(n) == given}
        self.outputs = {n: t for n, t in tensors.items() if n not in self.inputs}
        self.profiles = tuple(map(self._bounds, range(self._engine.num_optimization_profiles)))
        """Least and largest shape of every input, by profile."""
        self._native_graphs = hasattr(trt, "CudaGraphStrategy")
        self._kernels = KernelCache(path, kernels_for) if kernels_for else None
        self._workspace = 0
        self._contexts: list[_Context] = []
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Any] = {}
        self._captured: list[_Context] = []

    def _describe(self, name: str) -> Tensor:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in ITEM_SIZES:
            raise self._refused(f"has {name} of type {dtype}")
        return Tensor(dtype, tuple(self._engine.get_tensor_shape(name)))

    def _bounds(self, profile: int) -> dict[str, tuple[Shape, Shape]]:
        found = {}
        for name in self.inputs:
            least, _, most = self._engine.get_tensor_profile_shape(name, profile)
            found[name] = (tuple(least), tuple(most))
        return found

    def most(self, name: str) -> Shape:
        """The largest shape of an input in any profile."""
        return max((bounds[name][1] for bounds in self.profiles), key=math.prod)

    def open_contexts(self) -> None:
        """Make the contexts, once the caches have their memory: what is left is for weights.

        Raises:
            EngineError: there is no room for them.
        """
        self._stream_weights()
        if not self._native_graphs:
            size = max(self._engine.device_memory_size_v2, ALIGNMENT)
            self._workspace = self._device.allocate(size)
        self._contexts = [self._open_context(i) for i in range(len(self.profiles))]
        self._log.errors.clear()  # kernels of another GPU, which were refused, are none
        self._device.synchronize()

    def _stream_weights(self) -> None:
        """Keep as many weights on the GPU as fit, if the plan was built so that others can wait."""
        engine = self._engine
        streamable = engine.streamable_weights_size
        if not streamable:
            return
        num_workspaces = len(self.profiles) if self._native_graphs else 1
        working = engine.device_memory_size_v2 * num_workspaces
        room = self._device.free_bytes() - working - _STREAMED_SPARE
        if room < streamable:  # then weights on their way need a place as well
            room -= engine.weight_streaming_scratch_memory_size
        if room < 0:
            raise EngineError(
                f"{self.path} leaves no room on the GPU for its working memory of "
                f"{working / 1e9:.1f} GB",
                hint="run fewer rows at a time: --max-rows N",
            )
        engine.weight_streaming_budget_v2 = min(room, streamable)

    def _open_context(self, profile: int) -> _Context:
        engine, trt = self._engine, self._trt
        if self._native_graphs:
            config = engine.create_runtime_config()
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            if self._kernels is not None:
                self._kernels.attach(config)
            if self._graphs_on and profile == 0:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            shared = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(shared)
        if context is None:
            raise self._refused("finds no room on the GPU for its working memory")
        if not self._native_graphs:
            context.set_device_memory(self._workspace, engine.device_memory_size_v2)
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._refused(f"refuses its profile {profile}")
        return _Context(context)

    def run(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Enqueue a step: a shape for every input, an address for every input and output.

        Raises:
            EngineError: TensorRT refuses the step.
        """
        if not self._graphs_on or self._native_graphs or profile != 0:
            self._run(self._contexts[profile], shapes, addresses)
            return
        key = (*shapes.values(), *addresses.values())
        if key in self._graphs:
            self._device.replay(self._graphs[key])
        elif key in self._seen and len(self._graphs) < _MAX_GRAPHS:
            self._capture(key, shapes, addresses)
        else:
            self._run(self._contexts[profile], shapes, addresses)
            self._seen.add(key)

    def _capture(self, key: Any, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Run a step in a context of its own, and capture it for the next time."""
        context = self._open_context(0)
        self._run(context, shapes, addresses)
        graph = self._device.capture(lambda: self._enqueue(context))
        self._captured.append(context)  # even without a graph: its step is under way
        if graph is None:
            self._graphs_on = False  # a plan that cannot be captured runs without
        else:
            self._graphs[key] = graph

    def _run(self, context: _Context, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        refused = context.bind(shapes, addresses)
        if refused is not None:
            raise self._refused(f"does not take {refused}")
        self._enqueue(context)

    def _enqueue(self, context: _Context) -> None:
        if not context.context.execute_async_v3(self._device.stream):
            raise self._refused("failed in a step")

    def _refused(self, problem: str) -> EngineError:
        said = "; ".join(self._log.errors[-3:]) or "it does not say why"
        return EngineError(
            f"{self.path} {problem}: {self._trt.__name__} {self._trt.__version__}: {said}",
            hint=f"look at the GPU with nvidia-smi, or {self.again}",
        )

    def close(self) -> None:
        """Free contexts and weights, keep kernels; graphs and memory are the device's."""
        if self._kernels is not None:
            self._kernels.save()
        self._graphs.clear()
        self._contexts.clear()
        self._captured.clear()
        self._kernels = None  # it outlives the contexts
        self._engine = self._runtime = None


@cache
def _log_class(trt: Any) -> Any:
    """A logger that keeps what TensorRT has to say for the error that follows."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log
