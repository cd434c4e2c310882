"""The frozen target of a training: its tables in torch, and its features.

The engine that will run the jobs gives what the draft sees when it serves, in the served precision.
The target in torch (`decoder`) gives them on the device of the training. Both run the responses
teacher-forced, for every family and weight format that exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_batch.engine import Engine, Tokenizer
from dspark_batch.models import DecoderSpec
from dspark_batch.models.families import decoder_spec
from dspark_batch.models.weights import Weights
from dspark_batch.training.decoder import Decoder, padded

_PASS_TOKENS = 1 << 13  # of a pass in torch, padding counted

NamedTensor = Callable[[str], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TargetTables:
    """What a draft shares with its target, fp32."""

    spec: DecoderSpec
    embed: Tensor
    """[V, d] without `spec.embedding_scale`."""
    head: Tensor
    """[V, d]"""
    norm: Tensor
    """[d] weight of the final norm."""

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """Read the tables of an opened target."""
        spec = decoder_spec(weights.config)
        embed = tensor(weights.tensor, "model.embed_tokens.weight")
        head = embed if spec.tied_head else tensor(weights.tensor, "lm_head.weight")
        return cls(
            spec, embed, head, tensor(weights.tensor, "model.norm.weight") + spec.norm_offset
        )


def tensor(read: NamedTensor, name: str) -> Tensor:
    """A weight in fp32."""
    return torch.from_numpy(np.array(read(name), dtype=np.float32))


def context_layer_ids(taps: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """What the engine must give for a draft with these taps: them, and the last layer."""
    return tuple(sorted({*taps, num_layers - 1}))


class EngineFeatures:
    """`features.TargetFeatures` of an engine that was built with `context_layer_ids`."""

    def __init__(self, engine: Engine, tables: TargetTables, *, num_taps: int) -> None:
        size = tables.spec.hidden_size
        self.head_weight, self.logit_cap = tables.head, tables.spec.logit_cap
        self.feature_size, self.hidden_size = num_taps * size, size
        self._engine, self._tables = engine, tables

    def __call__(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `[S, m·d]` and final hidden rows `[S, d]`, fp32, of each row of token ids."""
        for context in self._engine.context(rows):
            streams = torch.from_numpy(context)
            yield streams[:, : self.feature_size], self._final_norm(streams[:, -self.hidden_size :])

    def _final_norm(self, stream: Tensor) -> Tensor:
        variance = stream.pow(2).mean(-1, keepdim=True)
        return stream * torch.rsqrt(variance + self._tables.spec.epsilon) * self._tables.norm


@dataclass(frozen=True, slots=True)
class TargetText:
    """`job.EngineText` of a target without an engine."""

    tokenizer: Tokenizer | None
    max_tokens: int
    vocab_size: int


class TorchFeatures:
    """`features.TargetFeatures` of a target in torch; what it gives stays on its device."""

    def __init__(self, decoder: Decoder, taps: Sequence[int]) -> None:
        self.head_weight, self.logit_cap = decoder.head, decoder.spec.logit_cap
        self.feature_size = len(taps) * decoder.spec.hidden_size
        self.hidden_size = decoder.spec.hidden_size
        self._decoder, self._taps = decoder, tuple(taps)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `[S, m·d]` and final hidden rows `[S, d]`, fp32, of each row of token ids."""
        begin = 0
        while begin < len(rows):
            end, longest = begin, 0
            while end < len(rows):
                longest = max(longest, len(rows[end]))
                if end > begin and (end + 1 - begin) * longest > _PASS_TOKENS:
                    break
                end += 1
            found = self._decoder.forward(
                padded(rows[begin:end], self._decoder.device), taps=self._taps
            )
            features = torch.cat([found.streams[tap] for tap in self._taps], dim=-1)
            for row, ids in enumerate(rows[begin:end]):
                yield features[row, : len(ids)], found.normed[row, : len(ids)]
            begin = end
