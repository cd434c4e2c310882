"""Runtimes: what executes the graphs of an engine. `runtime` in the manifest picks one."""

from __future__ import annotations

RUNTIMES = {
    "onnxruntime": "dspark_batch.runtimes.ort",
    "tensorrt": "dspark_batch.runtimes.trt",
    "tensorrt-rtx": "dspark_batch.runtimes.trt",
}
