"""What the frozen target says about training sequences: tapped layers and final hidden rows.

Captured on the way, in chunks that fit a byte limit: a chunk is captured, trained on, dropped. One
position costs (m + 1)·d elements, on the device of the training; nothing goes to disk.
Symbols: b sequences, S positions (right-padded), m tapped layers, d hidden size, V' draft ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dspark_batch.errors import InputError

LOGIT_ROWS = 512
"""Rows of full-vocabulary logits alive at once while normalisers are computed."""


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """A prompt and the target's own response to it, `token_ids[num_prompt_tokens:]`.

    A response that ended by itself includes its stop token.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    source: str = ""

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


class TargetFeatures(Protocol):
    """What the target gives: `training.target.EngineFeatures` or `TorchFeatures`."""

    head_weight: Tensor
    """[V, d]"""
    logit_cap: float | None
    """The target's logits are cap * tanh(logit / cap)."""
    feature_size: int
    """m·d"""
    hidden_size: int

    def __call__(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Features `[S, m·d]` and final hidden rows `[S, d]` of each row of token ids."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One captured sequence; the last two start at its first response token."""

    features: Tensor  # [S, m·d]
    last_hidden: Tensor  # [S - P, d]
    log_normalizer: Tensor  # [S - P]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.features, self.last_hidden, self.log_normalizer))


class FeatureSource:
    """Feature batches of the sequences that are held; `max_bytes` bounds what is.

    Invariant: the same set is always captured in the same order, so what a batch holds does not
    depend on how the set came to be asked for.
    """

    def __init__(
        self,
        target: TargetFeatures,
        sequences: Sequence[TrainingSequence],
        *,
        max_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Features are kept in `dtype` on `device`, the CPU by default."""
        self.target = target
        self.sequences = sequences
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.num_captured = 0
        """Positions captured so far."""
        self.device = device or torch.device("cpu")
        self._head = target.head_weight.to(self.device, dtype)
        self._rows: dict[int, _Row] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_held_bytes(self) -> int:
        """Features in memory."""
        return sum(row.num_bytes for row in self._rows.values())

    def num_bytes(self, index: int) -> int:
        """Memory of one sequence."""
        sequence = self.sequences[index]
        width = len(sequence.token_ids) * self.target.feature_size
        width += sequence.num_response_tokens * self.target.hidden_size
        return width * self.dtype.itemsize + sequence.num_response_tokens * 4

    def chunks(self, order: Sequence[int]) -> list[list[int]]:
        """`order` cut into runs that fit the limit. Raises `InputError` for a longer sequence."""
        chunks: list[list[int]] = [[]]
        room = self.max_bytes
        for index in order:
            size = self.num_bytes(index)
            if size > self.max_bytes:
                raise InputError(
                    f"the features of one sequence of {len(self.sequences[index].token_ids)} "
                    f"tokens take {size:,} bytes, but {self.max_bytes:,} are allowed",
                    hint="raise [training] memory_gb",
                )
            if size > room:
                chunks.append([])
                room = self.max_bytes
            chunks[-1].append(index)
            room -= size
        return [chunk for chunk in chunks if chunk]

    def hold(self, indices: Sequence[int], *, running: Callable[[], bool] = lambda: True) -> bool:
        """Capture exactly these sequences and drop all others; nothing to do if they are held.

        False, and nothing is held, where `running` became false on the way.
        """
        if set(indices) == set(self._rows):
            return True
        self._rows = {}
        # Rows of like length share a pass; the order is that of the set, whatever `indices`' is.
        ordered = sorted(indices, key=lambda index: (len(self.sequences[index].token_ids), index))
        # One slab for all: between rows that come and stay one by one, what a pass leaves behind
        # is too small for the next, longer one, and the heap grows to several times `max_bytes`.
        slab = self._slab(ordered)
        captured = self.target([self.sequences[index].token_ids for index in ordered])
        for index, row, (features, last_hidden) in zip(ordered, slab, captured, strict=True):
            row.features.copy_(features)
            row.last_hidden.copy_(last_hidden[self.sequences[index].num_prompt_tokens :])
            row.log_normalizer.copy_(self.log_normalizer(row.last_hidden))
            self._rows[index] = row
            self.num_captured += len(features)
            if not running():
                self._rows = {}
                return False
        return True

    def _slab(self, indices: Sequence[int]) -> list[_Row]:
        """Room for these sequences, in three pieces of memory."""
        chosen = [self.sequences[index] for index in indices]
        lengths = [len(sequence.token_ids) for sequence in chosen]
        tails = [sequence.num_response_tokens for sequence in chosen]
        width, size = self.target.feature_size, self.target.hidden_size
        features = torch.empty(sum(lengths), width, dtype=self.dtype, device=self.device)
        last_hidden = torch.empty(sum(tails), size, dtype=self.dtype, device=self.device)
        log_normalizer = torch.empty(sum(tails), device=self.device)
        return [
            _Row(*pieces)
            for pieces in zip(
                torch.split(features, lengths),
                torch.split(last_hidden, tails),
                torch.split(log_normalizer, tails),
                strict=True,
            )
        ]

    @torch.no_grad()
    def log_normalizer(self, last_hidden: Tensor) -> Tensor:
        """Logsumexp over the full vocabulary in fp32, `[n, d]` to `[n]`.

        In the dtype of the features: rounding of the likely tokens is then that of the logits
        which are normalised with it, and cancels.
        """
        parts = []
        for rows in torch.split(last_hidden, LOGIT_ROWS):
            logits = functional.linear(rows, self._head)
            parts.append(capped(logits.float(), self.target.logit_cap).logsumexp(-1))
        return torch.cat(parts)

    def batch(self, indices: Sequence[int]) -> FeatureBatch:
        """The sequences at `indices`, in that order; captured now where they are not held."""
        if not all(index in self._rows for index in indices):
            self.hold(indices)
        rows = [self._rows[index] for index in indices]
        chosen = [self.sequences[i] for i in indices]
        prompts = [s.num_prompt_tokens for s in chosen]
        tokens = pad_sequence([torch.tensor(s.token_ids) for s in chosen], batch_first=True)
        places = torch.arange(tokens.shape[1])
        ends = torch.tensor([[len(s.token_ids)] for s in chosen])
        masks = (places >= torch.tensor(prompts)[:, None]) & (places < ends)
        hidden = [
            functional.pad(row.last_hidden, (0, 0, prompt, 0))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        normalizers = [
            functional.pad(row.log_normalizer, (prompt, 0))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return FeatureBatch(
            tokens.to(self.device),
            masks.to(self.device),
            pad_sequence([row.features for row in rows], batch_first=True),
            pad_sequence(hidden, batch_first=True),
            pad_sequence(normalizers, batch_first=True),
        )


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits under a soft cap, where the target has one."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
