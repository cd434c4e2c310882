"""The runtimes by name: a new one is a module like `RuntimeModule` and a line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from dspark_batch.engine.runtimes.session import ANYWHERE, Placement, Runtime
from dspark_batch.errors import EngineError

if TYPE_CHECKING:
    from dspark_batch.engine import EngineManifest

RUNTIMES = {
    "onnxruntime": "dspark_batch.engine.runtimes.ort",
    "tensorrt": "dspark_batch.engine.runtimes.trt",
    "tensorrt-rtx": "dspark_batch.engine.runtimes.trt",
}


class RuntimeModule(Protocol):
    """What a module in `RUNTIMES` has."""

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
    from dspark_batch.engine.runtimes import ort, trt

    _MODULES: tuple[RuntimeModule, ...] = (ort, trt)  # they have what the protocol says


def runtime_module(name: str) -> RuntimeModule:
    """The module of a runtime.

    Raises:
        EngineError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise EngineError(f"there is no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    return cast(RuntimeModule, import_module(RUNTIMES[name]))
