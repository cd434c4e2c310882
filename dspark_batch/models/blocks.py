"""Graph blocks that every model shares: linear layers by precision, norms, RoPE, attention.

Tokens of a call are flattened: `[T, hidden]`. Only attention is laid out per row, `[R, S]`, where
S is the longest row of this call: `token_index` [R, S] says which flattened token fills each cell
(padding: any), `cell_index` [T] in which cell, `row * S + s`, each token lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.graph import FLOAT, FLOAT16, GraphBuilder

PRECISIONS = ("fp32", "int8")
MASKED = -1.0e30  # added to the score of a key that a query must not see; finite, so never NaN

Matrix = NDArray[Any]
_BLOCK = 2**24  # weights that are quantized at a time


def quantize_columns(
    matrix: Matrix, rows: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 per output channel: `[in, out]` -> int8 `[in, out]`, scales `[out]`.

    `rows` [in] are factors on the rows of the matrix.
    """
    height, width = matrix.shape
    quantized = np.empty((height, width), np.int8)
    scales = np.empty(width, np.float32)
    step = max(1, _BLOCK // height)
    for begin in range(0, width, step):
        columns = slice(begin, begin + step)
        block = matrix[:, columns].astype(np.float32)
        if rows is not None:
            block *= rows[:, None]
        largest = np.maximum(block.max(axis=0), -block.min(axis=0))
        scales[columns] = np.maximum(largest, 1e-12) / np.float32(127)
        block /= scales[columns]
        quantized[:, columns] = np.rint(block, out=block)
    return quantized, scales


@dataclass(frozen=True, slots=True)
class Activation:
    """A flattened activation `[T, n]` and, once a quantized layer asked, its int8 form."""

    value: str
    quantized: str | None = None
    scale: str | None = None


class Linears:
    """Emits linear layers in one precision.

    `int8` is row-wise: each token is quantized with its own scale (absolute maximum / 127), the
    weights per output channel, and the integer product is exact. A row's result therefore depends
    neither on its neighbours nor on the number of tokens in the call. Activations are stored
    unsigned with zero point 128, because the u8 x s8 product is the one with a fast kernel on
    every x86 CPU (VNNI, AMX); the value is the symmetric one.
    """

    def __init__(self, builder: GraphBuilder, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; one of {', '.join(PRECISIONS)}")
        self.b = builder
        self.precision = precision
        self._zero_points: dict[str, str] = {}

    def activation(self, value: str, like: str) -> Activation:
        """Prepare `[T, n]` as input of linear layers; `like` is any 1-D value of length T."""
        if self.precision == "fp32":
            return Activation(value)
        b = self.b
        if like not in self._zero_points:
            self._zero_points[like] = b.op("Expand", b.constant(128, np.uint8), b.op("Shape", like))
        largest = b.op("ReduceMax", b.op("Abs", value), b.constant([1]), keepdims=0)
        scale = b.op("Mul", largest, b.constant(1 / 127, np.float32))
        quantized = b.op("QuantizeLinear", value, scale, self._zero_points[like], axis=0)
        return Activation(value, quantized, b.op("Unsqueeze", scale, b.constant([1])))

    def linear(
        self, name: str, x: Activation, matrix: Matrix, rows: NDArray[np.float32] | None = None
    ) -> str:
        """`[T, in] @ [in, out]`; `matrix` is `[in, out]`, `rows` [in] factors on its rows."""
        if self.precision == "fp32":
            scaled = matrix if rows is None else matrix * rows[:, None]
            return self.b.op("MatMul", x.value, self.b.weight(name, scaled, np.float32))
        b = self.b
        if not b.has(name):
            weights, scales = quantize_columns(matrix, rows)
            b.weight(name, weights)
            b.weight(f"{name}.scale", scales)
        assert x.quantized is not None
        assert x.scale is not None
        product = b.op(
            "MatMulIntegerToFloat",
            x.quantized,
            name,
            b.constant(1.0, np.float32),
            f"{name}.scale",
            b.constant(128, np.uint8),
            domain="com.microsoft",
        )
        return b.op("Mul", product, x.scale)

    def head(
        self, name: str, x: Activation, table: Matrix, rows: NDArray[np.float32] | None = None
    ) -> str:
        """`[T, in] @ tableᵀ`, table `[out, in]`; `rows` [in] as in `linear`, for int8 only.

        In fp32 it is stored as it is, so that an embedding can be a head too.
        """
        if self.precision == "fp32":
            return self.b.op("Gemm", x.value, self.b.weight(name, table, np.float32), transB=1)
        return self.linear(name, x, table.T, rows)


def rms_norm(b: GraphBuilder, x: str, name: str, weight: Matrix, epsilon: float) -> str:
    """RMSNorm over the last axis."""
    scale = b.weight(name, weight, np.float32)
    return b.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon)


def plain_norm(b: GraphBuilder, x: str, size: int, epsilon: float) -> str:
    """RMSNorm without a weight over the last axis, of `size`."""
    ones = b.constant(np.ones(size), np.float32)
    return b.op("RMSNormalization", x, ones, axis=-1, epsilon=epsilon)


def soft_cap(b: GraphBuilder, x: str, cap: float | None) -> str:
    """cap * tanh(x / cap); None caps nothing."""
    if cap is None:
        return x
    size = b.constant(cap, np.float32)
    return b.op("Mul", b.op("Tanh", b.op("Div", x, size)), size)


def embedding(b: GraphBuilder, table: str, tokens: str, data_type: int) -> str:
    """Rows of `table` as fp32."""
    rows = b.op("Gather", table, tokens)
    return b.op("Cast", rows, to=FLOAT) if data_type == FLOAT16 else rows


def rows_from_tokens(
    b: GraphBuilder, x: str, token_index: str, *, num_heads: int, head_dim: int
) -> str:
    """`[T, heads * d]` -> `[R, heads, S, d]`."""
    cells = b.op("Gather", x, token_index)  # [R, S, heads * d]
    split = b.op("Reshape", cells, b.constant([0, 0, num_heads, head_dim]))
    return b.op("Transpose", split, perm=[0, 2, 1, 3])


def tokens_from_rows(b: GraphBuilder, x: str, cell_index: str, *, width: int) -> str:
    """`[R, heads, S, d]` -> `[T, heads * d]`."""
    cells = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3]), b.constant([-1, width]))
    return b.op("Gather", cells, cell_index)


