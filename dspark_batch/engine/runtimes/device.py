"""The GPU behind one small door: memory, copies, one stream, captured graphs.

Addresses are plain integers, as TensorRT takes them. Everything is enqueued on the device's one
stream, in order; the host waits in `synchronize` only. Tests put a device of host memory in place
of `CudaDevice`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.engine import Gpus, find_gpus
from dspark_batch.errors import EngineError

Bytes = NDArray[np.uint8]
_LEAST_CUDA = 13


class Device(Protocol):
    """One GPU and one stream. What it allocated lives until `close`."""

    stream: int

    def allocate(self, num_bytes: int) -> int:
        """Address of zeroed device memory.

        Raises:
            EngineError: there is no room.
        """

    def pinned(self, num_bytes: int) -> Bytes:
        """Page-locked host memory, from which copies do not wait for the host."""

    def upload(self, target: int, source: Bytes) -> None:
        """Enqueue a copy from pinned memory to the device."""

    def download(self, target: Bytes, source: int) -> None:
        """Enqueue a copy from the device; `target` holds it after `synchronize`."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Enqueue a copy within the device."""

    def zero(self, target: int, num_bytes: int) -> None:
        """Enqueue zeros."""

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream, as a graph and not run; None if it can't be one."""

    def replay(self, graph: Any) -> None:
        """Enqueue a captured graph."""

    def free_bytes(self) -> int:
        """Free device memory."""

    def close(self) -> None:
        """Free everything."""


class CudaDevice:
    """`Device` on the first visible GPU, by the CUDA runtime of cuda-bindings."""

    def __init__(self, cudart: Any = None) -> None:
        self._cudart = cudart or import_cudart()
        self._allocated: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        self._checked("cudaSetDevice", 0)
        flags = self._cudart.cudaStreamNonBlocking
        self._stream = self._checked("cudaStreamCreateWithFlags", flags)
        self.stream = int(self._stream)

    def _checked(self, name: str, *arguments: Any) -> Any:
        """The value of a CUDA call."""
        status, *values = getattr(self._cudart, name)(*arguments)
        if int(status) != 0:
            self._cudart.cudaGetLastError()  # or later calls report it again
            raise EngineError(f"the GPU refused {name}: {_described(self._cudart, status)}")
        return values[0] if values else None

    def allocate(self, num_bytes: int) -> int:
        """As `Device.allocate`."""
        try:
            address = int(self._checked("cudaMalloc", num_bytes))
        except EngineError as problem:
            raise EngineError(
                f"no room for {num_bytes / 1e9:.1f} GB on the GPU, where "
                f"{self.free_bytes() / 1e9:.1f} GB are free ({problem})",
                hint="run fewer rows at a time: --max-rows N",
            ) from problem
        self._allocated.append(address)
        self.zero(address, num_bytes)
        return address

    def pinned(self, num_bytes: int) -> Bytes:
        """As `Device.pinned`."""
        address = int(self._checked("cudaMallocHost", num_bytes))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def upload(self, target: int, source: Bytes) -> None:
        """As `Device.upload`."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target, source.ctypes.data, source.nbytes, kind)

    def download(self, target: Bytes, source: int) -> None:
        """As `Device.download`."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, source, target.nbytes, kind)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """As `Device.copy`."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, num_bytes, kind)

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        self._checked("cudaMemcpyAsync", target, source, num_bytes, kind, self._stream)

    def zero(self, target: int, num_bytes: int) -> None:
        """As `Device.zero`."""
        self._checked("cudaMemsetAsync", target, 0, num_bytes, self._stream)

    def synchronize(self) -> None:
        """As `Device.synchronize`."""
        self._checked("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """As `Device.capture`."""
        cudart, modes = self._cudart, self._cudart.cudaStreamCaptureMode
        mode = modes.cudaStreamCaptureModeThreadLocal
        self._checked("cudaStreamBeginCapture", self._stream, mode)
        refused = False
        try:
            enqueue()
        except EngineError:
            refused = True
        status, graph = cudart.cudaStreamEndCapture(self._stream)
        if int(status) != 0:
            cudart.cudaGetLastError()
            return None
        try:
            if refused:
                return None
            self._graphs.append(self._checked("cudaGraphInstantiate", graph, 0))
        finally:
            self._checked("cudaGraphDestroy", graph)
        return self._graphs[-1]

    def replay(self, graph: Any) -> None:
        """As `Device.replay`."""
        self._checked("cudaGraphLaunch", graph, self._stream)

    def free_bytes(self) -> int:
        """As `Device.free_bytes`."""
        status, free, _ = self._cudart.cudaMemGetInfo()
        return int(free) if int(status) == 0 else 0

    def close(self) -> None:
        """As `Device.close`."""
        for graph in self._graphs:
            self._checked("cudaGraphExecDestroy", graph)
        for address in self._allocated:
            self._checked("cudaFree", address)
        for address in self._pinned:
            self._checked("cudaFreeHost", address)
        self._checked("cudaStreamDestroy", self._stream)
        self._graphs, self._allocated, self._pinned = [], [], []


def import_cudart() -> Any:
    """`cuda.bindings.runtime`.

    Raises:
        EngineError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            "cuda-bindings is not installed", hint='pip install "dspark-batch[tensorrt-rtx]"'
        ) from error
    return runtime


def usable_gpus() -> Gpus:
    """The GPUs that a program started here sees: at least one, with a driver that is new enough.

    Raises:
        EngineError: there is none, or its driver is too old.
    """
    found = find_gpus()
    if not found.gpus:
        raise EngineError(
            f"no GPU to run TensorRT engines on: {found.problem}",
            hint="look with nvidia-smi, or build an engine for the CPU: dspark-batch export model",
        )
    if int((found.cuda or "0").split(".")[0]) < _LEAST_CUDA:
        raise EngineError(
            f"the NVIDIA driver is for CUDA {found.cuda}, and TensorRT needs CUDA {_LEAST_CUDA}",
            hint="install driver 580 or newer, and look with nvidia-smi",
        )
    return found


def _described(cudart: Any, status: Any) -> str:
    text = cudart.cudaGetErrorString(status)[1]
    return text.decode() if isinstance(text, bytes) else str(text)
