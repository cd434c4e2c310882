"""`engines/<name>/manifest.json`: everything that `run` needs to know about an engine.

What was built decides what runs, so no option of `run` repeats a field of this file. What belongs
to a machine is kept beside it: costs in `costs.json`, compiled kernels in `target.plan.cache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dspark_batch.drafters import LookupInfo
from dspark_batch.errors import EngineError

FORMAT = "dspark-batch-engine/2"
FILE_NAME = "manifest.json"
COSTS_FILE = "costs.json"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CACHE_SUFFIX = ".cache"
_GRAPHS = [f"{g}.{kind}" for g in ("target", "draft") for kind in ("onnx", "onnx.data", "plan")]
_GRAPHS.append("draft-narrow.onnx")
_OF_RUNS = [COSTS_FILE, *(f"{g}.plan{CACHE_SUFFIX}" for g in ("target", "draft"))]
ENGINE_FILES = frozenset(
    [FILE_NAME, *_TEXT_FILES, *_GRAPHS, *_OF_RUNS, *(f"{name}.tmp" for name in _OF_RUNS)]
)
"""All that an export, and a run that measures or compiles, ever writes into an engine folder."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheInfo(_Part):
    """One model's KV cache: layers that have one, their key/value heads and head size."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    differing: dict[int, tuple[int, int]] = {}
    """Heads and head size of the layers that have others."""

    @classmethod
    def from_shapes(cls, shapes: Sequence[tuple[int, int]]) -> CacheInfo:
        """From the key/value heads and head size of each layer."""
        num_kv_heads, head_dim = shapes[0]
        return cls(
            num_layers=len(shapes),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            differing={i: shape for i, shape in enumerate(shapes) if shape != shapes[0]},
        )

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Key/value heads and head size of each layer."""
        usual = (self.num_kv_heads, self.head_dim)
        return tuple(self.differing.get(i, usual) for i in range(self.num_layers))


class TargetInfo(_Part):
    """The target model."""

    family: str
    source: str
    license: str | None
    files: dict[str, str]
    """Name and SHA-256 of each weight file."""
    vocab_size: int
    hidden_size: int
    cache: CacheInfo
    stop_token_ids: tuple[int, ...]
    context_layer_ids: tuple[int, ...] = ()
    """Layers whose outputs the graph gives as context to a training; a draft names its own."""


class CalibrationInfo(_Part):
    """How well calibrated the confidence is, on rounds of whole blocks decoded at export."""

    rows: Literal["greedy", "sampled"]
    num_rounds: int
    """Temperatures are fitted on every other row; the errors are those of the others."""
    error_before: tuple[float, ...]
    """[γ] expected calibration error of survival, without temperatures."""
    error_after: tuple[float, ...]
    """[γ] and with them."""


class DraftInfo(_Part):
    """What proposes: a network, a lookup, or a lookup ahead of a network."""

    drafter: str
    source: str | None
    """None, and no files, without weights."""
    files: dict[str, str]
    block_size: int
    mask_token_id: int | None = None
    vocab_size: int | None = None
    """Draft vocabulary; smaller than the target's where the checkpoint has a `d2t` map."""
    target_layer_ids: tuple[int, ...] = ()
    markov_head: str | None = None
    markov_rank: int = 0
    cache: CacheInfo | None = None
    """Of the draft's graph; None where there is none."""
    lookup: LookupInfo | None = None
    confidence_temperatures: tuple[float, ...]
    """[γ] sequential temperature scaling of the confidence logits, for greedy rows."""
    acceptance: tuple[float, ...]
    """[γ] conditional acceptance by position, measured greedily at export: the run's prior."""
    sampled_temperatures: tuple[float, ...] = ()
    """The same for rows above temperature 0; empty where greedy rows' serve."""
    sampled_acceptance: tuple[float, ...] = ()
    """As `sampled_temperatures`."""
    calibration: tuple[CalibrationInfo, ...] = ()
    """How good the two are; empty for a draft without a confidence head."""

    @property
    def has_network(self) -> bool:
        """Whether there is a graph that drafts."""
        return self.cache is not None


