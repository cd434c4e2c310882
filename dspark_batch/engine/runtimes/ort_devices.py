"""The devices of ONNX Runtime: their execution providers, and what they cannot run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnxruntime as ort

from dspark_batch.engine import EngineManifest, cpu_fields, find_gpus
from dspark_batch.engine.runtimes.memory import DeviceMemory, HostMemory, Memory
from dspark_batch.engine.runtimes.session import ANYWHERE, Placement
from dspark_batch.errors import EngineError

_OLDEST = (1, 28)  # that knows every operator of opset 24 here
_CUDA_PRECISIONS = ("fp32",)
"""com.microsoft::MatMulIntegerToFloat, which int8 graphs have, is for the CPU only. There all open
that an export writes: it decodes with the graphs of TensorRT's precisions to calibrate them."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def refusal(
    folder: Path, manifest: EngineManifest, placement: Placement = ANYWHERE
) -> EngineError | None:
    """See `RuntimeModule`."""
    version = tuple(int(word) for word in ort.__version__.split(".")[:2] if word.isdigit())
    if version < _OLDEST:
        return EngineError(
            f"{folder}: ONNX Runtime {ort.__version__} does not know all operators of the graphs",
            hint=f"pip install 'onnxruntime>={_OLDEST[0]}.{_OLDEST[1]}'",
        )
    device = chosen_device(manifest.precision, placement.device)
    if device == "cpu":
        return None
    if manifest.precision not in _CUDA_PRECISIONS:
        return EngineError(
            f"{folder}: ONNX Runtime has no {manifest.precision} kernels for {device}",
            hint=f"run with --device cpu, or set precision = "
            f'"{_CUDA_PRECISIONS[0]}" in the [engine] table of the recipe and build it again: '
            f"dspark-batch export {manifest.name} --force",
        )
    if _PROVIDERS[device] not in providers():
        return EngineError(
            f"{folder}: the installed ONNX Runtime is the one for CPUs",
            hint="pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    problem = find_gpus().problem
    return None if problem is None else EngineError(f"{folder}: no GPU to run on: {problem}")


def chosen_device(precision: str, wanted: str = "auto") -> str:
    """Where graphs execute; `auto` is the GPU if there is one and it has all kernels for them."""
    if wanted != "auto":
        return wanted
    able = precision in _CUDA_PRECISIONS and _PROVIDERS["cuda"] in providers()
    return "cuda" if able and find_gpus().gpus else "cpu"


def uses_gpu(manifest: EngineManifest, placement: Placement = ANYWHERE) -> bool:
    """Whether the graphs execute on a GPU."""
    return chosen_device(manifest.precision, placement.device) == "cuda"


def providers() -> list[str]:
    """The execution providers that the installed ONNX Runtime was built with."""
    return list(ort.get_available_providers())


def hardware_key(manifest: EngineManifest, placement: Placement = ANYWHERE) -> str:
    """What a measured cost holds for: processor and cores, or GPU, and ONNX Runtime's version."""
    version = f"onnxruntime {ort.__version__}"
    if uses_gpu(manifest, placement):
        gpu = find_gpus().gpus[0]
        return f"{gpu.name}, sm_{gpu.arch}, {version}"
    threads = f", {placement.threads} threads" if placement.threads else ""
    return f"{_processor()}, {os.cpu_count()} cores{threads}, {version}"


def _processor() -> str:
    fields = cpu_fields()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    known = " ".join(fields[key] for key in wanted if key in fields)
    return known or platform.processor() or platform.machine()


def open_on(graph: str | bytes, device: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on a device; the CPU has what the device lacks, but is never the whole of it."""
    if device == "cuda":
        ort.preload_dlls()  # of NVIDIA's packages, where CUDA is not installed otherwise
    wanted = list(dict.fromkeys([_PROVIDERS[device], _PROVIDERS["cpu"]]))
    session = ort.InferenceSession(graph, options, providers=wanted)
    if session.get_providers()[0] != wanted[0]:
        raise EngineError(
            f"ONNX Runtime could not load the libraries of {wanted[0]}",
            hint="pip install 'onnxruntime-gpu[cuda,cudnn]', or run with --device cpu",
        )
    return session


def memory_of(device: str) -> Memory:
    """Where a device keeps its arrays."""
    if device == "cpu":
        return HostMemory()
    from dspark_batch.models.graph import copy_graph  # imports onnx, which the CPU does not need

    return DeviceMemory(device, open_on(copy_graph(), device, ort.SessionOptions()))
