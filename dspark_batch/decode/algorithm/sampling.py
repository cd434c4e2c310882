"""Uniforms of a row, probabilities from logits, and the inverse-CDF draw.

Shapes: N distributions, V vocabulary, R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]

# A float32 holds 24 significant bits, so `k * 2**-24` is exact and never rounds up to 1.
_UNIFORM_BITS = 24


def uniforms(seeds: ArrayLike, positions: ArrayLike, *, num: int) -> Floats:
    """Draws [R, num] in [0, 1) that depend on a row's seed and position only (Philox 4x64).

    `positions` [R] is the absolute index of the token whose successors are drawn: the anchor of a
    round, the last prompt token for the first anchor. Each position serves one round of a row, so
    no draw is used twice. One call serves a whole round: its columns are independent, and asking
    for more of them leaves the first ones as they are. Negative seeds wrap.
    """
    keys = np.asarray(seeds).astype(np.uint64)
    counters = np.asarray(positions).astype(np.uint64)
    raw = np.empty((len(keys), num), dtype=np.uint64)
    # Moving one generator to each row's counter is four times as fast as constructing them. The
    # lowest counter word counts the blocks of a row, so positions cannot overlap.
    generator = np.random.Philox(key=0)
    state = generator.state
    for row, (key, counter) in enumerate(zip(keys, counters, strict=True)):
        state["state"]["key"][0] = key
        state["state"]["counter"][1] = counter
        generator.state = state
        raw[row] = generator.random_raw(num)
    return (raw >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float32) * np.float32(
        2.0**-_UNIFORM_BITS
    )


def softmax(logits: Reals, temperature: ArrayLike) -> Floats:
    """Probabilities [N, V] of `logits` [N, V] / `temperature` [N], which must be positive.

    A row with a NaN or +inf, or with nothing but -inf, becomes NaN throughout.
    """
    divisor = np.asarray(temperature, dtype=np.float32)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = logits.astype(np.float32)
        scaled = (scaled - scaled.max(axis=1, keepdims=True)) / divisor
        weights = np.exp(scaled)
        probs: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probs


def filtered_probs(
    logits: Reals, temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike
) -> Floats:
    """What a row may emit: temperature, then top-k (0 = off), then top-p (1 = off). [N, V].

    The order is Hugging Face's. Tokens as probable as the last one that a filter keeps are kept
    too, so the result does not depend on how a sort breaks ties: the last one is the k-th largest
    (top-k), or the one with which the descending sum of the renormalised top-k distribution
    reaches `top_p`. Temperature 0 is one-hot at the argmax, the first index on ties.
    """
    temperature = np.asarray(temperature, dtype=np.float32)
    top_k = np.asarray(top_k, dtype=np.int64)
    top_p = np.asarray(top_p, dtype=np.float32)
    vocab_size = logits.shape[1]
    greedy = temperature == 0
    probs = softmax(logits, np.where(greedy, np.float32(1), temperature))

    rows = np.flatnonzero((top_k > 0) & (top_k < vocab_size))
    if len(rows):
        ranked = np.sort(probs[rows], axis=1)[:, ::-1]
        probs[rows] = _at_least(probs[rows], ranked, last=top_k[rows] - 1)

    rows = np.flatnonzero(top_p < 1)
    if len(rows):
        ranked = np.sort(probs[rows], axis=1)[:, ::-1]
        mass = np.cumsum(ranked, axis=1, dtype=np.float64)
        short = (mass < top_p[rows, None]).sum(axis=1)
        # Rounding can leave the whole mass below top_p: everything is kept then.
        probs[rows] = _at_least(probs[rows], ranked, last=np.minimum(short, vocab_size - 1))

    rows = np.flatnonzero(greedy)
    probs[rows] = 0
    probs[rows, np.argmax(logits[rows], axis=1)] = 1
    return probs


def _at_least(probs: Floats, ranked: Floats, *, last: NDArray[np.int64]) -> Floats:
    """`probs` [N, V] without what is less probable than `ranked[n, last[n]]`, renormalised."""
    threshold = np.take_along_axis(ranked, last[:, None], axis=1)
    kept = np.where(probs >= threshold, probs, np.float32(0))
    renormalised: Floats = kept / kept.sum(axis=1, keepdims=True)
    return renormalised


def sample(probs: Reals, u: ArrayLike) -> NDArray[np.int64]:
    """Inverse CDF: the first index i of a row with cumsum_i > u * total. [N].

    `probs` [N, V] need not be normalised but must have mass; u [N] in [0, 1). A token without
    mass is never drawn. The sums are float64: in float32 the tail of a large vocabulary is lost.
    """
    cumulative = np.cumsum(probs, axis=1, dtype=np.float64)
    draws = np.asarray(u, dtype=np.float64)
    drawn: NDArray[np.int64] = np.argmax(cumulative > (draws * cumulative[:, -1])[:, None], axis=1)
    return drawn