class Limits(_Part):
    """What the engine was built and measured for."""

    max_rows: int
    max_tokens: int


class ProfileInfo(_Part):
    """Sizes that one optimization profile of a plan file takes: least, best and most."""

    rows: tuple[int, int, int]
    row_tokens: tuple[int, int, int]
    """Tokens of one row in a call."""
    tokens: tuple[int, int, int]
    """Tokens of a call, of all rows together."""


class PlansInfo(_Part):
    """The plan files of a TensorRT runtime: what built them, and what they run on."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    library_version: str
    gpu_archs: tuple[int, ...]
    """Compute capabilities, times ten."""
    capacity: int
    """Tokens of a row in the KV caches; constant in a plan."""
    profiles: dict[str, ProfileInfo]
    """`decode` and `prefill`: their order is the index in a plan."""
    plugin_version: str
    weight_streaming: bool = False
    """Whether weights may stay on the host where the GPU has no room for all of them."""


class FileInfo(_Part):
    """One file of the folder."""

    bytes: int
    sha256: str


class EngineManifest(_Part):
    """The manifest as a value."""

    format: str
    name: str
    created: str
    versions: dict[str, str]
    runtime: str
    precision: str
    target: TargetInfo
    draft: DraftInfo | None
    limits: Limits
    has_tokenizer: bool
    files: dict[str, FileInfo]
    parity: dict[str, float]
    """What the export's own check found, against an independent forward pass."""
    plans: PlansInfo | None = None
    """None: the runtime executes the ONNX files themselves."""

    @property
    def export_command(self) -> str:
        """The command that builds the engine again; `export` names an engine by its recipe."""
        if self.runtime == "onnxruntime":
            return f"dspark-batch export {self.name} --force"
        options = f"--runtime {self.runtime} --precision {self.precision} --force"
        return f"dspark-batch export {self.recipe} {options}"

    @property
    def recipe(self) -> str:
        """The name of its recipe, which `export` gives an engine with the runtime behind it."""
        return self.name.removesuffix(f"-{self.runtime}")

    def fingerprint(self) -> dict[str, str]:
        """Facts that decide the text; a run that continues must find them unchanged."""
        plans = self.plans
        library = {"library": f"{plans.library} {plans.library_version}"} if plans else {}
        text = {name: info.sha256 for name, info in self.files.items() if name in _TEXT_FILES}
        return {
            "target": _digest(self.target.files),
            "precision": self.precision,
            "graph": self.files["target.onnx"].sha256,
            "tokenizer": _digest(text) if text else "",
            **library,
        }


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(sorted(files.values())).encode()).hexdigest()


def describe_file(path: Path) -> FileInfo:
    """Size and SHA-256 of a file, streamed."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileInfo(bytes=path.stat().st_size, sha256=digest)


def read_manifest(folder: Path, *, verify: bool = True) -> EngineManifest:
    """Read and check an engine folder: its format, and every file by size and hash.

    Without `verify` files are compared by size only, and not read.

    Raises:
        EngineError: no engine here, another format, or a file is missing or was changed.
    """
    path = folder / FILE_NAME
    build = f"dspark-batch export {folder.resolve().name}"
    again = f"build it again: {build} --force"
    if not path.exists():
        raise EngineError(f"there is no engine in {folder}", hint=f"build it: {build}")
    try:
        manifest = EngineManifest.model_validate_json(path.read_bytes())
    except ValidationError as problem:
        first: Any = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EngineError(f"{path}: {where}: {first['msg']}", hint=again) from problem
    if manifest.format != FORMAT:
        raise EngineError(f"{path} has the format {manifest.format!r}, not {FORMAT!r}", hint=again)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.exists():
            raise EngineError(f"{file} is missing", hint=again)
        if file.stat().st_size != expected.bytes or (verify and describe_file(file) != expected):
            raise EngineError(f"{file} is not the file that the export wrote", hint=again)
    return manifest
