"""The door to TensorRT: opens the plans of an engine folder, or says why they cannot run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_batch.engine import EngineManifest, PlansInfo
from dspark_batch.engine.runtimes.device import CudaDevice, find_gpu
from dspark_batch.engine.runtimes.session import ANYWHERE, Placement
from dspark_batch.engine.runtimes.trt_runtime import TrtRuntime
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import PLUGIN_VERSION, trt_body


def open_pair(
    folder: Path, manifest: EngineManifest, max_rows: int, placement: Placement = ANYWHERE
) -> TrtRuntime:
    """Open the plans of an engine folder for `max_rows` concurrent rows.

    Raises:
        EngineError: they cannot run here; see `refusal`.
    """
    problem = refusal(folder, manifest, placement)
    if problem is not None:
        raise EngineError(problem)
    assert manifest.plans is not None
    trt = trt_body.import_library(manifest.plans.library)
    trt_body.register(trt)
    device = CudaDevice()
    try:
        return TrtRuntime(folder, manifest, max_rows, trt=trt, device=device)
    except BaseException:
        device.close()
        raise


def uses_gpu(manifest: EngineManifest, placement: Placement = ANYWHERE) -> bool:
    """Plans execute nowhere else."""
    return True


def hardware_key(manifest: EngineManifest, placement: Placement = ANYWHERE) -> str:
    """What a measured cost holds for: the GPU and CUDA of its driver; the plans fix the rest."""
    gpu = find_gpu()
    return f"{gpu.name}, sm_{gpu.arch}, CUDA {gpu.driver_cuda}"


def refusal(folder: Path, manifest: EngineManifest, placement: Placement = ANYWHERE) -> str | None:
    """Why the plans of this engine cannot run on this machine, with what mends it; None if they do.

    That files are those of the export is for `read_manifest` to say, which compares their hashes.
    """
    if placement.device == "cpu":
        return f"{folder}: plans of TensorRT execute on GPUs alone; leave out --device cpu"
    plans = manifest.plans
    again = manifest.export_command
    if plans is None:
        return f"{folder}: the manifest describes no plans; build the engine again: {again}"
    try:
        gpu = find_gpu()
        library = trt_body.import_library(plans.library)
    except EngineError as problem:
        return f"{folder}: {problem}"
    if gpu.arch not in plans.gpu_archs:
        there = ", ".join(f"sm_{arch}" for arch in plans.gpu_archs)
        return (
            f"{folder}: built for {there}, and {gpu.name} is sm_{gpu.arch}; "
            f"build it for this GPU: {again} --gpu-arch {gpu.arch}"
        )
    return _outdated(folder, manifest, plans, library, again)


def _outdated(
    folder: Path, manifest: EngineManifest, plans: PlansInfo, library: Any, again: str
) -> str | None:
    if library.__version__ != plans.library_version:
        package = f"{plans.library.replace('_', '-')}-cu13"
        return (
            f"{folder}: built by {plans.library} {plans.library_version}, and "
            f"{library.__version__} is installed; install that version: "
            f'pip install "{package}=={plans.library_version}", or build the engine again: {again}'
        )
    if plans.plugin_version != PLUGIN_VERSION:
        return (
            f"{folder}: built with version {plans.plugin_version} of the verification plugin, and "
            f"this program has version {PLUGIN_VERSION}; build the engine again: {again}"
        )
    with_graph = manifest.draft is not None and manifest.draft.cache is not None
    for name in ("target.plan", "draft.plan") if with_graph else ("target.plan",):
        path, expected = folder / name, manifest.files.get(name)
        if expected is None or not path.exists():
            return f"{path} is missing; build the engine again: {again}"
        if path.stat().st_size != expected.bytes:
            return (
                f"{path} has {path.stat().st_size} of {expected.bytes} bytes; copy it again, or "
                f"build the engine again: {again}"
            )
    return None
