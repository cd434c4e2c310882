"""Device memory of a fixed place: buffers with a part per row, and what a step sends and fetches.

Nothing is allocated after an engine is open, so the same sizes always mean the same addresses, and
a captured graph stays right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.engine.runtimes.device import Device
from dspark_batch.engine.runtimes.plan_file import ALIGNMENT, ITEM_SIZES, PlanFile, Shapes

_HOST_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


class RowBuffer:
    """One tensor `[rows, ...]` on the device; a step takes rows that lie side by side."""

    def __init__(self, device: Device, num_rows: int, row_bytes: int) -> None:
        self._device = device
        self._row_bytes = row_bytes
        self._address = device.allocate(num_rows * row_bytes)

    def address(self, row: int) -> int:
        """Where `row` begins."""
        return self._address + row * self._row_bytes

    def zero(self, row: int) -> None:
        """Enqueue zeros for a row."""
        self._device.zero(self.address(row), self._row_bytes)

    def copy(self, target: int, source: int) -> None:
        """Enqueue a copy of row `source` over row `target`."""
        self._device.copy(self.address(target), self.address(source), self._row_bytes)


class Caches:
    """The KV caches of one plan, `[rows, kv, capacity, d]` each, past and present in one place."""

    def __init__(self, device: Device, plan: PlanFile, num_rows: int) -> None:
        self._buffers = {
            name.removeprefix("past_"): RowBuffer(device, num_rows, tensor.num_bytes(shape))
            for name, tensor in plan.inputs.items()
            if name.startswith("past_")
            for shape in [tensor.shape[1:]]
        }
        self._shapes = {name: plan.inputs[f"past_{name}"].shape[1:] for name in self._buffers}
        self.capacity = next(iter(self._shapes.values()))[1]
        """Tokens of a row."""

    def addresses(self, first: int) -> dict[str, int]:
        """Of a step whose first row is `first`."""
        return {
            f"{time}_{name}": buffer.address(first)
            for name, buffer in self._buffers.items()
            for time in ("past", "present")
        }

    def shapes(self, num_rows: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs of a step."""
        return {f"past_{name}": (num_rows, *shape) for name, shape in self._shapes.items()}

    def zero(self, row: int) -> None:
        """Enqueue zeros for a row: a masked key must be finite, since 0 * NaN is NaN."""
        for buffer in self._buffers.values():
            buffer.zero(row)

    def move(self, target: int, source: int) -> None:
        """Enqueue a copy of a row, with what lies behind its tokens: that is finite where they are.

        What lay there in the other row need not be.
        """
        for buffer in self._buffers.values():
            buffer.copy(target, source)


class Staging:
    """Small arrays of a step in one piece of pinned memory and its twin on the device."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device = device
        self._host = device.pinned(num_bytes)
        self._address = device.allocate(num_bytes)

    def send(self, arrays: Mapping[str, NDArray[Any]], plan: PlanFile) -> dict[str, int]:
        """Enqueue one copy of all arrays, as the types that the plan has; their addresses."""
        types = {name: plan.inputs[name].dtype for name in arrays}
        offsets, end = _offsets({name: array.shape for name, array in arrays.items()}, types)
        for name, array in arrays.items():
            found = self._view(offsets[name], array.shape, types[name])
            found[...] = array
        self._device.upload(self._address, self._host[:end])
        return {name: self._address + offset for name, offset in offsets.items()}

    def places(self, shapes: Shapes, plan: PlanFile) -> dict[str, int]:
        """Addresses for outputs that `fetch` will read."""
        types = {name: plan.outputs[name].dtype for name in shapes}
        return {name: self._address + n for name, n in _offsets(shapes, types)[0].items()}

    def fetch(self, shapes: Shapes, plan: PlanFile) -> dict[str, NDArray[Any]]:
        """Wait for the step, and read its outputs by one copy."""
        types = {name: plan.outputs[name].dtype for name in shapes}
        offsets, end = _offsets(shapes, types)
        self._device.download(self._host[:end], self._address)
        self._device.synchronize()
        return {
            name: self._view(offsets[name], shape, types[name]).copy()
            for name, shape in shapes.items()
        }

    def _view(self, offset: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        num_bytes = ITEM_SIZES[dtype] * math.prod(shape)
        found: NDArray[Any] = self._host[offset : offset + num_bytes].view(host_type(dtype))
        return found.reshape(shape)


def host_type(dtype: str) -> Any:
    """NumPy's type for TensorRT's."""
    if dtype == "BF16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return _HOST_TYPES[dtype]


def staged_bytes(plan: PlanFile, names: Collection[str]) -> int:
    """Room for these inputs in any step."""
    most = {name: plan.most(name) for name in names}
    return _offsets(most, {name: plan.inputs[name].dtype for name in names})[1]


def _offsets(shapes: Shapes, types: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and where the last one ends."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        size = ITEM_SIZES[types[name]] * math.prod(shape)
        end += max(-(-size // ALIGNMENT), 1) * ALIGNMENT
    return offsets, end
