"""How many draft tokens of each row to verify: Algorithm 1 and what it is compared with.

A plan must not anticipate: whether draft token k is verified may depend only on what was known
before k was drawn. Confidence k+1 depends on token k, so a rule that looks at it to decide about
k leaks the token's value into the output distribution. `early_stop`, `fixed` and `threshold` do
not look; `global_best` does.

Shapes: R rows, γ block size. B is the verify batch, Σ(1 + ℓ); Θ = τ / seconds, the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_batch.algorithm.costs import CostTable as CostTable
from dspark_batch.algorithm.sampling import Reals

Lengths = NDArray[np.int64]


def early_stop(
    confidence: Reals, max_lengths: Lengths, step_seconds: Callable[[int], float]
) -> Lengths:
    """Lengths [R] by Algorithm 1: admit draft tokens by survival until Θ stops rising.

    `confidence` [R, γ] is calibrated; `max_lengths` [R] caps a row (tokens left, context left);
    `step_seconds(B)` is the cost of the round, to which a caller may add the draft's: a constant
    does not change what is known when. A draft token is admitted only if Θ strictly improves; a
    confidence of 0 or NaN never is. Equal survivals keep the smaller position first, then the
    smaller row: an order that no token's value can change.
    """
    rows, survival = _ranked(confidence, max_lengths)
    lengths = np.zeros(len(max_lengths), dtype=np.int64)
    num_tokens = len(lengths)
    expected = float(num_tokens)
    best = expected / step_seconds(num_tokens) if num_tokens else 0.0
    for row, gain in zip(rows.tolist(), survival.tolist(), strict=True):
        num_tokens += 1
        expected += gain
        objective = expected / step_seconds(num_tokens)
        if objective <= best:
            break
        best = objective
        lengths[row] += 1
    return lengths


def global_best(
    confidence: Reals, max_lengths: Lengths, step_seconds: Callable[[int], float]
) -> Lengths:
    """Lengths [R] of the largest Θ over all plans; the shortest plan among equals.

    Anticipating: verifying by these lengths biases the output. Only for a budget that past rounds
    decide, and for comparison with `early_stop`, which finds the same where Θ has one peak.
    """
    num_rows = len(max_lengths)
    if num_rows == 0:
        return np.zeros(0, dtype=np.int64)
    rows, survival = _ranked(confidence, max_lengths)
    num_admitted = int(np.argmax(_objectives(survival, num_rows, step_seconds)))
    return np.asarray(np.bincount(rows[:num_admitted], minlength=num_rows), dtype=np.int64)


def fixed(max_lengths: Lengths) -> Lengths:
    """Verify everything that is allowed. [R]."""
    return max_lengths.copy()


def threshold(confidence: Reals, max_lengths: Lengths, value: float) -> Lengths:
    """Stop a row at the first draft token whose own confidence is below `value`. [R].

    DeepSpec's static rule; per token, not the cumulative product. 0 verifies everything.
    """
    passed = np.cumprod(confidence >= value, axis=1).sum(axis=1)
    return np.asarray(np.minimum(passed, max_lengths), dtype=np.int64)


def expected_tokens(survival_by_position: Reals, max_lengths: Lengths) -> NDArray[np.float64]:
    """Tokens [R] that a round of these lengths commits on average, the bonus counted.

    `survival_by_position` is [γ], or [R, γ] where rows differ: unconditional, as `survival` of
    `AcceptanceEstimate`.
    """
    verified = np.arange(survival_by_position.shape[-1]) < max_lengths[:, None]
    gains: NDArray[np.float64] = np.where(verified, survival_by_position, 0.0).sum(axis=1)
    return 1.0 + gains


def worth_drafting(survival_by_position: Reals, max_lengths: Lengths, costs: CostTable) -> bool:
    """Whether a round with a draft is expected to beat plain decoding: asked before drafting.

    `survival_by_position` [R, γ] is what past rounds lead one to expect, so the search may be
    global. The draft's own cost counts on its side: max over B of τ / (draft + verify(B)),
    against R / verify(R).
    """
    num_rows = len(max_lengths)
    if num_rows == 0:
        return False
    verify_seconds = costs.verify_curve(num_rows)
    draft_seconds = costs.draft(num_rows)
    _, survival = _ranked_survival(survival_by_position, max_lengths)
    speculative = _objectives(survival, num_rows, lambda b: draft_seconds + verify_seconds(b))
    return bool(speculative.max() > num_rows / verify_seconds(num_rows))


@dataclass(frozen=True, slots=True, eq=False)
class AcceptanceEstimate:
    """Acceptance by position of a group of rows, learnt from its past rounds.

    A round says nothing about positions that were not reached: those after the first rejection
    and those not verified. So what is counted is the conditional acceptance, accepted / seen, per
    position; survival is its running product. Counts fade by `decay` a round, towards the prior,
    which weighs as much as `prior_weight` observations: a group that stops drafting returns to
    the prior, and so tries again.

    Bias to know: rows chosen for long plans are the confident ones, so deep positions look better
    than they would for all rows.
    """

    prior: NDArray[np.float64]
    """[γ] conditional acceptance to start from."""
    prior_weight: float
    """Observations that the prior counts for at each position; positive."""
    decay: float
    """What remains of a count after a round, in (0, 1]."""
    accepted: NDArray[np.float64]
    """[γ] decayed number of accepted draft tokens."""
    seen: NDArray[np.float64]
    """[γ] decayed number of draft tokens whose acceptance was tested."""

    @classmethod
    def from_prior(cls, prior: ArrayLike, *, prior_weight: float, decay: float) -> Self:
        """An estimate without observations; `prior` [γ] is conditional acceptance.

        Raises ValueError where a weight or the decay is out of its range.
        """
        if not (prior_weight > 0 and 0 < decay <= 1):
            raise ValueError(f"prior_weight {prior_weight} or decay {decay} is out of range")
        start = np.asarray(prior, dtype=np.float64)
        zeros = np.zeros_like(start)
        return cls(start, prior_weight, decay, accepted=zeros, seen=zeros)

    def observe(self, lengths: ArrayLike, num_accepted: ArrayLike) -> Self:
        """The estimate after one more round of the group: verified and accepted counts [R].

        A plain round (all lengths 0) only fades what was known.
        """
        positions = np.arange(len(self.prior))
        accepted = np.asarray(num_accepted, dtype=np.int64)[:, None]
        reached = np.minimum(accepted + 1, np.asarray(lengths, dtype=np.int64)[:, None])
        return type(self)(
            self.prior,
            self.prior_weight,
            self.decay,
            accepted=self.decay * self.accepted + (positions < accepted).sum(axis=0),
            seen=self.decay * self.seen + (positions < reached).sum(axis=0),
        )

    @property
    def conditional(self) -> NDArray[np.float64]:
        """[γ] probability that a draft token is accepted given all before it were."""
        pseudo_accepted = self.accepted + self.prior_weight * self.prior
        conditional: NDArray[np.float64] = pseudo_accepted / (self.seen + self.prior_weight)
        return conditional

    @property
    def survival(self) -> NDArray[np.float64]:
        """[γ] probability that the block is accepted up to a position: unconditional."""
        return np.asarray(np.cumprod(self.conditional), dtype=np.float64)


def _objectives(
    survival: NDArray[np.float64], num_rows: int, step_seconds: Callable[[int], float]
) -> NDArray[np.float64]:
    """Θ after admitting the first 0, 1, ... of `survival`, which is in descending order."""
    expected = num_rows + np.concatenate([[0.0], np.cumsum(survival)])
    seconds = [step_seconds(num_rows + admitted) for admitted in range(len(expected))]
    objectives: NDArray[np.float64] = expected / np.asarray(seconds)
    return objectives


def _ranked(
    confidence: Reals, max_lengths: Lengths
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Row and survival of every admissible draft token, the most likely first."""
    survival = np.cumprod(np.clip(confidence, 0.0, 1.0), axis=1, dtype=np.float64)
    return _ranked_survival(survival, max_lengths)


def _ranked_survival(
    survival: Reals, max_lengths: Lengths
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """As `_ranked`, from survivals [R, γ] that do not rise along a row."""
    admissible = (np.arange(survival.shape[1]) < max_lengths[:, None]) & (survival > 0)
    rows, positions = np.nonzero(admissible)
    candidates = survival[rows, positions].astype(np.float64)
    order = np.lexsort((rows, positions, -candidates))
    return rows[order], candidates[order]
