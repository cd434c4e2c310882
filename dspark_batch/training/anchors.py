"""Anchors of training sequences and what their blocks should predict.

Position p is a valid anchor where the loss mask holds at p and p + 1. Slot k of its block predicts
the token at p + 1 + k, from previous tokens that are the recorded ones (teacher forcing); it counts
while every label up to it lies in the response.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.features import FeatureBatch, capped


@dataclass(frozen=True, slots=True)
class AnchorBatch:
    """A blocks per sequence, γ slots each."""

    anchors: Tensor
    """[b, A] positions; dummies are 0."""
    previous: Tensor
    """[b, A, γ] target ids: the anchor, then the recorded tokens after it."""
    labels: Tensor
    """[b, A, γ] target ids."""
    mask: Tensor
    """[b, A, γ] bool: slots that count; all false for a dummy."""

    def to(self, device: torch.device) -> AnchorBatch:
        """The same on another device."""
        return AnchorBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def valid_anchors(loss_mask: Tensor) -> Tensor:
    """`[b, S]` bool: both this and the next position are response tokens."""
    return loss_mask & functional.pad(loss_mask[:, 1:], (0, 1))


def repeated(token_ids: Tensor) -> Tensor:
    """`[b, S]` bool: the two tokens that end here stood together before in the row.

    There prompt lookup proposes, whose shortest match ahead of a network has two tokens.
    """
    pairs = (token_ids[:, :-1] << 32) | token_ids[:, 1:]
    ranked, places = pairs.sort(dim=1, stable=True)  # of equal pairs the first place comes first
    again = functional.pad(ranked[:, 1:] == ranked[:, :-1], (1, 0))
    return functional.pad(torch.zeros_like(again).scatter_(1, places, again), (1, 0))


def sample_anchors(
    loss_mask: Tensor,
    num_anchors: int,
    generator: torch.Generator,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Up to `num_anchors` valid positions per row of `[b, S]`, drawn without replacement.

    `weights [b, S]`, above 0, say how likely a position is drawn next, against the others
    (Efraimidis and Spirakis, 2006).

    Returns `[b, A]`, sorted, with -1 in place of missing ones. `generator` is the CPU's, so that
    every device draws the same.
    """
    valid = valid_anchors(loss_mask)
    keys = torch.rand(valid.shape, generator=generator).to(valid.device)
    if weights is not None:
        keys = keys.pow(1.0 / weights)
    keys = keys.masked_fill(~valid, -1.0)
    values, positions = keys.topk(min(num_anchors, valid.shape[1]), dim=-1)
    return positions.masked_fill(values < 0, -1).sort(dim=-1).values


def anchor_batch(batch: FeatureBatch, anchors: Tensor, block_size: int) -> AnchorBatch:
    """Previous tokens, labels and mask of the blocks at `anchors [b, A]` (-1: a dummy)."""
    rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
    kept, anchors = anchors >= 0, anchors.clamp(min=0)
    slots = anchors[..., None] + torch.arange(block_size, device=anchors.device)
    last = batch.token_ids.shape[1] - 1
    inside = batch.loss_mask[rows, (slots + 1).clamp(max=last)] & (slots + 1 <= last)
    return AnchorBatch(
        anchors,
        batch.token_ids[rows, slots.clamp(max=last)],
        batch.token_ids[rows, (slots + 1).clamp(max=last)],
        inside.long().cumprod(-1).bool() & kept[..., None],
    )


def aligned_target_probs(
    draft: DSparkDraft, batch: FeatureBatch, anchors: Tensor, *, logit_cap: float | None = None
) -> Tensor:
    """The target's probabilities of the draft's ids for every slot, `[b, A, γ, V']` fp32.

    Normalised over the full vocabulary, so a row sums to the mass that the draft can cover.
    """
    rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
    slots = anchors[..., None] + torch.arange(draft.config.block_size, device=anchors.device)
    slots = slots.clamp(max=batch.token_ids.shape[1] - 1)
    logits = functional.linear(
        batch.last_hidden[rows, slots], draft.head_weight.to(batch.last_hidden.dtype)
    )
    logits = capped(logits.float(), logit_cap)
    return (logits - batch.log_normalizer[rows, slots].unsqueeze(-1)).exp_()
