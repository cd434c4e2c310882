"""The GGUF format: metadata, tensor table and values of a memory-mapped file.

See ggml's `docs/gguf.md`; versions 2 and 3, little-endian. The `gguf` package dequantizes, but the
header is parsed here: `gguf.GGUFReader` makes one array per metadata element, which takes ten
seconds for a vocabulary of 262,144 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.models.weights.source import mapped

_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Type of a metadata value -> its code in struct and NumPy.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies and how it is stored."""

    shape: tuple[int, ...]
    """Row-major, as in NumPy and Hugging Face; the file lists dimensions in reverse."""
    kind: int
    """A `gguf.GGMLQuantizationType`."""
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file. Invariant: every tensor lies inside the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> GGUFHeader:
    """Parse the header. Raises EngineError for another format or version, or a cut-off file."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _Parser(path, buffer).header()
        except (struct.error, UnicodeDecodeError) as error:
            problem = f"{path} is cut off or damaged: {error}"
            raise EngineError(problem, hint="download it again") from error


def read_values(header: GGUFHeader, name: str) -> NDArray[Any]:
    """Values of a tensor, by its name in the file: as stored, or dequantized to float32."""
    import gguf

    entry = header.tensors[name]
    kinds = gguf.GGMLQuantizationType
    plain = {
        kinds.F64: np.dtype("<f8"),
        kinds.F32: np.dtype("<f4"),
        kinds.F16: np.dtype("<f2"),
        kinds.BF16: np.dtype(ml_dtypes.bfloat16),
    }
    kind = kinds(entry.kind)
    if kind in plain:
        return mapped(header.path, plain[kind], entry.shape, entry.offset)
    row_bytes = entry.num_bytes // math.prod(entry.shape[:-1])
    blocks = mapped(header.path, np.uint8, (*entry.shape[:-1], row_bytes), entry.offset)
    try:
        values = gguf.dequantize(blocks, kind)
    except NotImplementedError as error:
        raise EngineError(
            f"tensor {name} of {header.path} is quantized as {kind.name}, which the gguf package "
            "cannot dequantize",
            hint="use a file with another quantization, such as Q8_0",
        ) from error
    return np.asarray(values, np.float32).reshape(entry.shape)


class _Parser:
    """Reads the mapped file from front to back."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._position = 0

    def header(self) -> GGUFHeader:
        magic, version = self._unpack("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise EngineError(f"{self._path} is not a little-endian GGUF file of version 2 or 3")
        num_tensors, num_pairs = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            metadata[key] = self._value(self._unpack("I")[0])
        table = [self._table_row() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        start = math.ceil(self._position / alignment) * alignment
        tensors = {
            name: self._entry(name, shape, kind, start + offset)
            for name, shape, kind, offset in table
        }
        return GGUFHeader(self._path, metadata, tensors)

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        import gguf

        try:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise EngineError(
                f"tensor {name} of {self._path} has the unknown type {kind}",
                hint="pip install --upgrade gguf",
            ) from error
        num_bytes = math.prod(shape) // block_size * block_bytes
        if shape[-1] % block_size or offset + num_bytes > len(self._buffer):
            raise EngineError(f"{self._path} is cut off inside {name}", hint="download it again")
        return TensorEntry(shape, kind, offset, num_bytes)

    def _table_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dimensions,) = self._unpack("I")
        dimensions = self._unpack(f"{num_dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, dimensions[::-1], kind, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element_kind, count = self._unpack("IQ")
            if element_kind in _SCALARS:
                return self._numbers(_SCALARS[element_kind], count)
            return [self._value(element_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise EngineError(f"{self._path} has metadata of the unknown type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _numbers(self, code: str, count: int) -> list[Any]:
        dtype = np.dtype("<" + code)
        start = self._position
        self._position += count * dtype.itemsize
        if self._position > len(self._buffer):
            raise struct.error("an array goes past the end")
        return np.frombuffer(self._buffer, dtype, count, start).tolist() if count else []

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._position
        self._position += length
        if self._position > len(self._buffer):
            raise struct.error("a string goes past the end")
        return self._buffer[start : self._position].decode("utf-8")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._buffer, self._position)
        self._position += struct.calcsize("<" + layout)
        return values
