"""A GGUF file as `Weights`, with Hugging Face names, config and values.

llama.cpp's converter changes three things, which are undone here: tensor names; the row order of
query and key projections in Llama, where it interleaves the rotary pairs; and norm weights in
Gemma, which it stores as 1 + weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError, did_you_mean
from dspark_batch.models.weights.gguf_families import (
    FAMILIES,
    GLOBAL_NAMES,
    ROPE_FACTORS,
    Family,
    config_from_metadata,
)
from dspark_batch.models.weights.gguf_format import GGUFHeader, read_header, read_values
from dspark_batch.models.weights.hf_config import normalized_config
from dspark_batch.models.weights.source import Weights

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")
_SPECIAL_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class GGUFWeights(Weights):
    """Weights in a GGUF file. Invariant: each of its tensors has a Hugging Face name."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises EngineError for an unknown architecture or tensor."""
        header = read_header(path)
        architecture = header.metadata.get("general.architecture")
        if architecture not in FAMILIES:
            raise EngineError(
                f"{path} has the GGUF architecture {architecture!r}, which is not supported",
                hint=f"supported: {', '.join(sorted(FAMILIES))}",
            )
        if header.metadata.get("split.count", 0) > 1:
            raise EngineError(
                f"{path} is one part of several",
                hint="merge them: llama-gguf-split --merge FIRST_PART.gguf MERGED.gguf",
            )
        self._header = header
        self._architecture: str = architecture
        self._family = FAMILIES[architecture]
        self._sources = _hf_names(header, self._family)
        self.files = (path,)
        self.special_tokens = _special_tokens(header.metadata)
        self.stop_token_ids = _stop_token_ids(header.metadata)
        self.config = normalized_config(
            config_from_metadata(header, architecture), origin=str(path)
        )

    def names(self) -> list[str]:
        """See `Weights`."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._header.tensors[self._source(name)].shape

    def tensor(self, name: str) -> NDArray[Any]:
        """See `Weights`: the values that the Hugging Face checkpoint has, float32 if quantized."""
        source = self._source(name)
        values = read_values(self._header, source)
        part = source.split(".")[-2]
        if part in self._family.permuted:
            is_query = part == "attn_q"
            heads = self.config["num_attention_heads" if is_query else "num_key_value_heads"]
            return _uninterleaved(values, heads)
        if self._family.norm_offset and part.endswith("_norm"):
            # In float32: near 1, a half type is too coarse for the difference.
            return values.astype(np.float32) - np.float32(self._family.norm_offset)
        return values

    def tokenizer_json(self) -> str | None:
        """See `Weights`: rebuilt from the vocabulary in the metadata."""
        if "tokenizer.ggml.tokens" not in self._header.metadata:
            return None
        from dspark_batch.models.weights.gguf_tokenizer import tokenizer_json

        return tokenizer_json(
            self._header.metadata, architecture=self._architecture, origin=str(self._header.path)
        )

    def chat_template(self) -> str | None:
        """See `Weights`."""
        return self._header.metadata.get("tokenizer.chat_template")

    def close(self) -> None:
        """See `Weights`."""
        self._sources = {}

    def _source(self, name: str) -> str:
        """Name of a tensor in the file."""
        if name not in self._sources:
            raise EngineError(
                f"{self._header.path} has no tensor {name}{did_you_mean(name, self._sources)}"
            )
        return self._sources[name]


def _hf_names(header: GGUFHeader, family: Family) -> dict[str, str]:
    """Hugging Face name -> name in the file, for all tensors."""
    names = {}
    for source in header.tensors:
        if source == ROPE_FACTORS:
            continue
        match = _NAME.fullmatch(source)
        layer = match["layer"] if match else None
        table = GLOBAL_NAMES if layer is None else family.layer_names
        part = table.get(match["part"]) if match else None
        if match is None or part is None:
            raise EngineError(
                f"{header.path} has the tensor {source}, which is not part of a "
                f"{family.model_type} model; variants such as mixtures of experts are not supported"
            )
        prefix = "" if layer is None else f"model.layers.{layer}."
        names[f"{prefix}{part}.{match['leaf']}"] = source
    return names


def _uninterleaved(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of a projection `[heads * d, ...]`, with rotary pairs d / 2 rows apart again."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKEN_KEYS.items()}
    return {name: tokens[id] for name, id in ids.items() if id is not None and id < len(tokens)}


def _stop_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The end of sequence, then the end of turn if the file names one."""
    ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    return tuple(dict.fromkeys(id for id in ids if id is not None))
