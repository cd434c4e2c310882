"""The training loss without the logits: head, softmaxes and their gradients chunk by chunk.

Whole logits are most of a step's memory and, in page faults, a third of its time. Here a chunk of
rows goes through the head, both distributions and the gradient while it is in the cache. What comes
out is `losses.dspark_loss`, its plain reference, of the same rows. Symbols: n rows (slots that
count), d hidden size, r Markov rank, V' draft ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.training.features import capped
from dspark_batch.training.losses import (
    LK_RATE,
    LossTerms,
    LossWeights,
    slot_weights,
    weighted_mean,
)

_CHUNK_VALUES = 1 << 22  # logits alive at a time: what a CPU's cache takes
_CUDA_CHUNK_VALUES = 1 << 27  # on a GPU few large launches are what is fast
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class TargetRows:
    """What the target says where the draft is asked."""

    hidden: Tensor
    """[n, d] after the final norm."""
    log_normalizer: Tensor
    """[n] of the full vocabulary."""
    labels: Tensor
    """[n] draft ids; -1 where the draft has no such id."""
    logit_cap: float | None = None


def fused_loss(
    hidden: Tensor,  # [n, d]
    markov: Tensor | None,  # [n, r] what `markov_w2` is applied to
    *,
    markov_w2: Tensor | None,  # [V', r]
    head: Tensor,  # [V', d] frozen
    target: TargetRows,
    confidence_logits: Tensor | None,  # [n]
    slots: Tensor,  # [n] slot in the block
    weights: LossWeights,
    dtype: torch.dtype,
) -> LossTerms:
    """The loss of rows of which every one counts; products are taken in `dtype`."""
    shares = slot_weights(slots, weights)
    known = shares * (target.labels >= 0)
    total, cross_entropy, l1, lk, acceptance = _Fused.apply(  # type: ignore[no-untyped-call]
        hidden,
        markov,
        markov_w2,
        head.to(dtype),
        target,
        known / (known.sum() + _EPSILON),
        shares / (shares.sum() + _EPSILON),
        (weights.cross_entropy, weights.l1, weights.lk),
        dtype,
    )
    confidence = total.new_zeros(())
    if confidence_logits is not None:
        entropy = functional.binary_cross_entropy_with_logits(
            confidence_logits.float(), acceptance, reduction="none"
        )
        confidence = weighted_mean(entropy, shares)
        total = total + weights.confidence * confidence
    return LossTerms(total, cross_entropy, l1, lk, confidence, acceptance)


class _Fused(torch.autograd.Function):
    """Cross-entropy, L1 and LK with the gradients of hidden rows, Markov rows and `markov_w2`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        markov: Tensor | None,
        markov_w2: Tensor | None,
        head: Tensor,
        target: TargetRows,
        known: Tensor,  # [n] shares of the rows in the cross-entropy, sum 1
        shares: Tensor,  # [n] the same in L1 and LK
        mixture: tuple[float, float, float],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n, (weight_ce, weight_l1, weight_lk) = len(hidden), mixture
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_markov = d_w2 = w2 = None
        if markov is not None and markov_w2 is not None:
            d_markov = torch.empty_like(markov, dtype=torch.float32)
            d_w2, w2 = torch.zeros_like(markov_w2), markov_w2.to(dtype)
        label_log_probs, distance = shares.new_empty(n), shares.new_empty(n)
        mixed = shares.new_zeros(n)  # of KL and L1
        labels = target.labels.clamp(min=0)
        values = _CUDA_CHUNK_VALUES if head.is_cuda else _CHUNK_VALUES
        step = max(1, values // len(head))
        for part in (slice(begin, begin + step) for begin in range(0, n, step)):
            logits = functional.linear(hidden[part].to(dtype), head)
            if markov is not None and w2 is not None:
                logits += functional.linear(markov[part].to(dtype), w2)
            probs = functional.log_softmax(logits.float(), dim=-1)
            label_log_probs[part] = probs.gather(-1, labels[part, None])[:, 0]
            wanted = functional.linear(target.hidden[part].to(dtype), head).float()
            wanted = capped(wanted, target.logit_cap)
            wanted.sub_(target.log_normalizer[part, None])
            surprise = wanted - probs if weight_lk else None
            probs.exp_()
            wanted.exp_()
            outside = (1.0 - wanted.sum(-1)).clamp(min=0.0)
            signs = torch.sub(probs, wanted, out=None if weight_lk else wanted)
            distance[part] = signs.abs().sum(-1) + outside
            signs.sign_()
            # d|p - t| = p (sign - sum of p sign); d(-log p_label) = p - 1 at the label;
            # d KL = p (sum of t) - t.
            signs.sub_((probs * signs).sum(-1, keepdim=True))
            by_l1, by_kl = weight_l1 * shares[part], None
            if surprise is not None:
                half = 0.5 * distance[part]
                mixing = torch.exp(-LK_RATE * (1.0 - half).clamp(0.0, 1.0))
                mixed[part] = mixing * (wanted * surprise).sum(-1) + (1.0 - mixing) * half
                by_l1 = by_l1 + 0.5 * weight_lk * (1.0 - mixing) * shares[part]
                by_kl = weight_lk * mixing * shares[part]
            signs.mul_(by_l1[:, None]).add_(weight_ce * known[part, None])
            if by_kl is not None:
                signs.add_((by_kl * wanted.sum(-1))[:, None])
            gradient = probs.mul_(signs)
            if by_kl is not None:
                gradient.sub_(wanted.mul_(by_kl[:, None]))
            gradient.scatter_add_(-1, labels[part, None], -weight_ce * known[part, None])
            gradient = gradient.to(dtype)
            d_hidden[part] = gradient @ head
            if markov is not None and d_markov is not None and d_w2 is not None and w2 is not None:
                d_markov[part] = gradient @ w2
                d_w2 += gradient.T @ markov[part].to(dtype)
        cross_entropy = -(known * label_log_probs).sum()
        l1, lk = (shares * distance).sum(), (shares * mixed).sum()
        acceptance = (1.0 - 0.5 * distance).clamp(0.0, 1.0)
        ctx.save_for_backward(d_hidden, d_markov, d_w2)
        ctx.dtypes = (hidden.dtype, None if markov is None else markov.dtype)
        ctx.mark_non_differentiable(cross_entropy, l1, lk, acceptance)
        total = weight_ce * cross_entropy + weight_l1 * l1 + weight_lk * lk
        return total, cross_entropy, l1, lk, acceptance

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_markov, d_w2 = ctx.saved_tensors
        scale, (hidden_dtype, markov_dtype) = upstream[0], ctx.dtypes
        return (
            (d_hidden * scale).to(hidden_dtype),
            None if d_markov is None else (d_markov * scale).to(markov_dtype),
            None if d_w2 is None else d_w2 * scale,
            *(None,) * 6,
        )
