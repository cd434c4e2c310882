"""The training loss of DSpark: 0.1 cross-entropy + 0.9 L1 + 1.0 confidence BCE.

Slot k weighs exp(-k / 4). Every term is Σ(w·x) / (Σw + 1e-6) over the slots that count. All
softmaxes are fp32 at temperature 1. The confidence target c* = 1 - ½‖p_draft - p_target‖₁ is the
acceptance probability of sampling; it carries no gradient.

A further term, off by default, is LK (Samarin et al., 2026, arXiv:2602.23881): λ KL(p_target ‖
p_draft) + (1 - λ) ½‖p_draft - p_target‖₁ with λ = exp(-3 c*). KL leads where the two are far apart
and L1 has little gradient, L1 where they are near. λ carries no gradient. The paper averages c*
over a batch; here it is that of each slot. KL is over the draft's ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the terms are mixed, and the decay over slots (in slots)."""

    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    lk: float = 0.0


LK_RATE = 3.0
"""Of λ = exp(-rate · c*)."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Scalars of one batch and the acceptance probabilities behind them."""

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    lk: Tensor
    """Zero where it has no weight."""
    confidence: Tensor
    acceptance: Tensor
    """[..., γ] c*, detached."""


def dspark_loss(
    logits: Tensor,  # [..., γ, V']
    *,
    confidence_logits: Tensor | None,  # [..., γ]
    target_probs: Tensor,  # [..., γ, V'] the target's probabilities of the draft's ids
    labels: Tensor,  # [..., γ] draft ids; -1 where the draft has no such id
    mask: Tensor,  # [..., γ] slots that count
    weights: LossWeights,
) -> LossTerms:
    """Loss of blocks. With a reduced vocabulary `target_probs` sums to less than one; the rest
    is mass that the draft cannot cover, so it counts in full towards L1. Cross-entropy skips
    labels that the draft has no id for.
    """
    slots = torch.arange(logits.shape[-2], device=logits.device)
    shares = mask.float() * slot_weights(slots, weights)

    log_probs = functional.log_softmax(logits.float(), dim=-1)
    known = labels >= 0
    picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    cross_entropy = weighted_mean(-picked, shares * known)

    outside = (1.0 - target_probs.sum(-1)).clamp(min=0.0)
    distance = (log_probs.exp() - target_probs).abs().sum(-1) + outside
    l1 = weighted_mean(distance, shares)
    acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)

    lk = l1.new_zeros(())
    if weights.lk:
        entropy = (target_probs * (target_probs.clamp(min=1e-30).log() - log_probs)).sum(-1)
        mixing = torch.exp(-LK_RATE * acceptance)
        lk = weighted_mean(mixing * entropy + (1 - mixing) * 0.5 * distance, shares)

    total = weights.cross_entropy * cross_entropy + weights.l1 * l1 + weights.lk * lk
    confidence = total.new_zeros(())
    if confidence_logits is not None:
        entropy = functional.binary_cross_entropy_with_logits(
            confidence_logits.float(), acceptance, reduction="none"
        )
        confidence = weighted_mean(entropy, shares)
        total = total + weights.confidence * confidence
    return LossTerms(total, cross_entropy, l1, lk, confidence, acceptance)


def slot_weights(slots: Tensor, weights: LossWeights) -> Tensor:
    """exp(-k / decay) of slots k."""
    return torch.exp(-slots.float() / weights.decay)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ(w·x) / (Σw + 1e-6)."""
    return (values * weights).sum() / (weights.sum() + 1e-6)
