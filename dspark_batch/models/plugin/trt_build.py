"""Build one TensorRT plan from an ONNX file: in a process of its own, because the builder may die.

`build_plan` runs this module as a program: a `PlanRequest` as JSON comes in on stdin, a
`PlanReport` goes out as the last line of stdout. `tensorrt` and `tensorrt_rtx` go the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import trt_body
from dspark_batch.models.plugin.launch import compile_kernels

Bounds = Sequence[int]  # least, best, most
_NO_DRIVER = "cudaError 35"  # said of every failure on a machine without a GPU


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to build."""

    library: str
    """`tensorrt` or `tensorrt_rtx`."""
    graph: str
    """The ONNX file; its weights lie beside it."""
    plan: str
    """The file to write."""
    gpu_archs: Sequence[int]
    constants: Mapping[str, int]
    """Symbolic dimensions that the plan has one size of."""
    profiles: Sequence[Mapping[str, Bounds]]
    """Sizes of every other symbolic dimension, for each optimization profile."""
    verifies: bool
    """Whether the graph holds the verification op."""
    weight_streaming: bool = False
    """Whether weights may stay on the host where the GPU has no room for all of them."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What was built, and what that took."""

    library_version: str
    num_bytes: int
    seconds: float
    peak_bytes: int | None
    """Memory of the building process; None where the system does not tell."""
    layers: Mapping[str, int]
    """Layers of the parsed network, by type."""
    inputs: Mapping[str, str]
    """Type of each input, by name."""
    outputs: Mapping[str, str]


def build_plan(request: PlanRequest) -> PlanReport:
    """Write the plan of a graph, whole or not at all.

    Raises:
        EngineError: TensorRT is missing, refuses the graph or the sizes, or its builder died.
    """
    command = [sys.executable, "-m", __name__]
    # The package may be imported from a path that a new process does not have.
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command,
        input=json.dumps(asdict(request)),
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return PlanReport(**json.loads(done.stdout.splitlines()[-1]))
    Path(request.plan).unlink(missing_ok=True)  # of a builder that died while it wrote
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == EngineError.exit_code:
        message, hint = json.loads(said)
        raise EngineError(message, hint=hint)
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
    raise EngineError(
        f"{request.graph}: the builder of {request.library} died ({how}; its last line: {said})",
        hint="try another --precision or --gpu-arch; if it was killed, memory ran out",
    )


def _build(request: PlanRequest) -> PlanReport:
    """The building process."""
    begin = time.perf_counter()
    trt = trt_body.import_library(request.library)
    trt_body.register(trt, compile_kernels(request.gpu_archs))
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    graph = Path(request.graph)
    if not parser.parse(_fixed(graph, request.constants), str(graph)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"{graph}: {request.library} does not take the graph: {errors}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if request.verifies:
        trt_body.check_network(trt, network)
    _let_attention_decompose(trt, layers)
    config = builder.create_builder_config()
    _choose_archs(trt, config, request)
    if request.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for sizes in request.profiles:
        if config.add_optimization_profile(_profile(builder, network, sizes)) < 0:
            raise EngineError(f"{graph}: {request.library} refuses sizes: {logger.errors[0]}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{graph}: {request.library} {trt.__version__} builds no plan of it: "
            + "; ".join(logger.errors)
        )
    path = Path(request.plan)
    with path.open("wb") as file:
        file.write(plan)
    inputs, outputs = (
        {tensor.name: tensor.dtype.name for tensor in map(get, range(number))}
        for get, number in (
            (network.get_input, network.num_inputs),
            (network.get_output, network.num_outputs),
        )
    )
    return PlanReport(
        library_version=trt.__version__,
        num_bytes=path.stat().st_size,
        seconds=time.perf_counter() - begin,
        peak_bytes=_peak_bytes(),
        layers=dict(Counter(layer.type.name for layer in layers)),
        inputs=inputs,
        outputs=outputs,
    )


def _fixed(path: Path, sizes: Mapping[str, int]) -> bytes:
    """The graph file with symbolic dimensions of inputs and outputs replaced by `sizes`.

    Without its output `logits`, which the export's check alone reads: on a GPU it would take room
    for a row of the vocabulary for each token, and nothing reads it.
    """
    model = onnx.load(path, load_external_data=False)
    outputs = [value for value in model.graph.output if value.name != "logits"]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return bytes(model.SerializeToString())


def _logger(trt: Any) -> Any:
    errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message; the rest is of no use to who exports."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in errors and _NO_DRIVER not in message:
                self.errors.append(message)

    return Logger()


def _let_attention_decompose(trt: Any, layers: Sequence[Any]) -> None:
    """Where there is no fused kernel (of a head size, say), TensorRT may use several."""
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer  # how the bindings cast
            layer.attention.decomposable = True


def _choose_archs(trt: Any, config: Any, request: PlanRequest) -> None:
    """Only TensorRT-RTX builds for other GPUs than the one at hand."""
    if request.library == "tensorrt_rtx":
        config.num_compute_capabilities = len(request.gpu_archs)
        for i, arch in enumerate(request.gpu_archs):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{arch}"), i)


def _profile(builder: Any, network: Any, sizes: Mapping[str, Bounds]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        axes = [
            (size,) * 3 if size >= 0 else sizes[tensor.get_dimension_name(i)]
            for i, size in enumerate(tensor.shape)
        ]
        profile.set_shape(tensor.name, *zip(*axes, strict=True))
    return profile


def _peak_bytes() -> int | None:
    """As Linux counts it for this program; `getrusage` would begin with the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def _main() -> None:
    try:
        report = _build(PlanRequest(**json.load(sys.stdin)))
    except EngineError as error:
        sys.stderr.write(f"\n{json.dumps([error.message, error.hint])}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"\n{json.dumps(asdict(report))}\n")


if __name__ == "__main__":
    _main()
