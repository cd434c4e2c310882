"""SmoothQuant: move the outliers of an activation into the weight, before both become int8.

Channel j of a linear layer's input is divided by s_j and row j of its weight multiplied by it,
with s_j = sqrt(max|X_j| / max|W_j|) (Xiao et al. 2023, Eq. 4, alpha = 0.5). The product is the
same. The division costs nothing at run time: it goes into what produces the input: the norm's
weight, the value projection's columns, the up projection's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.reference import forward
from dspark_batch.models.spec import DecoderSpec

Array = NDArray[np.float32]
Tensor = Callable[[str], NDArray[Any]]
_SMALLEST = np.float32(1e-5)


def smoothing_factors(
    spec: DecoderSpec, tensor: Tensor, prompts: Sequence[Sequence[int]]
) -> dict[str, Array]:
    """s `[in]` of every linear layer, by the name of its input in `reference.forward`.

    The output projection's factors are equal within a group of query heads, which share a value.
    """
    largest: dict[str, Array] = {}
    weights: dict[str, Array] = {}

    def observe(name: str, x: Array, matrices: Sequence[Array]) -> None:
        largest[name] = np.abs(x).max(axis=0)
        weights[name] = np.max([np.abs(m).max(axis=0) for m in matrices], axis=0)

    forward(spec, tensor, prompts, observe=observe)
    factors = {
        name: np.sqrt(np.maximum(largest[name], _SMALLEST) / np.maximum(weights[name], _SMALLEST))
        for name in largest
    }
    shape = (spec.num_kv_heads, spec.group, spec.head_dim)
    for name in [name for name in factors if name.endswith(".o_proj")]:
        shared = factors[name].reshape(shape).max(axis=1, keepdims=True)
        factors[name] = np.broadcast_to(shared, shape).reshape(-1)
    return factors


class Smoothing:
    """The factors of one target; without any, every method returns its argument."""

    def __init__(self, factors: Mapping[str, Array] | None = None) -> None:
        self._factors = dict(factors or {})

    def multiply_rows(self, name: str, matrix: NDArray[Any]) -> NDArray[Any]:
        """`[in, out]` of the layer whose input is `name`."""
        return matrix * self._factors[name][:, None] if self._factors else matrix

    def divide(self, name: str, weight: NDArray[Any]) -> NDArray[Any]:
        """`[.., n]` of what produces the `n` channels of `name`: a norm, or columns."""
        return weight / self._factors[name] if self._factors else weight

    def divide_values(self, name: str, columns: NDArray[Any], spec: DecoderSpec) -> NDArray[Any]:
        """The value projection `[in, kv * d]` in front of the output projection `name`."""
        if not self._factors:
            return columns
        grouped = self._factors[name].reshape(spec.num_kv_heads, spec.group, spec.head_dim)
        return columns / grouped[:, 0].reshape(-1)