def rotate(b: GraphBuilder, x: str, tables: tuple[str, str], positions: str) -> str:
    """Half-split RoPE of `[R, heads, S, d]` at `positions` [R, S]; tables `[max, d/2]` cos, sin."""
    return b.op("RotaryEmbedding", x, *tables, positions, interleaved=0)


def folded_scores(b: GraphBuilder, q: str, keys: str) -> str:
    """`q` [R, kv, G*S, d] times `keys` [R, kv, n, d] transposed -> [R, kv, G*S, n]."""
    return b.op("MatMul", q, b.op("Transpose", keys, perm=[0, 1, 3, 2]))


def fold_queries(b: GraphBuilder, q: str, *, num_kv_heads: int, head_dim: int) -> str:
    """`[R, heads, S, d]` -> `[R, kv, G * S, d]`: the query heads of a group share one product.

    On the CPU this reads each key once per group instead of once per head; `docs/design.md` has
    what that gains over `Attention` with grouped heads.
    """
    return b.op("Reshape", q, b.constant([0, num_kv_heads, -1, head_dim]))


def unfold_queries(b: GraphBuilder, x: str, *, num_heads: int, head_dim: int) -> str:
    """Inverse of `fold_queries`."""
    return b.op("Reshape", x, b.constant([0, num_heads, -1, head_dim]))


def activate(b: GraphBuilder, x: str, kind: str) -> str:
    """The MLP's non-linearity: `silu` or `gelu_tanh`."""
    if kind == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if kind == "gelu_tanh":
        return b.op("Gelu", x, approximate="tanh")
    raise ValueError(f"unknown activation {kind!r}")
