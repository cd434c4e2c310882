"""What a process does with TensorRT-RTX for `test_trt_plugin`; everything in and out is pickled.

A process of its own, because the builder may crash, and because `import_tensorrt_rtx` must be the
first import of TensorRT in a process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fake_trt import HostDevice
from interpreted import HostLauncher, noise
from verify_calls import Call, Result

from dspark_batch.engine.runtimes.plan_file import PlanFile
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import trt_body
from dspark_batch.models.plugin.contract import INPUT_NAMES, OPERANDS, OUTPUT_NAMES
from dspark_batch.models.plugin.launch import Kernel

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Built:
    """What came of a model: layers, shape and type of outputs, a refusal, and the engine."""

    layers: list[str]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    refusal: str | None
    callbacks: list[str]
    plan: bytes | None = None


def build(
    model: bytes | Path,
    kernels: tuple[Kernel, ...],
    profile: tuple[Shapes, Shapes, Shapes] | None = None,
    arch: int = 89,
) -> Built:
    """Parse, and with a profile build for sm_`arch`; the plugin is registered if it has kernels."""
    trt = trt_body.import_tensorrt_rtx()
    callbacks: list[str] = []
    if kernels:
        trt_body.register(trt, kernels)
        record(trt_body._plugin_class(trt), callbacks)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parse = parser.parse if isinstance(model, bytes) else parser.parse_from_file
    parsed = parse(model if isinstance(model, bytes) else str(model))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
    outputs = {
        tensor.name: (tuple(tensor.shape), tensor.dtype.name)
        for tensor in map(network.get_output, range(network.num_outputs))
    }
    built = Built(layers, outputs, None, callbacks)
    try:
        trt_body.check_network(trt, network)
    except EngineError as error:
        built.refusal = str(error)
    if profile is None:
        return built
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{arch}"), 0)
    bounds = builder.create_optimization_profile()
    for name in profile[0]:
        bounds.set_shape(name, *(shapes[name] for shapes in profile))
    config.add_optimization_profile(bounds)
    plan = builder.build_serialized_network(network, config)
    built.plan = None if plan is None else bytes(plan)
    return built


def record(plugin: Any, callbacks: list[str]) -> None:
    """Let the plugin's callbacks leave their names; a format's with its position and answer."""

    def call(name: str, method: Any, *arguments: Any) -> Any:
        answer = method(*arguments)
        seen = f" {arguments[1]} {answer}" if name == "supports_format_combination" else ""
        callbacks.append(name + seen)
        return answer

    for name, method in list(vars(plugin).items()):
        if callable(method) and not name.startswith("__"):
            wrapped = partial(call, name, method)
            setattr(plugin, name, lambda *arguments, wrapped=wrapped: wrapped(*arguments))


def read_back(kernels: tuple[Kernel, ...]) -> Iterable[Kernel]:
    """The kernels with which the runtime makes a plugin of another's fields."""
    trt = trt_body.import_tensorrt_rtx()
    empty = trt.PluginFieldCollection([])
    written = trt_body.register(trt, kernels).create_plugin("", empty, trt.TensorRTPhase.BUILD)
    found: list[Kernel] = []

    def make_launcher(read: Iterable[Kernel]) -> HostLauncher:
        found.extend(read)
        return HostLauncher()

    reader = trt_body.register(trt, make_launcher=make_launcher)
    reader.create_plugin("", written.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    return found


def create_without_kernels() -> str:
    """The refusal of a creator that has none."""
    trt = trt_body.import_tensorrt_rtx()
    creator = trt_body.register(trt)
    try:
        creator.create_plugin("", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    except EngineError as error:
        return str(error)
    return ""


def enqueue(call: Call, stream: int) -> tuple[Result, list[int]]:
    """Results of the plugin's `enqueue` on arrays of this process, and the streams it used."""
    trt = trt_body.import_tensorrt_rtx()
    launcher = HostLauncher()
    kernel = Kernel(arch=89, stage="survey", num_threads=256, shared_bytes=0, cubin=b"-")
    creator = trt_body.register(trt, [kernel], make_launcher=lambda _: launcher)
    plugin = creator.create_plugin("", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    plugin = plugin.attach_to_context(None)
    results = [np.full(len(call.lengths), -7, np.int64) for _ in OUTPUT_NAMES]
    arrays = [*(np.ascontiguousarray(call.feeds[name]) for name in INPUT_NAMES), *results]
    tensors = []
    for name, array in zip(OPERANDS, arrays, strict=True):
        tensor = trt.PluginTensorDesc()
        tensor.dims = trt.Dims(array.shape)
        tensor.type = (
            trt.DataType.FLOAT if OPERANDS[name].dtype == "float32" else trt.DataType.INT64
        )
        tensor.format = trt.TensorFormat.LINEAR
        tensors.append(tensor)
    addresses = [array.ctypes.data for array in arrays]
    n = len(INPUT_NAMES)
    ranges = []
    for tensor in tensors:
        known = trt.DynamicPluginTensorDesc()
        known.desc, known.min, known.max = tensor, tensor.dims, tensor.dims
        ranges.append(known)
    num_bytes = plugin.get_workspace_size(ranges[:n], ranges[n:])
    workspace = noise(num_bytes // 4 + 1024)
    beyond = workspace[num_bytes // 4 :].tobytes()
    at = workspace.ctypes.data
    plugin.enqueue(tensors[:n], tensors[n:], addresses[:n], addresses[n:], at, stream)
    assert workspace[num_bytes // 4 :].tobytes() == beyond
    return (results[0], results[1]), launcher.streams


def described(classes: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the real classes have: names, and how the bindings describe them."""
    trt = trt_body.import_tensorrt_rtx()
    return {
        name: {key: str(value.__doc__) for key, value in vars(getattr(trt, name)).items()}
        for name in classes
    }


def open_plan(path: Path) -> str:
    """What `PlanFile` says of a plan, on a machine without a driver."""
    trt = trt_body.import_tensorrt_rtx()
    trt_body.register(trt)
    try:
        PlanFile(trt, HostDevice(), path)
    except EngineError as error:
        return str(error)
    return ""
