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

from dspark_batch.algorithm import calibration
from dspark_batch.training.anchors import (
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


@torch.inference_mode()
def evaluate(
    draft: DSparkDraft,
    source: FeatureSource,
    *,
    indices: Sequence[int] | None = None,
    num_anchors: int = 32,
    seed: int = 0,
) -> Evaluation:
    """Evaluate on the sequences at `indices` (all by default), one at a time, without dropout."""
    was_training = draft.training
    draft.eval()
    device = draft.fc.weight.device
    generator = torch.Generator().manual_seed(seed)
    block_size = draft.config.block_size
    sums, counts = torch.zeros(block_size), torch.zeros(block_size)
    products, blocks_seen, losses = 0.0, 0, []
    committed = 0
    accepted = []
    for index in _held(source, range(len(source)) if indices is None else indices):
        batch = source.batch([index])
        anchors = sample_anchors(batch.loss_mask, num_anchors, generator)
        blocks = anchor_batch(batch, anchors[:, anchors[0] >= 0], block_size).to(device)
        batch = batch.to(device)
        replay = replay_greedy(draft, batch)
        committed += replay.num_committed
        accepted.append(replay.accepted)
        if blocks.anchors.numel() == 0:
            continue
        scores = draft.forward_packed(
            batch.features, anchors=blocks.anchors, previous=blocks.previous
        )
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
        losses.append(float(terms.total))
        kept = (terms.acceptance * blocks.mask).cpu()
        sums += kept.sum((0, 1))
        counts += blocks.mask.cpu().sum((0, 1))
        products += float(kept.cumprod(-1).sum())
        blocks_seen += blocks.anchors.numel()
    draft.train(was_training)
    rounds = torch.cat(accepted) if accepted else torch.zeros(0, dtype=torch.long)
    reached = rounds[:, None] > torch.arange(block_size)
    return Evaluation(
        loss=sum(losses) / max(len(losses), 1),
        acceptance=tuple((sums / counts.clamp(min=1)).tolist()),
        tau_probabilistic=1.0 + products / max(blocks_seen, 1),
        tau_greedy=committed / max(len(rounds), 1),
        survival=tuple((reached.sum(0) / max(len(rounds), 1)).tolist()),
    )


@torch.inference_mode()
def calibrate(draft: DSparkDraft, source: FeatureSource) -> NDArray[np.float64] | None:
    """Confidence temperatures [γ] fitted on replayed greedy rounds; None without a confidence."""
    was_training = draft.training
    draft.eval()
    device = draft.fc.weight.device
    replays = [
        replay_greedy(draft, source.batch([index]).to(device))
        for index in _held(source, range(len(source)))
    ]
    draft.train(was_training)
    logits = [r.confidence_logits for r in replays if r.confidence_logits is not None]
    accepted = torch.cat([replay.accepted for replay in replays])
    if not logits or len(accepted) == 0:
        return None
    return calibration.fit(torch.cat(logits).float().numpy(), accepted.numpy())


def _held(source: FeatureSource, indices: Sequence[int]) -> Iterator[int]:
    """The indices, while their features are held."""
    for chunk in source.chunks(indices):
        source.hold(chunk)
        yield from chunk
