"""Precisions, and linear layers in each of them.

A precision is the type of a graph's activations and the format of the weights of its linear
layers. Everything else (norms, embeddings, softmax) follows the type of the activations, which is
the `data_type` of the graph builder.
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
"""Number of channels that are mixed with each other before quantization: in inputs as wide as the
residual stream, and in the wider input of `down_proj`."""
INT4_BLOCK = 32  # rows of a matrix that share one scale per column
_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # scales to try; 1 is the one without clipping
MOST_LEVEL = 104
"""Largest quantized activation, and the zero point of those that are stored unsigned."""
PAIR_LIMIT = (2**15 - 1) // (2 * MOST_LEVEL)
"""Most that two int8 weights of one pair may add up to, see `quantize_columns`."""
_PAIR_SHARES = (1.0, 1.05, 1.1, 1.2, 1.35, 1.65)  # the same for them; at the last none exceeds it
_BLOCK = 2**24  # weights that are quantized at once
_PAIR_BLOCK = 2**18  # fewer, where they are looked at several times


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of the activations and weights of a graph."""

    data_type: int
    """ONNX type of activations, caches and context."""
    weight_bits: int | None = None
    """Bits of the weights of linear layers; None: they have the type of the activations."""
    by_token: bool = False
    """Activations are quantized too, with one scale per token."""
    native_attention: bool = False
    """Attention is one node per layer, for TensorRT's kernels; else two products and a softmax."""

    @property
    def smoothed(self) -> bool:
        """Whether SmoothQuant is applied; it makes int8 weights with float activations worse."""
        return self.by_token or self.weight_bits == 4

    @property
    def table_type(self) -> int:
        """ONNX type of embedding tables; next to int8 activations, fp16 is exact enough."""
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
    """Orthonormal Hadamard matrix `[size, size]`, its own inverse; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))


def quantize_columns(
    matrix: Matrix,
    rows: NDArray[np.float32] | None = None,
    mix: int = 1,
    *,
    paired: bool = False,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 per output channel: `[in, out]` -> int8 `[in, out]`, scales `[out]`.

    First the rows of the matrix are multiplied by `rows` [in], then groups of `mix` rows are mixed,
    as `Linears.activation` mixes the channels that they will be multiplied with.

    `paired` weights are for products with unsigned activations. Processors without VNNI add the
    products of rows 2i and 2i + 1 in 16 bits, where the sum of two saturates. If the weights of
    such a pair add up to `PAIR_LIMIT` at most, it cannot. Several scales are tried, and each column
    gets the one with the smallest squared error.
    """
    height, width = matrix.shape
    quantized = np.empty((height, width), np.int8)
    scales = np.empty(width, np.float32)
    step = max(1, (_PAIR_BLOCK if paired else _BLOCK) // height)
    for begin in range(0, width, step):
        columns = slice(begin, begin + step)
        block = matrix[:, columns].astype(np.float32)
        if rows is not None:
            block *= rows[:, None]
        if mix > 1:
            block = (hadamard(mix) @ block.reshape(-1, mix, block.shape[1])).reshape(block.shape)
        largest = np.maximum(block.max(axis=0), -block.min(axis=0))
        scale = np.maximum(largest, 1e-12) / np.float32(127)
        if paired:
            quantized[:, columns], scales[columns] = _in_pairs(block, scale)
        else:
            scales[columns] = scale
            quantized[:, columns] = np.rint(np.divide(block, scale, out=block), out=block)
    return quantized, scales


def _in_pairs(
    block: NDArray[np.float32], scale: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`block` `[in, n]` as int8 within `PAIR_LIMIT`, scales `[n]`: `scale` [n] or larger ones."""
    quantized, scales = np.empty(block.shape, np.int8), scale
    least = np.full(len(scale), np.inf, np.float32)
    for share in _PAIR_SHARES:
        tried = scale * np.float32(share)
        values = block / tried
        np.rint(values, out=values)
        pairs = values[: len(values) // 2 * 2].reshape(-1, 2, len(scale))
        first, second = pairs[:, 0], pairs[:, 1]
        # What a pair has too much is taken off both. Of two signs they never have.
        excess = np.maximum(np.abs(first + second) - PAIR_LIMIT, 0)
        half = np.floor(excess / 2)
        second -= np.copysign(half, second)
        first -= np.copysign(excess - half, first)
        error = np.square(values * tried - block).sum(axis=0)
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, tried, scales)
        quantized[:, better] = values[:, better]
    return quantized, scales


def quantize_blocks(matrix: Matrix) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """int4 in blocks of rows: `[in, out]` -> int4 `[in, out]`, scales `[in / 32, out]`.

    Several scales are tried, and each block and column gets the one with the smallest squared
    error, even if it clips the largest values. Scales are positive, as TensorRT requires.
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
    """Input `[T, n]` of linear layers, and its quantized form if the precision has one."""

    value: str
    quantized: str | None = None
    scale: str | None = None
    """[T, 1]"""
    mix: int = 1
    """Number of channels mixed with each other."""


class Linears:
    """Adds linear layers to a graph, in one precision.

    In `int8`, each token is quantized with its own scale (absolute maximum / 104) and the weights
    per output channel; the integer product is exact, on every processor (`quantize_columns`). So a
    result depends neither on other rows nor on the number of tokens in the call. Activations are
    symmetric, but stored unsigned with a zero point, because x86 has fast kernels for u8 x s8.

    One large channel would leave the other channels of its token too few steps. So small groups of
    channels are mixed by a Hadamard matrix first, and the rows of the weight likewise (QuaRot,
    Ashkboos et al. 2024): the product stays the same, and the large value is spread over its group.

    If only the weights are quantized, `DequantizeLinear` makes a float matrix of them, which
    TensorRT fuses with the product.
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
        """Prepare `value` `[T, n]` as the input of linear layers; `like`: a 1-D value of length T.

        Groups of `mix` channels are mixed, smaller ones if `size`, which is n, is not a multiple.
        """
        if not self.precision.by_token:
            return Activation(value)
        b, mix = self.b, math.gcd(size, mix)
        if mix > 1:
            groups = b.op("Reshape", value, b.constant([0, size // mix, mix]))
            mixed = b.op("MatMul", groups, b.constant(hadamard(mix), np.float32))
            value = b.op("Reshape", mixed, b.constant([0, size]))
        if like not in self._zero_points:
            self._zero_points[like] = b.op(
                "Expand", b.constant(MOST_LEVEL, np.uint8), b.op("Shape", like)
            )
        largest = b.op("ReduceMax", b.op("Abs", value), b.constant([1]), keepdims=0)
        scale = b.op("Mul", largest, b.constant(1 / MOST_LEVEL, np.float32))
        quantized = b.op("QuantizeLinear", value, scale, self._zero_points[like], axis=0)
        return Activation(value, quantized, b.op("Unsqueeze", scale, b.constant([1])), mix)

    def linear(
        self, name: str, x: Activation, matrix: Matrix, rows: NDArray[np.float32] | None = None
    ) -> str:
        """`[T, in] @ [in, out]`; `rows` [in] are factors on the rows of `matrix`."""
        if not self.precision.by_token:
            scaled = matrix if rows is None else matrix * rows[:, None]
            return self.b.op("MatMul", x.value, self._matrix(name, scaled))
        b = self.b
        if not b.has(name):
            self._write(name, *quantize_columns(matrix, rows, x.mix, paired=True))
        assert x.quantized is not None
        assert x.scale is not None
        product = b.op(
            "MatMulIntegerToFloat",
            x.quantized,
            name,
            b.constant(1.0, np.float32),
            f"{name}.scale",
            b.constant(MOST_LEVEL, np.uint8),
            domain="com.microsoft",
        )
        return b.op("Mul", product, x.scale)

    def head(
        self, name: str, x: Activation, table: Matrix, rows: NDArray[np.float32] | None = None
    ) -> str:
        """`[T, in] @ tableᵀ` in fp32, for a table `[out, in]`; `rows` [in] as in `linear`.

        Float precisions store the table as it is, so that it can also be the embedding, and ignore
        `rows`. Quantized ones use int8, even with int4 weights.
        """
        b = self.b
        if self.precision.weight_bits is None:
            weight = b.weight(name, table, DTYPES[b.data_type])
            return b.wide(b.op("Gemm", x.value, weight, transB=1))
        if self.precision.by_token:
            return self.linear(name, x, table.T, rows)
        return b.wide(b.op("MatMul", x.value, self._columns(name, table.T, rows)))

    def _matrix(self, name: str, matrix: Matrix) -> str:
        """`matrix` as a value in the type of the graph.

        int4 needs whole blocks; a matrix without them gets int8.
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
        if dtype == np.float16:  # TensorRT refuses a scale of 0, to which small ones would round
            scales = np.maximum(scales, np.finfo(np.float16).smallest_subnormal, dtype=np.float32)
        self.b.weight(name, weights)
        self.b.weight(f"{name}.scale", scales, dtype)
