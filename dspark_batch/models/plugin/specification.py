"""The verification op in NumPy: what every other body must decide.

Chain speculative sampling with the residual correction (Leviathan et al., 2023; Chen et al.,
2023): whatever the draft proposed, and however far a non-anticipating plan let it be verified,
what a row emits has the target's distribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import Tokens, VerifyResult
from dspark_batch.decode.algorithm import Floats, Reals, filtered_probs, sample, softmax
from dspark_batch.models.plugin.contract import MIN_RESIDUAL_MASS


def verify(
    logits: Reals,
    logit_rows: NDArray[np.int64],
    draft_tokens: Tokens,
    lengths: NDArray[np.int64],
    certain: NDArray[np.int64],
    draft_logits: Reals,
    draft_vocab: NDArray[np.int64],
    temperature: Reals,
    top_k: NDArray[np.int64],
    top_p: Reals,
    uniforms: Floats,
) -> VerifyResult:
    """Accept a prefix of each row's drafts and draw the bonus token that follows it.

    `contract.INPUTS` says what the operands are.

    Draft j is accepted if it is the target's argmax (temperature 0), or if
    `u_j * draft_probs_j < target_probs_j` at that token, which is u < min(1, p/q) without a
    division. So a certain draft is accepted with the target's own probability. The bonus comes from
    the residual max(target - draft, 0) at the first rejection, or from the target where the
    residual has no mass or all ℓ were accepted.

    A row with a non-finite target logit among those it needs (0..ℓ) gets `num_accepted` 0 and
    `bonus` -1. Non-finite draft logits cost acceptance, never exactness: the draft is rejected
    and the bonus drawn from the target.
    """
    num_rows, num_drafts = draft_tokens.shape
    vocab_size = logits.shape[1]
    temperatures: Floats = np.asarray(temperature, dtype=np.float32)
    greedy = np.asarray(temperatures == 0)[:, None]
    row = np.arange(num_rows)

    needed = np.arange(num_drafts + 1) <= lengths[:, None]
    planned = needed[:, 1:]
    cells = logits[np.where(needed, logit_rows, logit_rows[:, :1])]
    finite = np.asarray(np.isfinite(cells).all(axis=(1, 2)))
    cells[~finite] = 0
    target_probs = filtered_probs(
        cells.reshape(-1, vocab_size),
        np.repeat(temperatures, num_drafts + 1),
        np.repeat(top_k, num_drafts + 1),
        np.repeat(top_p, num_drafts + 1),
    ).reshape(num_rows, num_drafts + 1, vocab_size)

    # Zeros wherever nothing was drawn. They make the residual the target itself, so the bonus
    # after a fully accepted block needs no case of its own, and let a greedy row accept whatever
    # its one-hot target allows.
    draft_probs = np.zeros_like(target_probs)
    sure = (certain > 0)[:, None]
    named = np.nonzero(planned & ~greedy & sure)
    draft_probs[(*named, draft_tokens[named])] = 1
    proposing = np.nonzero(planned & ~greedy & ~sure)
    position_probs = softmax(draft_logits[proposing], temperatures[proposing[0]])
    draft_probs[(*(index[:, None] for index in proposing), draft_vocab)] = position_probs

    tokens = np.where(planned, draft_tokens, 0)[..., None]
    target_prob = np.take_along_axis(target_probs[:, :-1], tokens, axis=2)[..., 0]
    draft_prob = np.take_along_axis(draft_probs[:, :-1], tokens, axis=2)[..., 0]
    draws = np.where(planned, uniforms[:, :num_drafts], np.float32(0))
    matched = draws * draft_prob < target_prob
    num_accepted = np.cumprod(matched & planned & finite[:, None], axis=1).sum(axis=1)

    residual = residual_probs(target_probs[row, num_accepted], draft_probs[row, num_accepted])
    bonus = np.where(finite, sample(residual, uniforms[:, -1]), -1)
    return VerifyResult(num_accepted=num_accepted.astype(np.int64), bonus=bonus)


def residual_probs(target_probs: Floats, draft_probs: Floats) -> Floats:
    """What the bonus is drawn from after a rejection, not normalised. [N, V].

    max(target - draft, 0), or the target where that has no more than `MIN_RESIDUAL_MASS`.
    """
    residual = np.maximum(target_probs - draft_probs, np.float32(0))
    # Written so that a residual of NaN, from non-finite draft logits, falls back to the target.
    has_mass = residual.sum(axis=1, keepdims=True, dtype=np.float64) > MIN_RESIDUAL_MASS
    return np.where(has_mass, residual, target_probs)
