"""Precisions, and linear layers in each of them.

A precision says what a graph's activations are and how it stores the weights of its linear layers.
Whatever is no linear layer (norms, embeddings, softmax, heads over them) follows from the type of
the activations, which is the graph builder's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.graph.builder import BFLOAT16, DTYPES, FLOAT, FLOAT16, INT4, GraphBuilder

Matrix = NDArray[Any]
STREAM_MIX, DOWN_MIX = 64, 16
"""Channels that are mixed before they are quantized: of inputs that are as wide as the residual
stream, and of `down_proj`'s, which are wider."""
INT4_BLOCK = 32  # rows of a matrix that share a scale in each column
_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale that cuts nothing off
_BLOCK = 2**24  # weights that are quantized at a time


@dataclass(frozen=True, slots=True)
class Precision:
    """What a graph is built of."""

    data_type: int
    """ONNX type of activations, caches and context."""
    weight_bits: int | None = None
    """Of linear layers; None: their type is that of the activations."""
    by_token: bool = False
    """Activations are quantized too, each token with its own scale."""
    native_attention: bool = False
    """One `Attention` node a layer, which TensorRT has kernels for; else products and a softmax."""

    @property
    def smoothed(self) -> bool:
        """Whether outliers of activations go into the weights: int8 weights alone lose by it."""
        return self.by_token or self.weight_bits == 4

    @property
    def table_type(self) -> int:
        """ONNX type of embedding tables: beside quantized layers, fp16 will do."""
        return FLOAT16 if self.by_token else self.data_type


PRECISIONS = {
    "fp32": Precision(FLOAT),
    "int8": Precision(FLOAT, weight_bits=8, by_token=True),
    "fp16": Precision(FLOAT16, native_attention=True),
    "bf16": Precision(BFLOAT16, native_attention=True),
    "int8-weights": Precision(FLOAT16, weight_bits=8, native_attention=True),
    "int4-weights": Precision(FLOAT16, weight_bits=4, native_attention=True),
}


