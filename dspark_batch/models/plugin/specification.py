"""The acceptance test of a round: the specification of the verification op.

Chain speculative sampling with the residual correction (Leviathan et al., 2023; Chen et al.,
2023): whatever the draft proposed, and however far a non-anticipating plan let it be verified,
what a row emits has the target's distribution.

Shapes: R rows, γ block size, V target vocabulary, Vd draft vocabulary, N logit rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_batch.decode import Tokens, VerifyResult
from dspark_batch.decode.algorithm import Floats, Reals, filtered_probs, sample, softmax

# Below this the residual is rounding noise: target and draft distributions are the same.
MIN_RESIDUAL_MASS = 1e-8


def verify(
    target_logits: Reals,
    logit_rows: NDArray[np.int64],
    draft_tokens: Tokens,
    lengths: NDArray[np.int64],
    draft_logits: Reals,
    draft_vocab: NDArray[np.int64],
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    uniforms: Floats,
    *,
    certain: ArrayLike = 0,
) -> VerifyResult:
    """Accept a prefix of each row's block and draw the bonus token that follows it.

    Operands: `target_logits` [N, V]; `logit_rows` [R, γ+1], the rows of it for the anchor and
    each draft token; `draft_tokens` [R, γ] in the target's vocabulary; `lengths` [R], ℓ;
    `draft_logits` [R, γ, Vd], from which the tokens were drawn at the row's temperature,
    unfiltered; `draft_vocab` [Vd], draft id -> target id; `temperature`, `top_k`, `top_p` [R];
    `uniforms` [R, γ+1], the last column for the bonus; `certain` [R], whether the tokens were
    proposed with probability 1 instead, as a lookup does, whatever the draft's logits and
    vocabulary are. Whatever lies beyond ℓ is padding and may hold anything.

    Draft token j is accepted iff it is the target's argmax (temperature 0), or iff
    `u_j * draft_probs_j < target_probs_j` at that token, which is u < min(1, p/q) without a
    division; so a certain token with the target's own probability. The bonus comes from the
    residual max(target - draft, 0) at the first rejection, or from the target where the residual
    has no mass or all ℓ were accepted.

    A row with a non-finite target logit among those it needs (0..ℓ) gets `num_accepted` 0 and
    `bonus` -1. Non-finite draft logits cost acceptance, never exactness: the token is rejected
    and the bonus drawn from the target.
    """
    num_rows, block_size = draft_tokens.shape
    vocab_size = target_logits.shape[1]
    temperatures: Floats = np.asarray(temperature, dtype=np.float32)
    greedy = np.asarray(temperatures == 0)[:, None]
    row = np.arange(num_rows)

    needed = np.arange(block_size + 1) <= lengths[:, None]
    planned = needed[:, 1:]
    logits = target_logits[np.where(needed, logit_rows, logit_rows[:, :1])]
    finite = np.asarray(np.isfinite(logits).all(axis=(1, 2)))
    logits[~finite] = 0
    target_probs = filtered_probs(
        logits.reshape(-1, vocab_size),
        np.repeat(temperatures, block_size + 1),
        np.repeat(np.asarray(top_k), block_size + 1),
        np.repeat(np.asarray(top_p), block_size + 1),
    ).reshape(num_rows, block_size + 1, vocab_size)

    # Zeros wherever nothing was drawn. They make the residual the target itself, so the bonus
    # after a fully accepted block needs no case of its own, and let a greedy row accept whatever
    # its one-hot target allows.
    draft_probs = np.zeros_like(target_probs)
    sure = np.broadcast_to(np.asarray(certain, dtype=bool), num_rows)[:, None]
    named = np.nonzero(planned & ~greedy & sure)
    draft_probs[(*named, draft_tokens[named])] = 1
    proposing = np.nonzero(planned & ~greedy & ~sure)
    position_probs = softmax(draft_logits[proposing], temperatures[proposing[0]])
    draft_probs[(*(index[:, None] for index in proposing), draft_vocab)] = position_probs

    tokens = np.where(planned, draft_tokens, 0)[..., None]
    target_prob = np.take_along_axis(target_probs[:, :-1], tokens, axis=2)[..., 0]
    draft_prob = np.take_along_axis(draft_probs[:, :-1], tokens, axis=2)[..., 0]
    draws = np.where(planned, uniforms[:, :-1], np.float32(0))
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
