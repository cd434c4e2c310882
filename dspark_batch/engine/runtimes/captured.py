"""Steps at fixed addresses: what ONNX Runtime can capture as a CUDA graph and replay.

A captured graph reads and writes the addresses that it was captured with. So all that a step is
told goes through one small buffer, its inbox, and all that the host wants to know through its
outbox; weights, caches and whatever stays between steps are `Tensor`s that were placed before. On
the CPU the same code runs on NumPy's memory, without capture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.models.graph import (
    BFLOAT16,
    DTYPES,
    FLOAT,
    INT32,
    INT64,
    WeightPlace,
    clear_graph,
)

_DTYPES: dict[int, Any] = {**DTYPES, INT32: np.int32, INT64: np.int64}
_ALIGNMENT = 64  # bytes
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous tensor at a fixed address."""

    address: int
    data_type: int
    shape: Shape
    owner: Any
    """Holds the memory."""

    def view(self, shape: Shape, *, offset: int = 0) -> Tensor:
        """A part of it, from an offset in bytes on."""
        return Tensor(self.address + offset, self.data_type, shape, self.owner)

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return math.prod(self.shape) * int(np.dtype(_DTYPES[self.data_type]).itemsize)


class Heap:
    """Memory of one device: `cpu`, or `cuda`, which is ONNX Runtime's first GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._clear: ort.InferenceSession | None = None

    def empty(self, data_type: int, shape: Shape) -> Tensor:
        """A new tensor, zeroed: a masked value must be finite, since 0 * NaN is NaN."""
        num_bytes = math.prod(shape) * np.dtype(_DTYPES[data_type]).itemsize
        num_bytes = -(-num_bytes // 8) * 8
        if self.device == "cpu":
            array = np.zeros(num_bytes, np.uint8)
            return Tensor(array.ctypes.data, data_type, shape, array)
        value = ort.OrtValue.ortvalue_from_shape_and_type([num_bytes], np.uint8, self.device, 0)
        tensor = Tensor(value.data_ptr(), data_type, shape, value)
        self.clear(tensor)
        return tensor

    def placed(self, array: NDArray[Any], data_type: int) -> Tensor:
        """A tensor with these values."""
        octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self.device == "cpu":
            octets = octets.copy() if not octets.flags.owndata else octets
            return Tensor(octets.ctypes.data, data_type, array.shape, octets)
        value = ort.OrtValue.ortvalue_from_numpy(octets, self.device, 0)
        return Tensor(value.data_ptr(), data_type, array.shape, value)

    def write(self, tensor: Tensor, octets: NDArray[np.uint8]) -> None:
        """Overwrite a whole tensor of `empty`."""
        if self.device == "cpu":
            tensor.owner[:] = octets
        else:
            tensor.owner.update_inplace(octets)

    def read(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The bytes of a whole tensor of `empty`."""
        found: NDArray[np.uint8] = (
            tensor.owner.copy() if self.device == "cpu" else tensor.owner.numpy()
        )
        return found

    def clear(self, tensor: Tensor) -> None:
        """Fill with zeros."""
        num_words = -(-tensor.nbytes // 8)
        if not num_words:
            return
        if self._clear is None:
            self._clear = open_graph(clear_graph(), self.device, capture=False)
        binding = self._clear.io_binding()
        binding.bind_cpu_input("n", np.array([num_words], np.int64))
        place = (self.device, 0, INT64, (num_words,), tensor.address)
        binding.bind_output("target", *place)
        self._clear.run_with_iobinding(binding)


def open_graph(model: bytes, device: str, *, capture: bool, threads: int = 0) -> Any:
    """A session, of which every node has a kernel on the device.

    Raises:
        EngineError: a node has none, or the device's libraries cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if device == "cpu":
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # A node on the CPU would end capture without a word, and every step would cost three times as
    # much: then this fails.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {"enable_cuda_graph": "1" if capture else "0"}
    try:
        session = ort.InferenceSession(
            model, options, providers=[("CUDAExecutionProvider", settings)], enable_fallback=False
        )
    except Exception as problem:  # ORT's exceptions have no common public base
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot run this graph on the GPU alone: {problem}",
            hint='pip install --upgrade "dspark-batch[gpu]"',
        ) from problem
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise EngineError(
            "ONNX Runtime could not load the libraries of its CUDA provider",
            hint='pip install "onnxruntime-gpu[cuda,cudnn]"',
        )
    return session


def read_weight(folder: Path, place: WeightPlace, *, wide: bool) -> tuple[NDArray[Any], int]:
    """A weight from its data file, and its type; bfloat16 as fp32 if `wide`."""
    octets = np.memmap(folder / place.file, np.uint8, "r", place.offset, (place.length,))
    array: NDArray[Any] = octets.view(_DTYPES[place.data_type]).reshape(place.shape)
    if wide and place.data_type == BFLOAT16:
        return array.astype(np.float32), FLOAT
    return array, place.data_type


class BoundStep:
    """A graph with shapes and addresses fixed: fill in `sent`, run, read what comes back."""

    def __init__(
        self,
        session: Any,
        heap: Heap,
        *,
        sent: Mapping[str, tuple[int, Shape]],
        fetched: Mapping[str, tuple[int, Shape]],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        bounds: Mapping[str, Sequence[int]],
        graph_id: int = -1,
    ) -> None:
        """`bounds` are inputs in host memory that never change; `graph_id` -1 is not captured."""
        self._session, self._heap = session, heap
        places, size = _offsets(sent)
        self._host = np.zeros(size, np.uint8)
        self._inbox = heap.empty(INT64, (size // 8,))
        self.sent: dict[str, NDArray[Any]] = {
            name: self._host[at : at + n].view(_DTYPES[sent[name][0]]).reshape(sent[name][1])
            for name, (at, n) in places.items()
        }
        self._fetched, out_size = _offsets(fetched)
        self._types = fetched
        self._outbox = heap.empty(INT64, (out_size // 8,))
        # Kept: the binding holds addresses only.
        self._held = (inputs, outputs, {n: np.array(v, np.int32) for n, v in bounds.items()})
        self._binding = session.io_binding()
        known = {value.name for value in session.get_inputs()}
        for name, (at, _) in places.items():
            kind, shape = sent[name]
            if name in known:
                self._bind(self._binding.bind_input, name, kind, shape, self._inbox.address + at)
        for name, tensor in inputs.items():
            if name in known:
                bind = self._binding.bind_input
                self._bind(bind, name, tensor.data_type, tensor.shape, tensor.address)
        for name, values in self._held[2].items():
            self._binding.bind_cpu_input(name, values)
        for name, (at, _) in self._fetched.items():
            kind, shape = fetched[name]
            bind = self._binding.bind_output
            self._bind(bind, name, kind, shape, self._outbox.address + at)
        for name, tensor in outputs.items():
            bind = self._binding.bind_output
            self._bind(bind, name, tensor.data_type, tensor.shape, tensor.address)
        self._options = ort.RunOptions()
        self._options.log_severity_level = 3
        if heap.device != "cpu":
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))

    def run(self) -> dict[str, NDArray[Any]]:
        """Send, execute, fetch."""
        self._heap.write(self._inbox, self._host)
        self._session.run_with_iobinding(self._binding, self._options)
        octets = self._heap.read(self._outbox)
        return {
            name: octets[at : at + n]
            .view(_DTYPES[self._types[name][0]])
            .reshape(self._types[name][1])
            for name, (at, n) in self._fetched.items()
        }

    def _bind(self, bind: Any, name: str, kind: int, shape: Shape, address: int) -> None:
        bind(name, self._heap.device, 0, kind, shape, address)


def _offsets(fields: Mapping[str, tuple[int, Shape]]) -> tuple[dict[str, tuple[int, int]], int]:
    """Offset and length in bytes of each tensor, and the length of all."""
    places, end = {}, 0
    for name, (kind, shape) in fields.items():
        length = math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize
        places[name] = (end, length)
        end += -(-max(length, 1) // _ALIGNMENT) * _ALIGNMENT
    return places, max(end, _ALIGNMENT)


def rounded_up(sizes: Sequence[int], wanted: int) -> int:
    """The least of ascending `sizes` that has room."""
    return next(size for size in sizes if size >= wanted)


def powers_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most` itself."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)