def hadamard(size: int) -> NDArray[np.float32]:
    """Sylvester's orthonormal matrix `[size, size]`, its own inverse; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))


def quantize_columns(
    matrix: Matrix, rows: NDArray[np.float32] | None = None, mix: int = 1
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 per output channel: `[in, out]` -> int8 `[in, out]`, scales `[out]`.

    `rows` [in] are factors on the rows of the matrix; then every `mix` rows are mixed, as
    `Linears.activation` mixes what they are multiplied with.
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
        if mix > 1:
            block = (hadamard(mix) @ block.reshape(-1, mix, block.shape[1])).reshape(block.shape)
        largest = np.maximum(block.max(axis=0), -block.min(axis=0))
        scales[columns] = np.maximum(largest, 1e-12) / np.float32(127)
        block /= scales[columns]
        quantized[:, columns] = np.rint(block, out=block)
    return quantized, scales


def quantize_blocks(matrix: Matrix) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """int4 by blocks of rows: `[in, out]` -> int4 `[in, out]`, scales `[in / 32, out]`.

    Of a few scales a block gets the one with the smallest squared error: the largest value may be
    cut off for the sake of the others. Scales are positive, which TensorRT insists on.
    """
    height, width = matrix.shape
    quantized = np.empty((height, width), INT4)
    scales = np.empty((height // INT4_BLOCK, width), np.float32)
    for i in range(len(scales)):
        rows = slice(i * INT4_BLOCK, (i + 1) * INT4_BLOCK)
        block = matrix[rows].astype(np.float32)
        widest = np.maximum(np.maximum(block.max(axis=0) / 7, block.min(axis=0) / -8), 1e-12)
        least = np.full(width, np.inf, np.float32)
        for share in _INT4_SHARES:
            scale = widest * np.float32(share)
            values = np.clip(np.rint(block / scale), -8, 7)
            error = np.square(values * scale - block).sum(axis=0)
            better = error < least
            least = np.where(better, error, least)
            scales[i] = np.where(better, scale, scales[i])
            quantized[rows, better] = values[:, better].astype(np.int8)
    return quantized, scales


@dataclass(frozen=True, slots=True)
class Activation:
    """A flattened activation `[T, n]` and, once a quantized layer asked, its int8 form."""

    value: str
    quantized: str | None = None
    scale: str | None = None
    mix: int = 1


class Linears:
    """Emits linear layers in one precision.

    `int8` is row-wise: each token is quantized with its own scale (absolute maximum / 127), the
    weights per output channel, and the integer product is exact. A row's result therefore depends
    neither on its neighbours nor on the number of tokens in the call. Activations are stored
    unsigned with zero point 128, because the u8 x s8 product is the one with a fast kernel on
    every x86 CPU (VNNI, AMX); the value is the symmetric one.

    A few large channels of a token cost the others their resolution. So every few channels are
    mixed by a Hadamard matrix first, and the rows of the weight with them (QuaRot, Ashkboos et al.
    2024): the product is the same, and what was one large value is many middling ones.

    With quantized weights alone the product is one of floats: `DequantizeLinear` gives the matrix,
    which a compiler fuses.
    """

    def __init__(self, builder: GraphBuilder, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; one of {', '.join(PRECISIONS)}")
        self.b = builder
        self.precision = PRECISIONS[precision]
        if builder.data_type != self.precision.data_type:
            raise ValueError(f"the graph builder is not for {precision}: give it its data_type")
        self._zero_points: dict[str, str] = {}

    def activation(self, value: str, like: str, *, size: int = 1, mix: int = 1) -> Activation:
        """Prepare `[T, n]` as input of linear layers; `like` is any 1-D value of length T.

        `mix` channels are mixed, of `size` n; fewer where it is no multiple.
        """
        if not self.precision.by_token:
            return Activation(value)
        b, mix = self.b, math.gcd(size, mix)
        if mix > 1:
            groups = b.op("Reshape", value, b.constant([0, size // mix, mix]))
            mixed = b.op("MatMul", groups, b.constant(hadamard(mix), np.float32))
            value = b.op("Reshape", mixed, b.constant([0, size]))
        if like not in self._zero_points:
            self._zero_points[like] = b.op("Expand", b.constant(128, np.uint8), b.op("Shape", like))
        largest = b.op("ReduceMax", b.op("Abs", value), b.constant([1]), keepdims=0)
        scale = b.op("Mul", largest, b.constant(1 / 127, np.float32))
        quantized = b.op("QuantizeLinear", value, scale, self._zero_points[like], axis=0)
        return Activation(value, quantized, b.op("Unsqueeze", scale, b.constant([1])), mix)

    def linear(
        self, name: str, x: Activation, matrix: Matrix, rows: NDArray[np.float32] | None = None
    ) -> str:
        """`[T, in] @ [in, out]`; `matrix` is `[in, out]`, `rows` [in] factors on its rows."""
        if not self.precision.by_token:
            scaled = matrix if rows is None else matrix * rows[:, None]
            return self.b.op("MatMul", x.value, self._matrix(name, scaled))
        b = self.b
        if not b.has(name):
            self._write(name, *quantize_columns(matrix, rows, x.mix))
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
        """`[T, in] @ tableᵀ` in fp32, table `[out, in]`; `rows` [in] as in `linear`, for int8.

        In a float precision it is stored as it is, so that an embedding can be a head too. A head
        has 8 bits at least.
        """
        b = self.b
        if self.precision.weight_bits is None:
            weight = b.weight(name, table, DTYPES[b.data_type])
            return b.wide(b.op("Gemm", x.value, weight, transB=1))
        if self.precision.by_token:
            return self.linear(name, x, table.T, rows)
        return b.wide(b.op("MatMul", x.value, self._columns(name, table.T, rows)))

    def _matrix(self, name: str, matrix: Matrix) -> str:
        """`matrix` as a value of the graph's type.

        int4 wants whole blocks; a matrix that has none is of int8.
        """
        bits = self.precision.weight_bits
        if bits is None:
            return self.b.weight(name, matrix, DTYPES[self.b.data_type])
        height, width = matrix.shape
        if bits == 4 and height % INT4_BLOCK == 0 and width % 2 == 0:
            return self._blocks(name, matrix)
        return self._columns(name, matrix)

    def _columns(self, name: str, matrix: Matrix, rows: NDArray[np.float32] | None = None) -> str:
        if not self.b.has(name):
            self._write(name, *quantize_columns(matrix, rows))
        return self.b.op("DequantizeLinear", name, f"{name}.scale", axis=1)

    def _blocks(self, name: str, matrix: Matrix) -> str:
        b = self.b
        if not b.has(name):
            self._write(name, *quantize_blocks(matrix))
        return b.op("DequantizeLinear", name, f"{name}.scale", axis=0, block_size=INT4_BLOCK)

    def _write(self, name: str, weights: Matrix, scales: NDArray[np.float32]) -> None:
        dtype = DTYPES[self.b.data_type]
        if dtype == np.float16:  # TensorRT refuses a scale of 0, which small ones would become
            scales = np.maximum(scales, np.finfo(np.float16).smallest_subnormal, dtype=np.float32)
        self.b.weight(name, weights)
        self.b.weight(f"{name}.scale", scales, dtype)
