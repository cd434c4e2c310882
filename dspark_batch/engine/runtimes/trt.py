"""TensorRT and TensorRT-RTX as a runtime (`table.RuntimeModule`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_batch.engine import EngineManifest, PlansInfo, find_gpus
from dspark_batch.engine.runtimes.device import CudaDevice, import_cudart, usable_gpus
from dspark_batch.engine.runtimes.session import ANYWHERE, Placement
from dspark_batch.engine.runtimes.table import OTHER_CARDS, RTX_ONLY, RUNTIMES
from dspark_batch.engine.runtimes.trt_runtime import TrtRuntime
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import contract, trt_body


def open_pair(
    folder: Path, manifest: EngineManifest, max_rows: int, placement: Placement = ANYWHERE
) -> TrtRuntime:
    """See `RuntimeModule`."""
    problem = refusal(folder, manifest, placement)
    if problem is not None:
        raise problem
    assert manifest.plans is not None
    trt = trt_body.import_library(manifest.plans.library)
    trt_body.register(trt)
    key = f"{hardware_key(manifest)}, driver {usable_gpus().driver}"
    key += f", {trt.__name__} {trt.__version__}"
    device = CudaDevice()
    try:
        return TrtRuntime(folder, manifest, max_rows, trt=trt, device=device, kernels_for=key)
    except BaseException:
        device.close()
        raise


def uses_gpu(manifest: EngineManifest, placement: Placement = ANYWHERE) -> bool:
    """See `RuntimeModule`: TensorRT runs nowhere else."""
    return True


def hardware_key(manifest: EngineManifest, placement: Placement = ANYWHERE) -> str:
    """See `RuntimeModule`: the GPU and its driver's CUDA; the plan files fix the rest."""
    found = usable_gpus()
    return f"{found.gpus[0].name}, sm_{found.gpus[0].arch}, CUDA {found.cuda}"


def refusal(
    folder: Path, manifest: EngineManifest, placement: Placement = ANYWHERE
) -> EngineError | None:
    """See `RuntimeModule`. `read_manifest` compares the files with their hashes, this does not."""
    if placement.device == "cpu":
        return EngineError(
            f"{folder}: TensorRT engines run on GPUs only", hint="leave out --device cpu"
        )
    plans = manifest.plans
    again = f"build the engine again: {manifest.export_command}"
    if plans is None:
        return EngineError(f"{folder}: the manifest describes no plan files", hint=again)
    wrong = _wrong_card(folder, manifest)
    if wrong is not None:  # before a driver or a library is asked for that would not help
        return wrong
    try:
        gpu = usable_gpus().gpus[0]
        import_cudart()
        library = trt_body.import_library(plans.library)
    except EngineError as problem:
        return EngineError(f"{folder}: {problem.message}", hint=problem.hint)
    if gpu.arch not in plans.gpu_archs:
        there = ", ".join(f"sm_{arch}" for arch in plans.gpu_archs)
        return EngineError(
            f"{folder}: built for {there}, but {gpu.name} is sm_{gpu.arch}",
            hint=f"build it for this GPU: {manifest.export_command} --gpu-arch {gpu.arch}",
        )
    return _outdated(folder, manifest, plans, library, again)


def _wrong_card(folder: Path, manifest: EngineManifest) -> EngineError | None:
    """Whether the GPU is one that the library never runs on, whatever it was built for."""
    gpus, archs = find_gpus().gpus, RUNTIMES[manifest.runtime].gpu_archs
    if not gpus or not archs or gpus[0].arch in archs:
        return None
    return EngineError(
        f"{folder}: {RTX_ONLY}, and {gpus[0].name} is sm_{gpus[0].arch}",
        hint=f"build another engine, dspark-batch export {manifest.recipe}: {OTHER_CARDS}",
    )


def _outdated(
    folder: Path, manifest: EngineManifest, plans: PlansInfo, library: Any, again: str
) -> EngineError | None:
    if library.__version__ != plans.library_version:
        package = f"{plans.library.replace('_', '-')}-cu13"
        return EngineError(
            f"{folder}: built by {plans.library} {plans.library_version}, but "
            f"{library.__version__} is installed",
            hint=f'pip install "{package}=={plans.library_version}", or {again}',
        )
    if plans.plugin_version != contract.PLUGIN_VERSION:
        return EngineError(
            f"{folder}: built with version {plans.plugin_version} of the verification plugin, but "
            f"this program has version {contract.PLUGIN_VERSION}",
            hint=again,
        )
    has_network = manifest.draft is not None and manifest.draft.has_network
    for name in ("target.plan", "draft.plan") if has_network else ("target.plan",):
        path, expected = folder / name, manifest.files.get(name)
        if expected is None or not path.exists():
            return EngineError(f"{path} is missing", hint=again)
        if path.stat().st_size != expected.bytes:
            return EngineError(
                f"{path} has {path.stat().st_size} of {expected.bytes} bytes",
                hint=f"copy it again, or {again}",
            )
    return None
