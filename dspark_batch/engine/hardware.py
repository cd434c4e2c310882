"""What this machine has: processor, memory, NVIDIA GPUs. Nothing here starts a GPU or fails."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimddp": "dot product",
    "i8mm": "int8 matrix product",
}
"""Flag in `/proc/cpuinfo` -> name, of the features that ONNX Runtime's products gain from."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor; `features` are known on Linux only."""

    name: str
    num_cores: int
    """That this process may use."""
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Int8:
    """What a product of int8 does on this processor."""

    exact: bool
    """Whether products with the weights that engines have come out as integers do."""
    time_to_fp32: float
    """Of a product, relative to one of fp32."""

    def text(self) -> str:
        """In one line."""
        sums = "sums are exact" if self.exact else "sums are wrong here: use precision fp32"
        return f"{sums}; a product takes {self.time_to_fp32:.2f} of the time of fp32"


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the host, in bytes."""

    total_bytes: int
    free_bytes: int
    """What programs can still get."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    uuid: str
    arch: int
    """Compute capability, times ten."""
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that a program started here would see."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver knows."""
    problem: str | None = None
    """Why there is none, in words."""


def cpu_fields() -> dict[str, str]:
    """The fields of `/proc/cpuinfo`, those of the last core; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def find_cpu() -> Cpu:
    """Look at the processor."""
    fields = cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Cpu(
        fields.get("model name") or platform.processor() or platform.machine(),
        num_cores(),
        tuple(name for flag, name in _CPU_FEATURES.items() if flag in flags),
    )


def find_memory() -> Memory:
    """Look at the memory."""
    found = psutil.virtual_memory()
    return Memory(found.total, found.available)


def find_gpus() -> Gpus:
    """Ask the driver, through NVML, which needs no CUDA and takes no memory on a GPU."""
    try:
        import pynvml
    except ImportError:
        return Gpus(problem="unknown: nvidia-ml-py is missing; pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        return Gpus(problem=f"no NVIDIA driver ({problem})")
    try:
        return _ask(pynvml)
    except pynvml.NVMLError as problem:
        return Gpus(problem=f"the NVIDIA driver does not answer ({problem}); see: nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _ask(nvml: Any) -> Gpus:
    version = nvml.nvmlSystemGetCudaDriverVersion()
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        found.append(Gpu(_text(name), _text(uuid), 10 * major + minor, memory.total, memory.free))
    gpus = tuple(_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")))
    hidden = "CUDA_VISIBLE_DEVICES hides all of them" if found else "the driver shows none"
    return Gpus(
        gpus,
        _text(nvml.nvmlSystemGetDriverVersion()),
        f"{version // 1000}.{version % 1000 // 10}",
        None if gpus else hidden,
    )


def _visible(gpus: list[Gpu], wanted: str | None) -> list[Gpu]:
    """Those that `CUDA_VISIBLE_DEVICES` names, in its order: as CUDA, up to the first it lacks.

    CUDA counts by speed unless `CUDA_DEVICE_ORDER` says otherwise, NVML by bus: numbers agree
    where all GPUs are alike.
    """
    if wanted is None:
        return gpus
    found: list[Gpu] = []
    for word in wanted.split(","):
        word = word.strip()
        if word.isdigit():
            chosen = gpus[int(word) : int(word) + 1]
        else:
            chosen = [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
        if len(chosen) != 1 or chosen[0] in found:
            break
        found += chosen
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def is_running(pid: int, *, before: float) -> bool:
    """Whether the process that had this number at the time `before` still runs.

    One that may not be looked at counts as running.
    """
    try:
        process = psutil.Process(pid)
        # A younger process has the number of one that ended; a minute for clocks that were set.
        is_the_same = bool(process.create_time() < before + 60)
        return is_the_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
