"""What the frozen target says about training sequences: tapped layers and final hidden rows.

Computed on demand in batches and kept in memory in the target's dtype up to a byte limit; what
does not fit is computed again when it is next asked for. One position costs (m + 1)·d elements.
Symbols: b sequences, S positions (right-padded), m tapped layers, d hidden size, V' draft ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dspark_batch.errors import EngineError, InputError

LOGIT_ROWS = 512
"""Rows of full-vocabulary logits alive at once while normalisers are computed."""


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """A prompt and the target's own response to it, `token_ids[num_prompt_tokens:]`.

    A response that ended by itself includes its stop token.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.num_prompt_tokens < len(self.token_ids):
            raise InputError("a training sequence needs a prompt and at least one response token")

    @property
    def num_response_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Sequences side by side, right-padded with zeros."""

    token_ids: Tensor
    """[b, S] int64."""
    loss_mask: Tensor
    """[b, S] bool: response tokens."""
    features: Tensor
    """[b, S, m·d] residual stream after each tapped layer."""
    last_hidden: Tensor
    """[b, S, d] after the final norm; zero on prompt rows."""
    log_normalizer: Tensor
    """[b, S] fp32 logsumexp of the full-vocabulary logits; zero on prompt rows."""

    def to(self, device: torch.device) -> FeatureBatch:
        """The same on another device."""
        return FeatureBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class _Row:
    """One cached sequence; the last two start at its first response token."""

    features: Tensor  # [S, m·d]
    last_hidden: Tensor  # [S - P, d]
    log_normalizer: Tensor  # [S - P]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.features, self.last_hidden, self.log_normalizer))


class CausalTarget(Protocol):
    """The part of a transformers causal language model that is used here."""

    def eval(self) -> object:
        """Switch off dropout."""

    def get_decoder(self) -> nn.Module:
        """The model without its head."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The head."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""


class TargetTaps:
    """Runs a transformers target and records raw layer outputs with forward hooks.

    Hooks rather than `output_hidden_states`: its last entry is already normalised, and it would
    keep every layer.
    """

    def __init__(self, target: CausalTarget, target_layer_ids: Sequence[int]) -> None:
        target.eval()
        self.decoder = target.get_decoder()
        head = target.get_output_embeddings()
        layers = getattr(self.decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or head is None:
            raise EngineError("the target has no `layers` list or no head: not a decoder model")
        self.head_weight = cast("Tensor", head.weight).detach()
        self.embed_weight = cast("Tensor", target.get_input_embeddings().weight).detach()
        self.ids = tuple(target_layer_ids)
        if not self.ids or max(self.ids) >= len(layers) or min(self.ids) < -1:
            raise EngineError(f"target_layer_ids {self.ids} do not fit {len(layers)} layers")
        self._tapped: dict[int, Tensor] = {}
        for index in self.ids:
            module = target.get_input_embeddings() if index == -1 else layers[index]
            module.register_forward_hook(self._recorder(index))

    def _recorder(self, index: int) -> Callable[[nn.Module, object, object], None]:
        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            # Older transformers return a tuple, hidden states first.
            rows = output[0] if isinstance(output, tuple) else output
            self._tapped[index] = cast("Tensor", rows)

        return record

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[b, S, m·d]` and final hidden rows `[b, S, d]` of right-padded `[b, S]` ids.

        No attention mask: under causal attention padding on the right reaches no real row.
        """
        output = self.decoder(input_ids=token_ids, use_cache=False)
        features = torch.cat([self._tapped[index] for index in self.ids], dim=-1)
        self._tapped.clear()
        return features, output.last_hidden_state

    @torch.no_grad()
    def log_normalizer(self, last_hidden: Tensor) -> Tensor:
        """Logsumexp over the full vocabulary in fp32, `[n, d]` to `[n]`."""
        parts = [
            functional.linear(rows, self.head_weight).float().logsumexp(-1)
            for rows in torch.split(last_hidden, LOGIT_ROWS)
        ]
        return torch.cat(parts)


class FeatureSource:
    """Feature batches by sequence index, computed once per sequence while memory lasts."""

    def __init__(
        self,
        taps: TargetTaps,
        sequences: Sequence[TrainingSequence],
        *,
        max_cache_bytes: int,
    ) -> None:
        self.taps = taps
        self.sequences = sequences
        self.max_cache_bytes = max_cache_bytes
        self.num_cached_bytes = 0
        self._cache: dict[int, _Row] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """The sequences at `indices`, in that order."""
        rows = self._rows(indices)
        chosen = [self.sequences[i] for i in indices]
        prompts = [s.num_prompt_tokens for s in chosen]
        tokens = [torch.tensor(s.token_ids) for s in chosen]
        masks = [torch.arange(len(s.token_ids)) >= s.num_prompt_tokens for s in chosen]
        hidden = [
            functional.pad(row.last_hidden, (0, 0, prompt, 0))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        normalizers = [
            functional.pad(row.log_normalizer, (prompt, 0))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return FeatureBatch(
            pad_sequence(tokens, batch_first=True),
            pad_sequence(masks, batch_first=True),
            pad_sequence([row.features for row in rows], batch_first=True),
            pad_sequence(hidden, batch_first=True),
            pad_sequence(normalizers, batch_first=True),
        )

    def _rows(self, indices: Sequence[int]) -> list[_Row]:
        missing = [i for i in dict.fromkeys(indices) if i not in self._cache]
        fresh = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        for index, row in fresh.items():
            if self.num_cached_bytes + row.num_bytes <= self.max_cache_bytes:
                self._cache[index] = row
                self.num_cached_bytes += row.num_bytes
        return [fresh[i] if i in fresh else self._cache[i] for i in indices]

    def _compute(self, indices: Sequence[int]) -> list[_Row]:
        chosen = [self.sequences[i] for i in indices]
        ids = [torch.tensor(s.token_ids) for s in chosen]
        features, last_hidden = self.taps(pad_sequence(ids, batch_first=True))
        rows = []
        for place, sequence in enumerate(chosen):
            prompt, length = sequence.num_prompt_tokens, len(sequence.token_ids)
            tail = last_hidden[place, prompt:length].clone()
            normalizer = self.taps.log_normalizer(tail)
            rows.append(_Row(features[place, :length].clone(), tail, normalizer))
        return rows
