"""What the plan files of a TensorRT runtime are built for, and building them.

A plan has one cache capacity, a library version, GPU architectures and two optimization profiles:
`decode` for draft rounds, verification and plain decoding, `prefill` for chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dspark_batch.engine import PlansInfo, ProfileInfo, find_gpus
from dspark_batch.engine.runtimes import PREFILL_CHUNK, PREFILL_TOKENS, RUNTIMES
from dspark_batch.errors import EngineError
from dspark_batch.export.recipe import EngineSection
from dspark_batch.models.plugin import (
    Bounds,
    PlanReport,
    PlanRequest,
    build_plan,
    contract,
)

Progress = Callable[[str], None]
Library = Literal["tensorrt", "tensorrt_rtx"]
RTX_ARCHS = (75, 80, 86, 89, 120)
DEFAULT_RTX_ARCHS = (86, 89, 120)  # consumer cards since 2020; where no GPU says what it is
_LEAST_BF16 = 80
_RING_BYTES = 2**28  # of context that waits on the device until the draft takes it in
_MOST_WAITING = 16384  # tokens of it


def plans_info(engine: EngineSection, *, block_size: int) -> PlansInfo | None:
    """What the plans of a recipe are built for; None for a runtime that has none.

    Raises:
        EngineError: the library is missing, or does not build for such a GPU.
    """
    library = RUNTIMES[engine.runtime].library
    if library is None:
        return None
    found = _library_version(library, engine.runtime)
    archs = _gpu_archs(engine)
    chunk = min(PREFILL_CHUNK, engine.max_tokens)
    slots, rows = block_size + 1, engine.max_rows
    tokens, prompt_tokens = rows * slots, min(PREFILL_TOKENS, rows * chunk)
    return PlansInfo(
        library=library,
        library_version=found,
        gpu_archs=archs,
        # A call writes cells of padding too, as many in each row as in the longest.
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
                "TensorRT builds on the GPU that it builds for, and this machine has none",
                hint="export on the machine that runs, or for RTX cards: --runtime tensorrt-rtx",
            )
        if wanted and wanted != (here,):
            raise EngineError(
                f"TensorRT builds for the GPU of this machine, sm_{here}, and for no other "
                f"(--gpu-arch {' '.join(map(str, wanted))})",
                hint="leave out --gpu-arch",
            )
        return (here,)
    archs = wanted or ((here,) if here in RTX_ARCHS else DEFAULT_RTX_ARCHS)
    known = ", ".join(map(str, RTX_ARCHS))
    for arch in archs:
        if arch not in RTX_ARCHS:
            raise EngineError(
                f"TensorRT-RTX does not build for sm_{arch}; --gpu-arch can be {known}",
                hint="for data-centre cards: --runtime tensorrt, on a machine that has one",
            )
        if engine.precision == "bf16" and arch < _LEAST_BF16:
            raise EngineError(f"sm_{arch} has no bf16", hint=f"--gpu-arch {arch} --precision fp16")
    return archs


def build_plans(
    folder: Path, plans: PlansInfo, *, block_size: int, context_bytes: int, progress: Progress
) -> dict[str, PlanReport]:
    """Write `target.plan`, and `draft.plan` if there is a draft graph, beside their graphs.

    `context_bytes` is what the context of one token takes.

    Raises:
        EngineError: as `build_plan`; or a graph is not what it should be.
    """
    places = min(_MOST_WAITING, _RING_BYTES // context_bytes)
    places = max(places, 4 * max(profile.tokens[2] for profile in plans.profiles.values()))
    sizes = {
        "target": [_target_sizes(profile, block_size) for profile in plans.profiles.values()],
        "draft": [_draft_sizes(profile, places) for profile in plans.profiles.values()],
    }
    reports = {}
    for name in sizes:
        graph = folder / f"{name}.onnx"
        if not graph.exists():
            continue
        archs = ", ".join(f"sm_{arch}" for arch in plans.gpu_archs)
        progress(f"building {name}.plan ({plans.library} {plans.library_version}, {archs})")
        report = build_plan(
            PlanRequest(
                library=plans.library,
                graph=str(graph),
                plan=str(folder / f"{name}.plan"),
                gpu_archs=plans.gpu_archs,
                constants={"C": plans.capacity},
                profiles=sizes[name],
                verifies=name == "target",
                weight_streaming=plans.weight_streaming,
            )
        )
        if report.library_version != plans.library_version:
            raise EngineError(
                f"{plans.library} says it is {report.library_version}, but its package says "
                f"{plans.library_version}",
                hint="install it again",
            )
        reports[name] = report
        memory = f", {report.peak_bytes / 1e9:.1f} GB of memory" if report.peak_bytes else ""
        progress(
            f"built {name}.plan: {report.num_bytes / 1e6:.0f} MB in {report.seconds:.0f} s{memory}"
        )
    return reports


def _target_sizes(profile: ProfileInfo, block_size: int) -> Mapping[str, Bounds]:
    """Sizes by the names of `models/decoder.py` and `plugin/contract.py`."""
    gamma, rows = max(block_size, 1), profile.rows
    # A row has logits of its last tokens only: of a prompt's chunk of the last one.
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


def _draft_sizes(profile: ProfileInfo, places: int) -> Mapping[str, Bounds]:
    """Sizes by the names of `drafters/dspark.py`; `places` for context on the device."""
    return {
        "R": profile.rows,
        "P": profile.row_tokens,
        "N": profile.tokens,
        "M": (1, places, places),
    }
