"""How good a draft is on held-out responses, without running the target.

Teacher-forced: mean c* per slot and τ of sampling, 1 + Σ_k Π_{i≤k} c*_i. Greedy: the target's
greedy text is fixed, so a decode is replayed along it: draft from the anchor, count the slots that
match the recorded text, move on by that plus one. That equals a real greedy decode as long as the
features are those of the serving target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """Rounds of one sequence. `accepted_histogram [γ + 1]` counts rounds by accepted tokens."""

    num_rounds: int
    num_committed: int
    accepted_histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the held-out set."""

    loss: float
    acceptance: tuple[float, ...]
    """γ means of c*: acceptance of a slot when sampling, given all before it were."""
    tau_probabilistic: float
    tau_greedy: float
    """Committed tokens per round; a round that ends the text counts what it commits."""


@torch.inference_mode()
def replay_greedy(draft: DSparkDraft, batch: FeatureBatch) -> GreedyReplay:
    """Replay a greedy decode of a batch of one sequence along its recorded response."""
    block_size = draft.config.block_size
    positions = valid_anchors(batch.loss_mask)[0].nonzero().squeeze(-1)
    histogram = [0] * (block_size + 1)
    if len(positions) == 0:
        return GreedyReplay(0, 0, tuple(histogram))
    blocks = anchor_batch(batch, positions[None], block_size)
    tokens = blocks.previous[..., 0]
    hidden = draft.hidden_packed(batch.features, tokens, blocks.anchors)
    drafted = draft.draft_greedy(hidden, tokens).tokens
    assert drafted is not None
    matches = ((drafted == blocks.labels) & blocks.mask).long().cumprod(-1).sum(-1)[0].tolist()

    first, end = int(positions[0]), int(positions[-1]) + 1
    anchor, committed, rounds = first, 0, 0
    while anchor < end:
        accepted = matches[anchor - first]
        committed += min(accepted + 1, end - anchor)
        rounds += 1
        histogram[accepted] += 1
        anchor += accepted + 1
    return GreedyReplay(rounds, committed, tuple(histogram))


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
    rounds = committed = 0
    for index in range(len(source)) if indices is None else indices:
        batch = source.batch([index])
        anchors = sample_anchors(batch.loss_mask, num_anchors, generator)
        blocks = anchor_batch(batch, anchors[:, anchors[0] >= 0], block_size).to(device)
        batch = batch.to(device)
        replay = replay_greedy(draft, batch)
        rounds, committed = rounds + replay.num_rounds, committed + replay.num_committed
        if blocks.anchors.numel() == 0:
            continue
        scores = draft.forward_packed(
            batch.features, anchors=blocks.anchors, previous=blocks.previous
        )
        terms = dspark_loss(
            scores.logits,
            confidence_logits=scores.confidence_logits,
            target_probs=aligned_target_probs(draft, batch, blocks.anchors),
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
    return Evaluation(
        loss=sum(losses) / max(len(losses), 1),
        acceptance=tuple((sums / counts.clamp(min=1)).tolist()),
        tau_probabilistic=1.0 + products / max(blocks_seen, 1),
        tau_greedy=committed / max(rounds, 1),
    )
