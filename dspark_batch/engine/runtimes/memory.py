"""Memory for the tensors that ONNX Runtime keeps from one step to the next.

Caches, context and draft logits are arrays of one `Memory`: NumPy's on the host, or addresses on a
GPU. The code that moves them is the same; only small arrays are copied between host and GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

_GRAIN = 64  # tokens by which a host buffer's capacity is rounded up

HostArray = NDArray[Any]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A contiguous array in device memory; indexing its first axis gives a view."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: ort.OrtValue
    """Holds the memory as long as a view of it is there."""

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            shape = (max(end - begin, 0), *self.shape[1:])
        else:
            begin, shape = index, self.shape[1:]
        return replace(self, address=self.address + begin * row_bytes, shape=shape)


Array = Any
"""What a `Memory` makes: `HostArray` or `DeviceArray`."""


class Memory(Protocol):
    """One place for arrays. All methods give and take arrays of this place, but for `fetch`."""

    device: str
    """As ONNX Runtime calls it."""

    def capacity(self, needed: int, limit: int) -> int:
        """Tokens that a cache buffer gets where `needed` of at most `limit` are asked for."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array."""

    def copy(self, target: Array, source: Array) -> None:
        """Copy cells `[..., capacity, d]`, as many of a row's tokens as both have room for."""

    def clear(self, target: Array) -> None:
        """Fill with zeros."""

    def concatenate(self, parts: Sequence[Array]) -> Array:
        """Parts `[n, ...]` one after the other; at least one."""

    def fetch(self, source: Array) -> HostArray:
        """The values, for the host; perhaps a view."""

    def received(self, value: ort.OrtValue) -> Array:
        """The array of an output that was bound to this place."""

    def bind_input(self, binding: ort.IOBinding, name: str, array: Array) -> None:
        """Let a graph read an array."""

    def bind_output(self, binding: ort.IOBinding, name: str, array: Array) -> None:
        """Let a graph write into an array."""


class HostMemory:
    """NumPy arrays. Attention costs by capacity here, so buffers have just what rows need."""

    device = "cpu"

    def capacity(self, needed: int, limit: int) -> int:
        """In steps of 64 tokens."""
        return -(-needed // _GRAIN) * _GRAIN

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> HostArray:
        """As `Memory.zeros`."""
        return np.zeros(shape, dtype)

    def copy(self, target: HostArray, source: HostArray) -> None:
        """As `Memory.copy`."""
        kept = min(target.shape[-2], source.shape[-2])
        target[..., :kept, :] = source[..., :kept, :]

    def clear(self, target: HostArray) -> None:
        """As `Memory.clear`."""
        target[...] = 0.0

    def concatenate(self, parts: Sequence[HostArray]) -> HostArray:
        """As `Memory.concatenate`."""
        return np.concatenate(parts)

    def fetch(self, source: HostArray) -> HostArray:
        """The array itself."""
        return source

    def received(self, value: ort.OrtValue) -> HostArray:
        """As `Memory.received`."""
        found: HostArray = value.numpy()
        return found

    def bind_input(self, binding: ort.IOBinding, name: str, array: HostArray) -> None:
        """As `Memory.bind_input`."""
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        binding.bind_ortvalue_input(name, value)

    def bind_output(self, binding: ort.IOBinding, name: str, array: HostArray) -> None:
        """As `Memory.bind_output`; the array must be contiguous."""
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))


class DeviceMemory:
    """Memory of the first device of a kind, allocated and copied by ONNX Runtime itself.

    A copy is a graph of one node, bound to addresses: it needs no library beside ONNX Runtime, and
    is over when the call is. Buffers have their bucket's limit at once, because to grow would be
    to copy every key head of every row by itself.
    """

    def __init__(self, device: str, session: ort.InferenceSession) -> None:
        """`session` executes `models.graph.copy_graph` on `device`."""
        self.device = device
        self._session = session
        self._binding = session.io_binding()

    def capacity(self, needed: int, limit: int) -> int:
        """All that a row of the bucket can need."""
        return max(needed, limit)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """As `Memory.zeros`."""
        value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self.device, 0)
        return DeviceArray(value.data_ptr(), shape, np.dtype(dtype), value)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """As `Memory.copy`."""
        if target.shape == source.shape:
            self._move(target, source)
        elif len(target.shape) > 2:
            for i in range(len(target)):
                self.copy(target[i], source[i])
        else:
            kept = min(len(target), len(source))
            self._move(target[:kept], source[:kept])

    def clear(self, target: DeviceArray) -> None:
        """As `Memory.clear`."""
        self._move(target, self.zeros(target.shape, target.dtype))

    def concatenate(self, parts: Sequence[DeviceArray]) -> DeviceArray:
        """As `Memory.concatenate`; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        result = self.zeros((sum(map(len, parts)), *first.shape[1:]), first.dtype)
        begin = 0
        for part in parts:
            self._move(result[begin : begin + len(part)], part)
            begin += len(part)
        return result

    def fetch(self, source: DeviceArray) -> HostArray:
        """A copy of the values."""
        found = np.zeros(source.shape, source.dtype)
        if source.nbytes:
            flat = ort.OrtValue.ortvalue_from_numpy(found.reshape(-1).view(np.uint8))
            self._bind(self._binding.bind_input, "source", source)
            self._binding.bind_ortvalue_output("target", flat)
            self._session.run_with_iobinding(self._binding)
        return found

    def received(self, value: ort.OrtValue) -> DeviceArray:
        """As `Memory.received`."""
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.data_type()]
        return DeviceArray(value.data_ptr(), tuple(value.shape()), np.dtype(dtype), value)

    def bind_input(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """As `Memory.bind_input`."""
        if array.nbytes:
            place = (self.device, 0, array.dtype, array.shape, array.address)
            binding.bind_input(name, *place)
        else:  # which has no address
            empty = ort.OrtValue.ortvalue_from_numpy(np.zeros(array.shape, array.dtype))
            binding.bind_ortvalue_input(name, empty)

    def bind_output(self, binding: ort.IOBinding, name: str, array: DeviceArray) -> None:
        """As `Memory.bind_output`."""
        binding.bind_output(name, self.device, 0, array.dtype, array.shape, array.address)

    def _move(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy all of an array into one of as many bytes."""
        if source.nbytes:
            self._bind(self._binding.bind_input, "source", source)
            self._bind(self._binding.bind_output, "target", target)
            self._session.run_with_iobinding(self._binding)

    def _bind(self, bind: Any, name: str, array: DeviceArray) -> None:
        bind(name, self.device, 0, np.uint8, (array.nbytes,), array.address)
