"""A Hugging Face folder as `Weights`: safetensors, `config.json` and the tokenizer's files."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError, did_you_mean
from dspark_batch.models.weights.hf_config import normalized_config
from dspark_batch.models.weights.source import SPECIAL_TOKEN_NAMES, Weights, mapped

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_AGAIN = "download it again"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Formats that only the tokenizer's own class reads; transformers converts them to tokenizer.json.
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "spiece.model")

# Where a multimodal checkpoint has its text model: in transformers 5, and before it.
_TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    path: Path


class FolderWeights(Weights):
    """Weights in a folder. Invariant: every tensor lies wholly inside its file."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises EngineError if a file is missing or damaged."""
        self._folder = folder
        raw = _read_json(folder / "config.json")
        if raw is None:
            raise EngineError(
                f"{folder} has no config.json",
                hint="give a Hugging Face folder: config.json and *.safetensors",
            )
        _refuse_quantized(raw, folder)
        self.config = normalized_config(raw, origin=str(folder / "config.json"))
        generation = _read_json(folder / "generation_config.json") or {}
        self._tokenizer_config = _read_json(folder / "tokenizer_config.json") or {}
        shards = _shards(folder)
        unwrap = "outer_model_type" in self.config
        self._entries: dict[str, _Entry] = {}
        for shard in shards:
            for name, entry in _read_header(shard).items():
                public = _text_name(name) if unwrap else name
                if public in self._entries:
                    other = self._entries[public].path
                    raise EngineError(f"tensor {public} is in both {other} and {shard}")
                self._entries[public] = entry
        ids = generation.get("eos_token_id")
        self.stop_token_ids = _stop_ids(self.config.get("eos_token_id") if ids is None else ids)
        self.special_tokens = self._special_tokens()
        wanted = ("config.json", "generation_config.json", _INDEX, *_TOKENIZER_FILES)
        self.files = (*(folder / name for name in wanted if (folder / name).exists()), *shards)

    def names(self) -> list[str]:
        """See `Weights`. A draft keeps its own names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._entry(name).shape

    def tensor(self, name: str) -> NDArray[Any]:
        """See `Weights`: a read-only view of the mapped file."""
        entry = self._entry(name)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise EngineError(
                f"tensor {name} of {entry.path} is stored as {entry.dtype}, which is not supported",
                hint=f"supported: {', '.join(_DTYPES)}",
            )
        return mapped(entry.path, dtype, entry.shape, entry.offset)

    def tokenizer_json(self) -> str | None:
        """See `Weights`. Raises EngineError if the tokenizer is only there in another format."""
        path = self._folder / "tokenizer.json"
        if path.exists():
            return path.read_text(encoding="utf-8")
        slow = [name for name in _SLOW_TOKENIZER_FILES if (self._folder / name).exists()]
        if slow:
            raise EngineError(
                f"{self._folder} has {slow[0]} but no tokenizer.json",
                hint="convert it with transformers: AutoTokenizer.from_pretrained("
                f"{str(self._folder)!r}).save_pretrained({str(self._folder)!r})",
            )
        return None

    def chat_template(self) -> str | None:
        """See `Weights`. `chat_template.jinja` takes precedence over `tokenizer_config.json`."""
        path = self._folder / "chat_template.jinja"
        if path.exists():
            return path.read_bytes().decode("utf-8")
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):
            by_name = {item["name"]: item["template"] for item in template}
            template = by_name.get("default")
        return template

    def close(self) -> None:
        """See `Weights`."""
        self._entries = {}

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise EngineError(
                f"{self._folder} has no tensor {name}{did_you_mean(name, self._entries)}"
            )
        return entry

    def _special_tokens(self) -> dict[str, str]:
        found = (_read_json(self._folder / "special_tokens_map.json") or {}) | {
            key: value for key, value in self._tokenizer_config.items() if value is not None
        }
        tokens = {name: found[name] for name in SPECIAL_TOKEN_NAMES if found.get(name)}
        return {
            name: token["content"] if isinstance(token, dict) else str(token)
            for name, token in tokens.items()
        }


def _refuse_quantized(config: dict[str, Any], folder: Path) -> None:
    """Quantized weights are integers and scales: read as numbers they would make another model."""
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                method = part[key].get("quant_method", "unknown")
                raise EngineError(
                    f"{folder} is quantized: its config.json has a {key} (method {method!r}), "
                    "and no such format can be read",
                    hint="give the model's folder in bf16, fp16 or fp32, or a GGUF file",
                )


def _text_name(name: str) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _stop_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """The ids in `eos_token_id`, which is a number or a list, without duplicates."""
    if ids is None:
        return ()
    return tuple(dict.fromkeys(ids)) if isinstance(ids, list) else (ids,)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} is not a JSON object")
    return content


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint: those in the index, `model.safetensors`, or all.

    In that order, since a folder may hold a second copy of the weights in another layout.
    """
    index = _read_json(folder / _INDEX)
    if index is not None:
        shards = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise EngineError(
                f"{folder / _INDEX} names files that are missing: {', '.join(missing)}",
                hint=f"download them into {folder}",
            )
        if not shards:
            raise EngineError(f"{folder / _INDEX} names no files")
        return shards
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise EngineError(f"{folder} has no *.safetensors file")
    return shards


def _read_header(path: Path) -> dict[str, _Entry]:
    """Table of a safetensors file, which is: 8 bytes of length, JSON of that length, tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise EngineError(f"{path} is cut off: it has {size} bytes", hint=_AGAIN)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise EngineError(f"{path} is cut off or not a safetensors file", hint=_AGAIN)
        try:
            table = json.loads(file.read(length))
        except ValueError as error:
            raise EngineError(f"{path} is not a safetensors file: {error}") from error
    entries = {}
    for name, info in table.items():
        if name == "__metadata__":
            continue
        start, end = info["data_offsets"]
        shape = tuple(info["shape"])
        dtype = _DTYPES.get(info["dtype"])
        if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
            problem = f"{path} is damaged: the size of {name} does not fit its shape"
            raise EngineError(problem, hint=_AGAIN)
        if 8 + length + end > size:
            raise EngineError(f"{path} is cut off inside {name}", hint=_AGAIN)
        entries[name] = _Entry(info["dtype"], shape, 8 + length + start, path)
    return entries
