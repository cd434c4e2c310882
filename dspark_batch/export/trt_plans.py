"""The plan files of a TensorRT runtime: what they are built for, and building them.

A plan file is for one cache capacity, one version of the library and certain GPU architectures. It
has two optimization profiles: `decode` for drafting, verification and plain decoding, `prefill` for
chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dspark_batch.engine import PlansInfo, ProfileInfo, find_gpus
from dspark_batch.engine.runtimes import OTHER_CARDS, PREFILL, RTX_ONLY, RUNTIMES
from dspark_batch.errors import EngineError
from dspark_batch.export.recipe import EngineSection
from dspark_batch.models.plugin import Bounds, PlanReport, PlanRequest, build_plan, contract

Progress = Callable[[str], None]
Library = Literal["tensorrt", "tensorrt_rtx"]
RTX_ARCHS = RUNTIMES["tensorrt-rtx"].gpu_archs
DEFAULT_RTX_ARCHS = (86, 89, 120)  # consumer cards since 2020, if this machine has none
_MIN_BF16_ARCH = 80
# Context that waits on the device until the draft takes it in.
_MAX_WAITING_BYTES, _MAX_WAITING_TOKENS = 2**28, 16384


def check_gpus(engine: EngineSection, *, progress: Progress) -> None:
    """Whether plan files can be for the GPUs that they are to be for; needs no library.

    Raises:
        EngineError: the library does not build for them, or not on this machine.
    """
    if RUNTIMES[engine.runtime].library is None:
        return
    archs, gpus = _gpu_archs(engine), find_gpus().gpus
    if engine.runtime == "tensorrt-rtx" and gpus and gpus[0].arch not in RTX_ARCHS:
        built = ", ".join(f"sm_{arch}" for arch in archs)
        progress(
            f"this engine is for {built} and will not run on this machine: {RTX_ONLY}, and "
            f"{gpus[0].name} is sm_{gpus[0].arch}; {OTHER_CARDS}"
        )


def plan_files_info(engine: EngineSection, *, block_size: int) -> PlansInfo | None:
    """What the plan files of a recipe are built for; None for a runtime without plan files.

    Raises:
        EngineError: the library is missing, or does not build for the GPU.
    """
    library = RUNTIMES[engine.runtime].library
    if library is None:
        return None
    found = _library_version(library, engine.runtime)
    archs = _gpu_archs(engine)
    chunk = min(PREFILL.chunk, engine.max_tokens)
    slots, rows = block_size + 1, engine.max_rows
    tokens, prompt_tokens = rows * slots, min(PREFILL.tokens, rows * chunk)
    return PlansInfo(
        library=library,
        library_version=found,
        gpu_archs=archs,
        # A call writes padding too, so that every row has as many cells as the longest.
        capacity=engine.max_tokens + chunk + slots,
        profiles={
            "decode": ProfileInfo(
                rows=(1, rows, rows),
                row_tokens=(1, slots, slots),
                tokens=(1, -(-tokens // 2), tokens),
            ),
            "prefill": ProfileInfo(
                rows=(1, min(2, rows), rows),
                row_tokens=(1, chunk, chunk),
                tokens=(1, prompt_tokens, prompt_tokens),
            ),
        },
        plugin_version=contract.PLUGIN_VERSION,
        weight_streaming=engine.weight_streaming,
    )


def _library_version(library: Library, runtime: str) -> str:
    packages = packages_distributions().get(library)
    if not packages:
        raise EngineError(
            f"the runtime {runtime} needs {library}, which is not installed",
            hint=f'pip install "dspark-batch[{runtime}]"',
        )
    if find_spec("triton") is None:
        raise EngineError(
            "Triton, which compiles the verification kernel, is not installed",
            hint=f'pip install "dspark-batch[{runtime}]"',
        )
    return version(packages[0])


def _gpu_archs(engine: EngineSection) -> tuple[int, ...]:
    gpus, wanted = find_gpus().gpus, engine.gpu_archs
    here = gpus[0].arch if gpus else None
    if engine.runtime == "tensorrt":
        if here is None:
            raise EngineError(
                "TensorRT builds only on the GPU that it builds for, and this machine has no GPU",
                hint="export on the machine that runs, or use --runtime tensorrt-rtx for RTX cards",
            )
        if wanted and wanted != (here,):
            raise EngineError(
                f"TensorRT builds only for the GPU of this machine, sm_{here}, not for --gpu-arch "
                f"{' '.join(map(str, wanted))}",
                hint="leave out --gpu-arch",
            )
        return (here,)
    archs = wanted or ((here,) if here in RTX_ARCHS else DEFAULT_RTX_ARCHS)
    known = ", ".join(map(str, RTX_ARCHS))
    for arch in archs:
        if arch not in RTX_ARCHS:
            raise EngineError(
                f"{RTX_ONLY}, and not on sm_{arch}; --gpu-arch can be {known}",
                hint=OTHER_CARDS,
            )
        if engine.precision == "bf16" and arch < _MIN_BF16_ARCH:
            raise EngineError(f"sm_{arch} has no bf16", hint="export again with --precision fp16")
    return archs


def build_plan_files(
    folder: Path, info: PlansInfo, *, block_size: int, context_bytes: int, progress: Progress
) -> dict[str, PlanReport]:
    """Write `target.plan`, and `draft.plan` if there is a draft graph, next to the graphs.

    `context_bytes` is the size of the context of one token.

    Raises:
        EngineError: a plan file cannot be built, or not by the version that `info` names.
    """
    profiles = list(info.profiles.values())
    num_waiting = min(_MAX_WAITING_TOKENS, _MAX_WAITING_BYTES // context_bytes)
    num_waiting = max(num_waiting, 4 * max(profile.tokens[2] for profile in profiles))
    sizes = {
        "target": [_target_sizes(profile, block_size) for profile in profiles],
        "draft": [_draft_sizes(profile, num_waiting) for profile in profiles],
    }
    reports = {}
    for name in sizes:
        graph = folder / f"{name}.onnx"
        if not graph.exists():
            continue
        archs = ", ".join(f"sm_{arch}" for arch in info.gpu_archs)
        progress(f"building {name}.plan ({info.library} {info.library_version}, {archs})")
        report = build_plan(
            PlanRequest(
                library=info.library,
                graph=str(graph),
                plan=str(folder / f"{name}.plan"),
                gpu_archs=info.gpu_archs,
                constants={"C": info.capacity},
                profiles=sizes[name],
                verifies=name == "target",
                weight_streaming=info.weight_streaming,
            )
        )
        if report.library_version != info.library_version:
            raise EngineError(
                f"the library {info.library} has version {report.library_version}, but its package "
                f"{info.library_version}",
                hint="install the package again",
            )
        reports[name] = report
        memory = f", {report.peak_bytes / 1e9:.1f} GB of memory" if report.peak_bytes else ""
        progress(
            f"built {name}.plan: {report.num_bytes / 1e6:.0f} MB in {report.seconds:.0f} s{memory}"
        )
    return reports


def _target_sizes(profile: ProfileInfo, block_size: int) -> Mapping[str, Bounds]:
    """Sizes by their names in `models/decoder.py` and `models/plugin/contract.py`."""
    gamma, rows = max(block_size, 1), profile.rows
    # Only the last γ + 1 tokens of a row have logits, in a chunk of a prompt only the last.
    logits = min(profile.tokens, (1, rows[1] * (gamma + 1), rows[2] * (gamma + 1)), key=max)
    return {
        "R": rows,
        "S": profile.row_tokens,
        "T": profile.tokens,
        "N": logits,
        "K": (0, gamma, gamma),
        "K1": (1, gamma + 1, gamma + 1),
        "G": (1, gamma, gamma),
        "G1": (gamma + 1,) * 3,
    }


def _draft_sizes(profile: ProfileInfo, num_waiting: int) -> Mapping[str, Bounds]:
    """Sizes by their names in `drafters/dspark.py`; `num_waiting` tokens of context may wait."""
    return {
        "R": profile.rows,
        "P": profile.row_tokens,
        "N": profile.tokens,
        "M": (1, num_waiting, num_waiting),
    }
