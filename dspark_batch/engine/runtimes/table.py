"""The runtimes by name: a new one is a module like `RuntimeModule` and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from dspark_batch.engine.runtimes.session import ANYWHERE, Placement, Runtime
from dspark_batch.errors import EngineError

if TYPE_CHECKING:
    from dspark_batch.engine import EngineManifest


@dataclass(frozen=True, slots=True)
class RuntimeEntry:
    """A runtime, as recipes and manifests name it."""

    module: str
    precisions: tuple[str, ...]
    """That engines for it can have; the first is the default."""
    library: Literal["tensorrt", "tensorrt_rtx"] | None = None
    """What compiles the graphs to plan files; None: the runtime runs the ONNX files themselves."""
    paged: bool = False
    """Graphs are written for captured steps over pages of keys and values."""
    gpu_archs: tuple[int, ...] = ()
    """The only GPUs that it runs on: compute capabilities, times ten. Empty: it names none."""


_TENSORRT = "dspark_batch.engine.runtimes.trt"
_FOR_GPUS = ("fp16", "bf16", "int8-weights", "int4-weights")
# The RTX cards of NVIDIA's support matrix. The builder of TensorRT-RTX 1.7 also takes 80, which is
# not in it, and 121 (GB10), which was never tried.
_RTX_CARDS = (75, 86, 89, 120)
RUNTIMES = {
    "onnxruntime": RuntimeEntry("dspark_batch.engine.runtimes.ort", ("fp32", "int8")),
    "onnxruntime-cuda": RuntimeEntry(
        "dspark_batch.engine.runtimes.ort_cuda", ("fp16", "bf16"), paged=True
    ),
    "tensorrt-rtx": RuntimeEntry(
        _TENSORRT, _FOR_GPUS, library="tensorrt_rtx", gpu_archs=_RTX_CARDS
    ),
    "tensorrt": RuntimeEntry(_TENSORRT, _FOR_GPUS, library="tensorrt"),
}
RTX_ONLY = "TensorRT-RTX runs on RTX cards only"
OTHER_CARDS = "a data-centre card takes --runtime tensorrt, or --runtime onnxruntime-cuda"


class RuntimeModule(Protocol):
    """What the module of a runtime has."""

    def open_pair(
        self, folder: Path, manifest: EngineManifest, max_rows: int, placement: Placement = ANYWHERE
    ) -> Runtime:
        """Open the graphs of an engine folder for `max_rows` concurrent rows.

        Raises:
            EngineError: they cannot run here: what `refusal` returns.
        """

    def refusal(
        self, folder: Path, manifest: EngineManifest, placement: Placement = ANYWHERE
    ) -> EngineError | None:
        """Why the engine cannot run on this machine; None if it can. Opens nothing."""

    def uses_gpu(self, manifest: EngineManifest, placement: Placement = ANYWHERE) -> bool:
        """Whether the graphs would execute on a GPU."""

    def hardware_key(self, manifest: EngineManifest, placement: Placement = ANYWHERE) -> str:
        """Names what measured costs hold for: the processor and whatever else they depend on."""


if TYPE_CHECKING:
    from dspark_batch.engine.runtimes import ort, ort_cuda, trt

    _MODULES: tuple[RuntimeModule, ...] = (ort, ort_cuda, trt)  # they have what the protocol says


def runtime_module(name: str) -> RuntimeModule:
    """The module of a runtime.

    Raises:
        EngineError: there is none of that name, or ONNX Runtime is not installed.
    """
    if name not in RUNTIMES:
        raise EngineError(f"there is no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    try:
        return cast(RuntimeModule, import_module(RUNTIMES[name].module))
    except ModuleNotFoundError as missing:
        if missing.name != "onnxruntime":
            raise
        raise EngineError(
            "ONNX Runtime is not installed",
            hint='pip install "dspark-batch[cpu]", or "dspark-batch[gpu]" for NVIDIA GPUs',
        ) from missing
