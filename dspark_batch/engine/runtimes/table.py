"""Runtimes: what executes the graphs of an engine. `runtime` in the manifest picks one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dspark_batch.errors import EngineError

RUNTIMES = {
    "onnxruntime": "dspark_batch.engine.runtimes.ort",
    "tensorrt": "dspark_batch.engine.runtimes.trt",
    "tensorrt-rtx": "dspark_batch.engine.runtimes.trt",
}


def runtime_module(name: str) -> Any:
    """The module of a runtime: `open_pair`, `refusal`, `hardware_key`, `uses_gpu`.

    Raises:
        EngineError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise EngineError(f"no runtime {name!r} in this version; it has {' and '.join(RUNTIMES)}")
    return import_module(RUNTIMES[name])
