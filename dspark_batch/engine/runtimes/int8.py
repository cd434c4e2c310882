"""Whether this processor adds int8 products exactly, and the remedy where it does not.

Without VNNI, AMX or their like, ONNX Runtime's kernel for unsigned activations and signed weights
adds pairs of products in 16 bits, where 255 * 127 * 2 does not fit: the sum saturates, and the text
gets worse without a word. Its kernel for unsigned weights adds in 32 bits everywhere. So where a
probe finds a wrong sum, a graph is opened with every weight w rewritten as w + 128, unsigned, with
zero point 128: the same numbers, exact sums. Elsewhere signed weights are faster, so files keep
those.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dspark_batch.engine import Int8

_PROBE = Path(__file__).with_name("int8_probe.onnx")
"""What `models.graph.product` writes of `probe_weights`: a file, so that a run needs no onnx."""
_ROWS = (1, 2, 3, 4, 8, 40)  # kernels differ by the number of rows
_INNER = 256
_TIMED = (32, 576, 3072)  # rows, inputs and outputs of a product that is timed
_REPEATS = 15


@cache
def sums_exactly() -> bool:
    """Whether products of the worst values with signed weights come out as integers do."""
    session = _session(_PROBE.read_bytes())
    weights = probe_weights()
    for num_rows in _ROWS:
        x = np.full((num_rows, _INNER), 255, np.uint8)
        x[:, 1::4] = 0
        (found,) = session.run(None, {"x": x})
        wanted = (x.astype(np.int64) - 128) @ weights.astype(np.int64)
        if not np.array_equal(found, wanted):  # below 2^24: fp32 holds them
            return False
    return True


def probe_weights() -> NDArray[np.int8]:
    """The weights in `int8_probe.onnx`, of which sums saturate at once where they can."""
    weights = np.full((_INNER, 64), 127, np.int8)
    weights[:, ::2] = -127
    weights[::2, 1::4] = 0
    return weights


def remedy_name() -> str | None:
    """What is done to weights here, in words; None where they are exact as they are stored."""
    return None if sums_exactly() else "unsigned int8 weights"


def measure_int8() -> Int8:
    """Probe and time products, which takes a moment."""
    from dspark_batch.models.graph import product  # imports onnx, which a run does not need

    num_rows, height, width = _TIMED
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (height, width), dtype=np.int8)
    x = rng.integers(0, 256, (num_rows, height), dtype=np.uint8)
    stored, exact = product(weights), product(weights, unsigned=True)
    floats = product(weights.astype(np.float32))
    sessions = [_session(model) for model in (stored, exact, floats)]
    feeds: list[dict[str, NDArray[Any]]] = [{"x": x}, {"x": x}, {"x": x.astype(np.float32)}]
    sweeps = [
        [_seconds(s, f) for s, f in zip(sessions, feeds, strict=True)] for _ in range(_REPEATS)
    ]
    as_stored, unsigned, fp32 = (median(times) for times in zip(*sweeps[1:], strict=True))
    used = as_stored if sums_exactly() else unsigned
    return Int8(sums_exactly(), used / fp32, used / as_stored)


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _seconds(session: ort.InferenceSession, feeds: dict[str, NDArray[Any]]) -> float:
    begin = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - begin
