"""How good a draft is on held-out responses, without running the target.

Teacher-forced: mean c* per slot and τ of sampling, 1 + Σ_k Π_{i≤k} c*_i. Greedy: the target's
greedy text is fixed, so a decode is replayed along it: draft from the anchor, count the slots that
match the recorded text, move on by that plus one. That equals a real greedy decode as long as the
features are those of the serving target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_batch.decode.algorithm import calibration
from dspark_batch.training.anchors import (
    AnchorBatch,
    aligned_target_probs,
    anchor_batch,
    sample_anchors,
    valid_anchors,
)
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.features import FeatureBatch, FeatureSource
from dspark_batch.training.losses import LossWeights, dspark_loss


@dataclass(frozen=True, slots=True)
class GreedyReplay:
    """The rounds of one sequence."""

    num_committed: int
    accepted: Tensor
    """[n] draft tokens accepted in each round."""
    confidence_logits: Tensor | None
    """[n, γ]; None without a confidence head."""

    @property
    def num_rounds(self) -> int:
        """n"""
        return len(self.accepted)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the held-out set."""

    loss: float
    acceptance: tuple[float, ...]
    """γ means of c*: acceptance of a slot when sampling, given all before it were."""
    tau_probabilistic: float
    tau_greedy: float
    """Committed tokens per round; a round that ends the text counts what it commits."""
    survival: tuple[float, ...]
    """γ shares of the greedy rounds whose draft was accepted up to that slot."""


@torch.inference_mode()
def replay_greedy(draft: DSparkDraft, batch: FeatureBatch) -> GreedyReplay:
    """Replay a greedy decode of a batch of one sequence along its recorded response."""
    block_size = draft.config.block_size
    positions = valid_anchors(batch.loss_mask)[0].nonzero().squeeze(-1)
    if len(positions) == 0:
        return GreedyReplay(0, torch.zeros(0, dtype=torch.long), torch.zeros(0, block_size))
    blocks = anchor_batch(batch, positions[None], block_size)
    tokens = blocks.previous[..., 0]
    hidden = draft.hidden_packed(batch.features, tokens, blocks.anchors)
    scores = draft.draft_greedy(hidden, tokens)
    assert scores.tokens is not None
    matches = ((scores.tokens == blocks.labels) & blocks.mask).long().cumprod(-1).sum(-1)[0]

    first, end = int(positions[0]), int(positions[-1]) + 1
    anchor, committed, visited = first, 0, []
    accepted = matches.tolist()
    while anchor < end:
        place = anchor - first
        visited.append(place)
        committed += min(accepted[place] + 1, end - anchor)
        anchor += accepted[place] + 1
    logits = scores.confidence_logits
    return GreedyReplay(
        committed, matches[visited].cpu(), None if logits is None else logits[0, visited].cpu()
    )


@dataclass(frozen=True, slots=True)
class SequenceScores:
    """What is measured of one held-out sequence; sums are over its anchors."""

    loss: float | None
    """None where the response is too short for an anchor."""
    acceptance: Tensor
    """[γ] sum of c* over the blocks with that slot."""
    num_slots: Tensor
    """[γ] blocks with that slot."""
    survival: float
    """Σ over blocks of Σ_k Π_{i≤k} c*_i."""
    num_blocks: int
    replay: GreedyReplay


@torch.inference_mode()
def score_sequences(
    draft: DSparkDraft,
    source: FeatureSource,
    *,
    indices: Sequence[int] | None = None,
    num_anchors: int = 32,
    seed: int = 0,
) -> list[SequenceScores]:
    """Measure the sequences at `indices` (all by default), one at a time, without dropout."""
    was_training = draft.training
    draft.eval()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in _held(source, range(len(source)) if indices is None else indices):
        batch = source.batch([index])
        anchors = sample_anchors(batch.loss_mask, num_anchors, generator)
        blocks = anchor_batch(batch, anchors[:, anchors[0] >= 0], draft.config.block_size)
        found.append(_score(draft, source, batch, blocks))
    draft.train(was_training)
    return found


def _score(
    draft: DSparkDraft, source: FeatureSource, batch: FeatureBatch, blocks: AnchorBatch
) -> SequenceScores:
    device, none = draft.fc.weight.device, torch.zeros(draft.config.block_size)
    batch, blocks = batch.to(device), blocks.to(device)
    replay = replay_greedy(draft, batch)
    if blocks.anchors.numel() == 0:
        return SequenceScores(None, none, none, 0.0, 0, replay)
    scores = draft.forward_packed(batch.features, anchors=blocks.anchors, previous=blocks.previous)
    terms = dspark_loss(
        scores.logits,
        confidence_logits=scores.confidence_logits,
        target_probs=aligned_target_probs(
            draft, batch, blocks.anchors, logit_cap=source.target.logit_cap
        ),
        labels=draft.draft_ids[blocks.labels],
        mask=blocks.mask,
        weights=LossWeights(),
    )
    kept = (terms.acceptance * blocks.mask).cpu()
    return SequenceScores(
        loss=float(terms.total),
        acceptance=kept.sum((0, 1)),
        num_slots=blocks.mask.cpu().sum((0, 1)),
        survival=float(kept.cumprod(-1).sum()),
        num_blocks=blocks.anchors.numel(),
        replay=replay,
    )


def evaluation_of(scores: Sequence[SequenceScores]) -> Evaluation:
    """The means over some sequences, at least one."""
    losses = [s.loss for s in scores if s.loss is not None]
    acceptance = torch.stack([s.acceptance for s in scores]).sum(0)
    num_slots = torch.stack([s.num_slots for s in scores]).sum(0).clamp(min=1)
    accepted = torch.cat([s.replay.accepted for s in scores])
    num_rounds = max(len(accepted), 1)
    reached = accepted[:, None] > torch.arange(len(acceptance))
    return Evaluation(
        loss=sum(losses) / max(len(losses), 1),
        acceptance=tuple((acceptance / num_slots).tolist()),
        tau_probabilistic=1.0
        + sum(s.survival for s in scores) / max(sum(s.num_blocks for s in scores), 1),
        tau_greedy=sum(s.replay.num_committed for s in scores) / num_rounds,
        survival=tuple((reached.sum(0) / num_rounds).tolist()),
    )


def evaluate(
    draft: DSparkDraft,
    source: FeatureSource,
    *,
    indices: Sequence[int] | None = None,
    num_anchors: int = 32,
    seed: int = 0,
) -> Evaluation:
    """`evaluation_of` the sequences at `indices` (all by default)."""
    return evaluation_of(
        score_sequences(draft, source, indices=indices, num_anchors=num_anchors, seed=seed)
    )


def calibrate(scores: Sequence[SequenceScores]) -> NDArray[np.float64] | None:
    """Confidence temperatures [γ] fitted on replayed greedy rounds; None without a confidence."""
    logits = [s.replay.confidence_logits for s in scores]
    known = [row for row in logits if row is not None]
    accepted = torch.cat([s.replay.accepted for s in scores])
    if not known or len(accepted) == 0:
        return None
    return calibration.fit(torch.cat(known).float().numpy(), accepted.numpy())


def _held(source: FeatureSource, indices: Sequence[int]) -> Iterator[int]:
    """The indices, while their features are held."""
    for chunk in source.chunks(indices):
        source.hold(chunk)
        yield from chunk
