"""ONNX Runtime on an NVIDIA GPU as replays of captured steps (`table.RuntimeModule`).

On the CPU, which has to be asked for, the same runtime executes twins of the graphs in standard
ops: an export checks and calibrates with it, and so do tests.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from dspark_batch.engine import EngineManifest, find_gpus
from dspark_batch.engine.runtimes import ort_devices
from dspark_batch.engine.runtimes.paged import PagedRuntime
from dspark_batch.engine.runtimes.session import ANYWHERE, Placement
from dspark_batch.errors import EngineError

_OLDEST = (1, 31)  # whose PagedAttention has norms, both directions and bounds
_LEAST_ARCH = 80  # its kernels are FlashAttention's
_HEAD_GRAIN = 16  # of which they take multiples; a twin takes any size


def open_pair(
    folder: Path, manifest: EngineManifest, max_rows: int, placement: Placement = ANYWHERE
) -> PagedRuntime:
    """See `RuntimeModule`."""
    problem = refusal(folder, manifest, placement)
    if problem is not None:
        raise problem
    device = "cpu" if placement.device == "cpu" else "cuda"
    if device == "cuda":
        ort.preload_dlls()  # of NVIDIA's packages, where CUDA is not installed otherwise
    free = None if device == "cpu" else find_gpus().gpus[0].free_bytes
    return PagedRuntime(
        folder,
        manifest,
        max_rows,
        device=device,
        threads=placement.threads,
        free_bytes=free,
        pads_prompts=device != "cpu",  # where padding costs, and nothing is captured
    )


def uses_gpu(manifest: EngineManifest, placement: Placement = ANYWHERE) -> bool:
    """See `RuntimeModule`."""
    return placement.device != "cpu"


def hardware_key(manifest: EngineManifest, placement: Placement = ANYWHERE) -> str:
    """See `RuntimeModule`."""
    if not uses_gpu(manifest, placement):
        return f"{ort_devices.hardware_key(manifest, placement)}, twins"
    gpu = find_gpus().gpus[0]
    return f"{gpu.name}, sm_{gpu.arch}, onnxruntime {ort.__version__}, captured"


def refusal(
    folder: Path, manifest: EngineManifest, placement: Placement = ANYWHERE
) -> EngineError | None:
    """See `RuntimeModule`."""
    version = tuple(int(word) for word in ort.__version__.split(".")[:2] if word.isdigit())
    if version < _OLDEST:
        wanted = f"{_OLDEST[0]}.{_OLDEST[1]}"
        return EngineError(
            f"{folder}: ONNX Runtime {ort.__version__} is too old for captured steps",
            hint=f"pip install 'onnxruntime-gpu>={wanted}'",
        )
    if placement.device == "cpu":
        return None
    found = find_gpus()
    slowly = "; or add --device cpu, which computes the same on the CPU, slowly"
    if not found.gpus:
        return EngineError(
            f"{folder}: built for NVIDIA GPUs, and there is none: {found.problem}",
            hint=f"build an engine for this machine: dspark-batch export {manifest.recipe}{slowly}",
        )
    if "CUDAExecutionProvider" not in ort_devices.providers():
        return EngineError(
            f"{folder}: the installed ONNX Runtime cannot use the GPU",
            hint='pip uninstall --yes onnxruntime, then pip install "dspark-batch[gpu]"',
        )
    if found.gpus[0].arch < _LEAST_ARCH:
        return EngineError(
            f"{folder}: {found.gpus[0].name} is sm_{found.gpus[0].arch}, and paged attention needs "
            f"sm_{_LEAST_ARCH} or newer",
            hint="export with --runtime tensorrt-rtx, which runs on sm_75",
        )
    draft = manifest.draft.cache if manifest.draft else None
    caches = [manifest.target.cache, *([draft] if draft else [])]
    odd = {size for cache in caches for _, size in cache.cache_shapes if size % _HEAD_GRAIN}
    if odd:
        return EngineError(
            f"{folder}: heads of {min(odd)} channels have no kernel; multiples of {_HEAD_GRAIN} do",
            hint="run with --device cpu, or export with --runtime tensorrt",
        )
    return None
