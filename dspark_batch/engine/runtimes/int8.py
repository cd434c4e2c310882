"""What int8 products do on this processor: whether they are exact, and what they cost.

Without VNNI, AMX or their like, ONNX Runtime's kernel for unsigned activations and signed weights
adds pairs of products in 16 bits. Engines have weights for which such sums fit
(`models.graph.quantize_columns`), so no processor needs other ones.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dspark_batch.engine import Int8

_ROWS = (1, 2, 3, 4, 8, 40)  # kernels differ by the number of rows
_TIMED = (32, 576, 3072)  # rows, inputs and outputs of a product that is timed
_REPEATS = 15


def measure_int8() -> Int8:
    """Multiply the worst weights that engines have, and time products, which takes a moment."""
    from dspark_batch.models.graph import MOST_LEVEL, product, quantize_columns

    num_rows, height, width = _TIMED
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((height, width)).astype(np.float32)
    weights, _ = quantize_columns(matrix, paired=True)
    session, floats = _session(product(weights)), _session(product(matrix))
    x = rng.integers(0, 2 * MOST_LEVEL + 1, (num_rows, height), dtype=np.uint8)
    wide = x.astype(np.float32)
    sweeps = [(_seconds(session, {"x": x}), _seconds(floats, {"x": wide})) for _ in range(_REPEATS)]
    int8, fp32 = (median(times) for times in zip(*sweeps[1:], strict=True))
    return Int8(_is_exact(session, weights, MOST_LEVEL), int8 / fp32)


def _is_exact(session: ort.InferenceSession, weights: NDArray[np.int8], most: int) -> bool:
    """Whether products with the largest activations, of level `most`, come out as integers do."""
    for num_rows in _ROWS:
        x = np.full((num_rows, len(weights)), 2 * most, np.uint8)
        wanted = (x.astype(np.int64) - most) @ weights.astype(np.int64)
        if not np.array_equal(session.run(None, {"x": x})[0], wanted):  # below 2^24: fp32 has them
            return False
    return True


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _seconds(session: ort.InferenceSession, feeds: dict[str, NDArray[Any]]) -> float:
    begin = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - begin
