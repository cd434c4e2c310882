"""SmoothQuant: move outliers from an activation into the weight, before both become int8.

Channel j of a linear layer's input is divided by s_j, and row j of its weight multiplied by it,
with s_j = sqrt(max|X_j| / max|W_j|) (Xiao et al. 2023, Eq. 4, alpha = 0.5). The product stays the
same. The division costs nothing at run time, because it is folded into what produces the input:
the norm's weight, the columns of the value projection or those of the up projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.reference import row_blocks
from dspark_batch.models.spec import DecoderSpec, LayerSpec

Array = NDArray[np.float32]
_SMALLEST = np.float32(1e-5)


class Outliers:
    """Largest values of each linear layer; give it to `reference.forward` as `observe`."""

    def __init__(self) -> None:
        self._largest: dict[str, Array] = {}
        self._weights: dict[str, Array] = {}

    def __call__(self, name: str, x: Array, matrices: Sequence[NDArray[Any]]) -> None:
        """Record the largest absolute value of each channel, in the input and in the weights."""
        self._largest[name] = np.abs(x).max(axis=0)
        self._weights[name] = np.max(
            [np.abs(block).max(axis=0) for m in matrices for _, block in row_blocks(m)], axis=0
        )

    def factors(self, spec: DecoderSpec) -> dict[str, Array]:
        """s `[in]` of each linear layer, by the name that `forward` gives it.

        Those of the output projection are equal within a group of query heads, which share a
        value head. They are 1 if values are normed after their projection, since then no weight
        in front can take the division.
        """
        factors = {
            name: np.sqrt(np.maximum(largest, _SMALLEST) / np.maximum(weights, _SMALLEST))
            for (name, largest), weights in zip(
                self._largest.items(), self._weights.values(), strict=True
            )
        }
        for i, layer in enumerate(spec.layers):
            name = f"model.layers.{i}.self_attn.o_proj"
            shape = (layer.num_kv_heads, spec.group(layer), layer.head_dim)
            shared = factors[name].reshape(shape).max(axis=1, keepdims=True)
            factors[name] = np.broadcast_to(shared, shape).reshape(-1)
            if spec.v_norm:
                factors[name] = np.ones_like(factors[name])
        return factors


class Smoothing:
    """Smoothing factors of one target. Without factors, nothing is scaled."""

    def __init__(self, factors: Mapping[str, Array] | None = None) -> None:
        self._factors = dict(factors or {})

    def rows(self, name: str) -> Array | None:
        """Factors on the rows of weight `[in, out]` of linear layer `name`; None: no scaling."""
        return self._factors.get(name)

    def divide(self, name: str, weight: NDArray[Any]) -> NDArray[Any]:
        """`weight` `[.., n]` over the factors of `name`, whose n input channels it produces."""
        return weight / self._factors[name] if self._factors else weight

    def divide_values(
        self, name: str, columns: NDArray[Any], spec: DecoderSpec, layer: LayerSpec
    ) -> NDArray[Any]:
        """Value projection `[in, kv * d]` over the factors of the output projection `name`."""
        if not self._factors:
            return columns
        grouped = self._factors[name].reshape(layer.num_kv_heads, spec.group(layer), layer.head_dim)
        return columns / grouped[:, 0].reshape(-1)
