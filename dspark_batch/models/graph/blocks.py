"""Graph blocks that target and draft share: norms, embeddings, RoPE, attention.

The T tokens of a call are flattened, `[T, hidden]`. Only attention has a cell for each row and
token, `[R, S]`, with S the length of the longest row in the call: `token_index` [R, S] is the
flattened token in each cell (any token in padding), `cell_index` [T] the cell of each token, as
`row * S + s`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.graph.builder import DTYPES, GraphBuilder

MAX_SUMMED = 128  # terms of a sum that MLAS (ONNX Runtime's CPU kernels) never splits
MASKED = -1.0e30  # added to the score of a masked key; finite, so that nothing becomes NaN

Matrix = NDArray[Any]


def rms_norm(b: GraphBuilder, x: str, name: str, weight: Matrix, epsilon: float) -> str:
    """RMSNorm over the last axis, in fp32."""
    scale = b.weight(name, weight, np.float32)
    return b.narrow(b.op("RMSNormalization", b.wide(x), scale, axis=-1, epsilon=epsilon))


def plain_norm(b: GraphBuilder, x: str, size: int, epsilon: float) -> str:
    """RMSNorm without a weight, over the last axis of length `size`, in fp32."""
    ones = b.constant(np.ones(size), np.float32)
    return b.narrow(b.op("RMSNormalization", b.wide(x), ones, axis=-1, epsilon=epsilon))


def soft_cap(b: GraphBuilder, x: str, cap: float | None) -> str:
    """cap * tanh(x / cap) of an fp32 value; None: `x` itself."""
    if cap is None:
        return x
    size = b.constant(cap, np.float32)
    return b.op("Mul", b.op("Tanh", b.op("Div", x, size)), size)


def embedding(b: GraphBuilder, table: str, tokens: str, data_type: int) -> str:
    """Rows of `table`, which has type `data_type`, in the type of the graph."""
    rows = b.op("Gather", table, tokens)
    return rows if data_type == b.data_type else b.op("Cast", rows, to=b.data_type)


def rope_tables(
    b: GraphBuilder, name: str, tables: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> tuple[str, str]:
    """cos and sin `[max, d/2]` as weights in the type of the graph."""
    dtype = DTYPES[b.data_type]
    cos, sin = (
        b.weight(f"{name}.{w}", t, dtype) for w, t in zip(("cos", "sin"), tables, strict=True)
    )
    return cos, sin


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
    """RoPE of `[R, heads, S, d]` at `positions` [R, S]; a pair lies d / 2 apart.

    `tables`: cos and sin, `[max, d/2]`.
    """
    return b.op("RotaryEmbedding", x, *tables, positions, interleaved=0)


def attention(b: GraphBuilder, q: str, keys: str, values: str, seen: str) -> str:
    """Attention as one node, for which TensorRT has a fused kernel; the result is shaped as `q`.

    `q` [R, heads, S, d], `keys` and `values` [R, kv, n, d], mask `seen` bool [R, 1, S, n]. On the
    CPU, ONNX Runtime is faster with `folded_scores`.
    """
    return b.op("Attention", q, keys, values, seen, scale=1.0)


def folded_scores(
    b: GraphBuilder, q: str, keys: str, *, head_dim: int, may_be_one_row: bool = False
) -> str:
    """`q` [R, kv, G*S, d] times `keys` [R, kv, n, d] transposed -> [R, kv, G*S, n].

    Sums of more than `MAX_SUMMED` terms are cut here. MLAS would cut them depending on n and the
    number of threads; then a score would depend on how many other keys there are, and the text of
    a row on the length of other rows. `may_be_one_row`: see `row_product`.
    """

    def product(q: str, keys: str) -> str:
        turned = b.op("Transpose", keys, perm=[0, 1, 3, 2])
        return row_product(b, q, turned, may_be_one_row=may_be_one_row)

    sizes = [min(MAX_SUMMED, head_dim - i) for i in range(0, head_dim, MAX_SUMMED)]
    if len(sizes) == 1:
        return product(q, keys)
    parts = [b.ops("Split", x, b.constant(sizes), outputs=len(sizes), axis=3) for x in (q, keys)]
    first, *others = (product(*pair) for pair in zip(*parts, strict=True))
    for other in others:
        first = b.op("Add", first, other)
    return first


def row_product(b: GraphBuilder, x: str, y: str, *, may_be_one_row: bool) -> str:
    """`x` [R, kv, M, n] times `y` [R, kv, n, k]; `may_be_one_row`: M can be 1.

    For M = 1, MLAS would take a kernel that rounds differently, and a plain step would no longer
    agree with a verification. So if M can be 1, the first row is multiplied twice.
    """
    if not may_be_one_row:
        return b.op("MatMul", x, y)
    begin, one, rows = b.constant([0]), b.constant([1]), b.constant([2])
    twice = b.op("Concat", x, b.op("Slice", x, begin, one, rows), axis=2)
    return b.op("Slice", b.op("MatMul", twice, y), begin, b.constant([-1]), rows)


def fold_queries(b: GraphBuilder, q: str, *, num_kv_heads: int, head_dim: int) -> str:
    """`[R, heads, S, d]` -> `[R, kv, G * S, d]`: the G query heads of a group share one product.

    On the CPU this reads each key once per group instead of once per head; `docs/design.md` says
    how much faster that is than `Attention` with grouped heads.
    """
    return b.op("Reshape", q, b.constant([0, num_kv_heads, -1, head_dim]))


def unfold_queries(b: GraphBuilder, x: str, *, num_heads: int, head_dim: int) -> str:
    """Inverse of `fold_queries`."""
    return b.op("Reshape", x, b.constant([0, num_heads, -1, head_dim]))


def activate(b: GraphBuilder, x: str, kind: str) -> str:
    """The activation function of an MLP: `silu` or `gelu_tanh`."""
    if kind == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if kind == "gelu_tanh":
        return b.op("Gelu", x, approximate="tanh")
    raise ValueError(f"unknown activation {kind!r}")
