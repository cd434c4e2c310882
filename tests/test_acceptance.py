"""Acceptance is lossless: by enumeration on small vocabularies and by chi-square on many rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dspark_batch.decode.algorithm.sampling import filtered_probs, sample, softmax, uniforms
from dspark_batch.decode.types import VerifyResult
from dspark_batch.models.plugin.specification import residual_probs, verify

Array = NDArray[Any]
LARGEST_UNIFORM = np.float32(1 - 2**-24)


# --- sampling ---------------------------------------------------------------------------------


def naive_filtered(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """One distribution in float64, by the definitions."""
    if temperature == 0:
        return np.asarray(np.eye(len(logits))[int(np.argmax(logits))])
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    if 0 < top_k < len(logits):
        weights[weights < sorted(weights, reverse=True)[top_k - 1]] = 0
    probs = weights / weights.sum()
    if top_p < 1:
        mass = 0.0
        for last in sorted(probs, reverse=True):
            mass += last
            if mass >= top_p:
                break
        probs = np.where(probs >= last, probs, 0)
    return np.asarray(probs / probs.sum())


def test_uniforms_depend_on_seed_and_position_only() -> None:
    seeds, positions = np.array([7, 7, 8, 2**40, -3]), np.array([5, 6, 5, 90_000, 0])
    draws = uniforms(seeds, positions, num=9)
    assert draws.dtype == np.float32
    assert draws.shape == (5, 9)
    assert len(np.unique(draws)) == draws.size
    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_array_equal(uniforms(seeds[order], positions[order], num=9), draws[order])
    np.testing.assert_array_equal(uniforms(seeds, positions, num=4), draws[:, :4])


def test_uniforms_are_uniform_and_independent_across_columns_seeds_and_positions() -> None:
    for seeds, positions in (
        (np.arange(6000), np.zeros(6000, dtype=np.int64)),
        (np.zeros(6000, dtype=np.int64), np.arange(6000)),
    ):
        draws = uniforms(seeds, positions, num=5)
        assert draws.min() >= 0
        assert draws.max() < 1
        assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
        for series in (*draws.T[1:], np.roll(draws[:, 0], 1)):
            assert stats.pearsonr(draws[:, 0], series).pvalue > 1e-3


def test_filters_equal_their_definitions_in_one_mixed_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 11)).astype(np.float32) * 3
    temperature = rng.choice([0.0, 0.3, 1.0, 2.0], size=300).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 5, 11, 50], size=300)
    top_p = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], size=300).astype(np.float32)
    probs = filtered_probs(logits, temperature, top_k, top_p)
    expected = [naive_filtered(*row) for row in zip(logits, temperature, top_k, top_p, strict=True)]
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, np.array(expected), atol=1e-6)
    np.testing.assert_array_equal(probs > 0, np.array(expected) > 0)


def test_filters_keep_ties_of_the_last_token_kept() -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.4, 0.2, 0.1]], dtype=np.float32))
    for top_k, top_p in ((2, 1.0), (0, 0.55)):
        probs = filtered_probs(logits, [1.0], [top_k], [top_p])
        np.testing.assert_allclose(probs, [[0.0, 0.25, 0.5, 0.25, 0.0]], atol=1e-6)


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    # Of the top two, 4/7 = 0.57 is enough for 0.5; of all four, 0.4 is not.
    assert (filtered_probs(logits, [1.0], [2], [0.5]) > 0).tolist() == [[True, False, False, False]]
    assert (filtered_probs(logits, [1.0], [0], [0.5]) > 0).tolist() == [[True, True, False, False]]


def test_top_p_is_reached_by_equality() -> None:
    logits = np.array([[0.3, 1.7, -0.4]], dtype=np.float32)
    top_p = softmax(logits, [1.0]).max()
    assert (filtered_probs(logits, [1.0], [0], [top_p]) > 0).tolist() == [[False, True, False]]


def test_top_p_that_rounding_puts_out_of_reach_keeps_everything() -> None:
    logits = np.random.default_rng(2).normal(size=(200, 40)).astype(np.float32)
    ones = np.ones(200)
    top_p = np.nextafter(np.float32(1), np.float32(0))
    out_of_reach = softmax(logits, ones).sum(axis=1, dtype=np.float64) < top_p
    assert out_of_reach.any()
    probs = filtered_probs(logits, ones, 0 * ones, top_p * ones)
    assert (probs[out_of_reach] > 0).all()


def test_greedy_is_one_hot_at_the_first_largest() -> None:
    logits = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, -1.0]], dtype=np.float32)
    probs = filtered_probs(logits, [0.0, 0.0], [2, 0], [0.3, 1.0])
    np.testing.assert_array_equal(probs, [[0, 1, 0], [1, 0, 0]])


def test_probabilities_survive_extreme_logits_and_temperatures() -> None:
    logits = np.array([[-np.inf, 3e38, -3e38], [90.0, 91.0, -np.inf]], dtype=np.float32)
    probs = filtered_probs(logits, [1e-30, 1.0], [0, 0], [1.0, 1.0])
    np.testing.assert_allclose(probs, [[0.0, 1.0, 0.0], [0.26894142, 0.73105858, 0.0]], atol=1e-6)


def test_sample_is_the_inverse_cdf_and_never_draws_a_token_without_mass() -> None:
    weights = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0], dtype=np.float32)
    draws = np.array([0.0, 0.4999, 0.5, 0.7499, 0.75, LARGEST_UNIFORM], dtype=np.float32)
    drawn = sample(np.tile(weights, (6, 1)), draws)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]
    rng = np.random.default_rng(1)
    sparse = rng.random((500, 40)).astype(np.float32) * (rng.random((500, 40)) < 0.2)
    sparse[:, 17] += np.float32(1e-6)
    for edge in (np.float32(0), LARGEST_UNIFORM):
        assert (sparse[np.arange(500), sample(sparse, np.full(500, edge))] > 0).all()


# --- losslessness by enumeration --------------------------------------------------------------

BONUS_GRID = 1000


@dataclass
class World:
    """A target and a draft over a small vocabulary: logits for every context of 0..2 tokens."""

    target_logits: Array
    """[1 + V + V*V, V]: contexts (), (x1), (x1, x2)."""
    draft_logits: Array
    """[1 + V, Vd]"""
    draft_vocab: Array
    temperature: float
    top_k: int
    top_p: float
    certain: tuple[int, int] | None = None
    """What is proposed with certainty; else the draft draws."""

    @property
    def vocab_size(self) -> int:
        return int(self.target_logits.shape[1])

    def logit_rows(self, drafts: Array) -> Array:
        first, second = drafts.T
        size = self.vocab_size
        return np.stack([np.zeros_like(first), 1 + first, 1 + size + size * first + second], axis=1)

    def target_law(self) -> Array:
        """[contexts, V] in float64, by the definitions."""
        return np.array(
            [
                naive_filtered(row, self.temperature, self.top_k, self.top_p)
                for row in self.target_logits
            ]
        )

    def draft_law(self) -> Array:
        """[contexts, Vd] in float64."""
        return np.array(
            [naive_filtered(row, self.temperature, 0, 1.0) for row in self.draft_logits]
        )

    def verify(self, drafts: Array, lengths: Array, draws: Array) -> VerifyResult:
        num_rows = len(drafts)
        draft_rows = np.stack([np.zeros(num_rows, dtype=np.int64), 1 + drafts[:, 0]], axis=1)
        return verify(
            self.target_logits,
            self.logit_rows(drafts),
            drafts,
            lengths,
            np.full(num_rows, self.certain is not None),
            self.draft_logits[draft_rows],
            self.draft_vocab,
            np.full(num_rows, self.temperature),
            np.full(num_rows, self.top_k),
            np.full(num_rows, self.top_p),
            draws.astype(np.float32),
        )


def make_world(
    seed: int, *, vocab_size: int = 4, draft_vocab: tuple[int, ...], **filters: Any
) -> World:
    rng = np.random.default_rng(seed)
    contexts = 1 + vocab_size + vocab_size**2
    return World(
        (1.5 * rng.normal(size=(contexts, vocab_size))).astype(np.float32),
        (1.5 * rng.normal(size=(1 + vocab_size, len(draft_vocab)))).astype(np.float32),
        np.array(draft_vocab),
        **filters,
    )


def accept_thresholds(world: World, drafts: Array, position: int) -> Array:
    """[rows] the u below which draft `position` is accepted, by bisection on `verify` itself."""
    num_rows = len(drafts)
    low, high = np.zeros(num_rows), np.ones(num_rows)
    for _ in range(24):
        middle = (low + high) / 2
        draws = np.zeros((num_rows, 3))
        draws[:, position] = middle
        result = world.verify(drafts, np.full(num_rows, position + 1), draws)
        accepted = result.num_accepted > position
        low, high = np.where(accepted, middle, low), np.where(accepted, high, middle)
    return high


def bonus_law(world: World, drafts: Array, lengths: Array, num_accepted: Array) -> Array:
    """[rows, V] law of the bonus where `num_accepted` of each row are accepted."""
    num_rows = len(drafts)
    grid = (np.arange(BONUS_GRID) + 0.5) / BONUS_GRID
    draws = np.zeros((num_rows, BONUS_GRID, 3))
    draws[:, :, 2] = grid
    for position in range(2):
        draws[num_accepted == position, :, position] = LARGEST_UNIFORM
    result = world.verify(
        np.repeat(drafts, BONUS_GRID, axis=0),
        np.repeat(lengths, BONUS_GRID),
        draws.reshape(-1, 3),
    )
    tokens = result.bonus.reshape(num_rows, BONUS_GRID)
    law = np.stack([(tokens == v).mean(axis=1) for v in range(world.vocab_size)], axis=1)
    # Where even the largest u accepts, this outcome has no weight and its law is not wanted.
    happens = result.num_accepted.reshape(num_rows, -1)[:, :1] == num_accepted[:, None]
    return np.asarray(law * happens)


def law_of_first_two(world: World, plan: Array) -> Array:
    """[V, V] law of the first two tokens; `plan` [V] is ℓ by x1, which may decide about x2 only.

    A round that commits one token only is followed by a draw from the target, which is what the
    law of the first token of the next round is.
    """
    size = world.vocab_size
    target, draft = world.target_law(), world.draft_law()
    if world.certain is None:
        pairs = np.array([(x, y) for x in world.draft_vocab for y in world.draft_vocab])
        weights = (draft[0][:, None] * draft[1 + world.draft_vocab]).ravel()
    else:
        pairs, weights = np.array([world.certain]), np.ones(1)
    lengths = plan[pairs[:, 0]]
    accept = np.stack([accept_thresholds(world, pairs, j) for j in range(2)], axis=1)
    accept *= np.arange(2) < lengths[:, None]

    joint = np.zeros((size, size))
    zero, one = np.zeros(len(pairs), dtype=np.int64), np.ones(len(pairs), dtype=np.int64)
    first = weights * (1 - accept[:, 0])
    joint += (first @ bonus_law(world, pairs, lengths, zero))[:, None] * target[1 : 1 + size]
    second = weights * accept[:, 0] * (1 - accept[:, 1])
    np.add.at(joint, pairs[:, 0], second[:, None] * bonus_law(world, pairs, lengths, one))
    np.add.at(joint, tuple(pairs.T), weights * accept[:, 0] * accept[:, 1])
    return joint


@pytest.mark.parametrize("draft_vocab", [(0, 1, 2, 3), (3, 1)], ids=["full", "reduced"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 2, 1.0), (1.3, 0, 0.6), (0.8, 3, 0.8)],
    ids=["unfiltered", "top-k", "top-p", "both"],
)
@pytest.mark.parametrize("plan", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (1, 2, 1, 2)], ids=str)
def test_the_first_two_tokens_have_the_target_law(
    plan: tuple[int, ...],
    temperature: float,
    top_k: int,
    top_p: float,
    draft_vocab: tuple[int, ...],
) -> None:
    world = make_world(
        3, draft_vocab=draft_vocab, temperature=temperature, top_k=top_k, top_p=top_p
    )
    target = world.target_law()
    expected = target[0][:, None] * target[1 : 1 + world.vocab_size]
    np.testing.assert_allclose(law_of_first_two(world, np.array(plan)), expected, atol=1.2e-3)


@pytest.mark.parametrize("proposed", [(0, 0), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.8, 3, 0.8)], ids=["unfiltered", "both"]
)
def test_certain_proposals_leave_the_target_law(
    temperature: float, top_k: int, top_p: float, proposed: tuple[int, int]
) -> None:
    """Tokens of the draft's vocabulary and others, whatever its logits are."""
    world = make_world(
        3, draft_vocab=(3, 1), temperature=temperature, top_k=top_k, top_p=top_p, certain=proposed
    )
    target = world.target_law()
    expected = target[0][:, None] * target[1 : 1 + world.vocab_size]
    world.draft_logits[:] = np.nan
    for plan in (1, 2):
        law = law_of_first_two(world, np.full(world.vocab_size, plan))
        np.testing.assert_allclose(law, expected, atol=1.2e-3)
    # By the target's own probability is the acceptance as large as it can be.
    accepted = accept_thresholds(world, np.array([proposed]), 0)
    np.testing.assert_allclose(accepted, target[0][proposed[0]], atol=1e-6)


def test_the_third_token_after_a_full_block_has_the_target_law() -> None:
    world = make_world(5, draft_vocab=(0, 1, 2, 3), temperature=0.9, top_k=3, top_p=0.95)
    pairs = np.array([(x, y) for x in range(4) for y in range(4)])
    full = np.full(16, 2)
    law = bonus_law(world, pairs, full, full)
    allowed = law.sum(axis=1) > 0
    assert allowed.sum() > 5
    np.testing.assert_allclose(law[allowed], world.target_law()[5:][allowed], atol=1.2e-3)


# --- losslessness by chi-square ---------------------------------------------------------------


@pytest.mark.parametrize("lengths", [0, 1, 3, "mixed"])
def test_many_rows_emit_the_target_law(lengths: int | str) -> None:
    num_rows, block_size, vocab_size = 20_000, 3, 6
    rng = np.random.default_rng(4)
    draft_vocab = np.array([4, 0, 2, 5])
    # One context table for all: position 0, then by the last token.
    target_logits = rng.normal(size=(1 + vocab_size, vocab_size)).astype(np.float32)
    draft_table = rng.normal(size=(1 + vocab_size, 4)).astype(np.float32)
    filters = (np.full(num_rows, 0.8), np.full(num_rows, 5), np.full(num_rows, 0.97))
    draws = uniforms(np.arange(num_rows), np.full(num_rows, 11), num=2 * block_size + 1)

    tokens = np.zeros((num_rows, block_size), dtype=np.int64)
    draft_logits = np.zeros((num_rows, block_size, 4), dtype=np.float32)
    rows = np.zeros((num_rows, block_size + 1), dtype=np.int64)
    for position in range(block_size):
        draft_logits[:, position] = draft_table[rows[:, position]]
        drawn = sample(softmax(draft_logits[:, position], filters[0]), draws[:, position])
        tokens[:, position] = draft_vocab[drawn]
        rows[:, position + 1] = 1 + tokens[:, position]
    planned = (
        rng.integers(0, block_size + 1, size=num_rows)
        if lengths == "mixed"
        else np.full(num_rows, lengths)
    )
    result = verify(
        target_logits,
        rows,
        tokens,
        planned,
        np.zeros(num_rows, np.int64),
        draft_logits,
        draft_vocab,
        *filters,
        draws[:, block_size:],
    )
    first = np.where(result.num_accepted > 0, tokens[:, 0], result.bonus)
    law = naive_filtered(target_logits[0], 0.8, 5, 0.97)
    observed = np.bincount(first, minlength=vocab_size)
    assert observed[law == 0].sum() == 0
    assert stats.chisquare(observed[law > 0], num_rows * law[law > 0]).pvalue > 1e-3
    # What follows an accepted first token is the target's as well.
    two = (result.num_accepted >= 1) & (tokens[:, 0] == 4) & (planned >= 1)
    if two.any():
        after = np.where(result.num_accepted > 1, tokens[:, min(1, block_size - 1)], result.bonus)
        law = naive_filtered(target_logits[5], 0.8, 5, 0.97)
        observed = np.bincount(after[two], minlength=vocab_size)
        expected = two.sum() * law[law > 0]
        assert stats.chisquare(observed[law > 0], expected).pvalue > 1e-3


# --- rules ------------------------------------------------------------------------------------


def random_round(
    seed: int, *, num_rows: int = 64, block_size: int = 4, vocab_size: int = 5
) -> dict[str, Any]:
    """Operands of `verify` with temperatures, filters and lengths of every kind."""
    rng = np.random.default_rng(seed)
    num_logits = num_rows * (block_size + 1)
    return {
        "logits": rng.normal(size=(num_logits, vocab_size)).astype(np.float32),
        "logit_rows": rng.permutation(num_logits).reshape(num_rows, block_size + 1),
        "draft_tokens": rng.integers(0, 3, size=(num_rows, block_size)),
        "lengths": rng.integers(0, block_size + 1, size=num_rows),
        "certain": np.zeros(num_rows, np.int64),
        "draft_logits": rng.normal(size=(num_rows, block_size, 3)).astype(np.float32),
        "draft_vocab": np.array([2, 0, 1]),
        "temperature": rng.choice([0.0, 0.7, 1.0], size=num_rows),
        "top_k": rng.choice([0, 3], size=num_rows),
        "top_p": rng.choice([0.9, 1.0], size=num_rows),
        "uniforms": rng.random((num_rows, block_size + 1)).astype(np.float32),
    }


def test_greedy_accepts_the_longest_matching_prefix_then_the_argmax() -> None:
    operands = random_round(0, num_rows=400, vocab_size=3)
    operands["temperature"][:] = 0
    operands["draft_logits"][:] = np.nan
    operands["uniforms"][:] = LARGEST_UNIFORM
    result = verify(**operands)
    for row in range(400):
        best = operands["logits"][operands["logit_rows"][row]].argmax(axis=1)
        accepted = 0
        while (
            accepted < operands["lengths"][row]
            and best[accepted] == operands["draft_tokens"][row, accepted]
        ):
            accepted += 1
        assert result.num_accepted[row] == accepted
        assert result.bonus[row] == best[accepted]
    assert set(np.unique(result.num_accepted)) == {0, 1, 2, 3, 4}


def test_padding_never_matters() -> None:
    operands = random_round(1)
    clean = verify(**operands)
    beyond = np.arange(4) >= operands["lengths"][:, None]
    assert beyond.any()
    operands["draft_tokens"][beyond] = 10**6
    operands["draft_logits"][beyond] = np.nan
    operands["uniforms"][:, :4][beyond] = np.nan
    used = np.zeros(len(operands["logits"]), dtype=bool)
    used[operands["logit_rows"][:, :1]] = True
    used[operands["logit_rows"][:, 1:][~beyond]] = True
    operands["logits"][~used] = np.nan
    for padding_row in (int(np.flatnonzero(~used)[0]), -1, 10**9):
        operands["logit_rows"][:, 1:][beyond] = padding_row
        padded = verify(**operands)
        np.testing.assert_array_equal(padded.num_accepted, clean.num_accepted)
        np.testing.assert_array_equal(padded.bonus, clean.bonus)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    operands = random_round(2)
    together = verify(**operands)
    shared = ("logits", "draft_vocab")
    for row in range(0, 64, 5):
        alone = verify(**{k: v if k in shared else v[row : row + 1] for k, v in operands.items()})
        assert alone.num_accepted[0] == together.num_accepted[row]
        assert alone.bonus[0] == together.bonus[row]


def test_a_draft_equal_to_the_target_is_accepted_in_full_and_extended() -> None:
    operands = random_round(3, vocab_size=3)
    operands["lengths"][:] = 4
    operands["temperature"][:] = 0.7
    operands["top_k"][:], operands["top_p"][:] = 0, 1
    operands["draft_vocab"] = np.arange(3)
    operands["draft_logits"] = operands["logits"][operands["logit_rows"][:, :4]]
    result = verify(**operands)
    assert (result.num_accepted == 4).all()
    last = filtered_probs(
        operands["logits"][operands["logit_rows"][:, 4]],
        operands["temperature"],
        operands["top_k"],
        operands["top_p"],
    )
    np.testing.assert_array_equal(result.bonus, sample(last, operands["uniforms"][:, 4]))


def test_a_token_that_the_filters_exclude_is_rejected_even_at_u_zero() -> None:
    operands = random_round(6, vocab_size=3)
    operands["temperature"][:] = 1
    operands["top_k"][:] = 1
    operands["lengths"][:] = 1
    operands["uniforms"][:] = 0
    result = verify(**operands)
    best = operands["logits"][operands["logit_rows"][:, 0]].argmax(axis=1)
    matches = best == operands["draft_tokens"][:, 0]
    assert 0 < matches.sum() < 64
    np.testing.assert_array_equal(result.num_accepted, matches)
    np.testing.assert_array_equal(result.bonus[~matches], best[~matches])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_target_logit_marks_its_row_and_no_other(value: float) -> None:
    operands = random_round(7)
    clean = verify(**operands)
    marked = np.zeros(64, dtype=bool)
    for row in range(0, 64, 3):
        needed = row % 5
        operands["logits"][operands["logit_rows"][row, needed], 1] = value
        marked[row] = needed <= operands["lengths"][row]
    assert marked.any()
    assert not marked[::3].all()
    result = verify(**operands)
    assert (result.num_accepted[marked] == 0).all()
    assert (result.bonus[marked] == -1).all()
    np.testing.assert_array_equal(result.num_accepted[~marked], clean.num_accepted[~marked])
    np.testing.assert_array_equal(result.bonus[~marked], clean.bonus[~marked])


def test_non_finite_draft_logits_are_rejected_and_the_target_decides() -> None:
    operands = random_round(8)
    operands["lengths"][:] = 4
    operands["temperature"][:] = 1
    operands["draft_logits"][:, 0, 1] = np.nan
    result = verify(**operands)
    target = filtered_probs(
        operands["logits"][operands["logit_rows"][:, 0]],
        operands["temperature"],
        operands["top_k"],
        operands["top_p"],
    )
    assert (result.num_accepted == 0).all()
    np.testing.assert_array_equal(result.bonus, sample(target, operands["uniforms"][:, 4]))


def test_the_residual_without_mass_is_the_target() -> None:
    target = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=np.float32)
    draft = np.array([[0.5, 0.5, 0.0], [0.75, 0.0, 0.25]], dtype=np.float32)
    np.testing.assert_array_equal(residual_probs(target, draft), [[0.5, 0.5, 0], [0, 0.5, 0]])


def test_a_block_of_size_zero_is_plain_decoding() -> None:
    operands = random_round(9, block_size=0)
    result = verify(**operands)
    target = filtered_probs(
        operands["logits"][operands["logit_rows"][:, 0]],
        operands["temperature"],
        operands["top_k"],
        operands["top_p"],
    )
    assert (result.num_accepted == 0).all()
    np.testing.assert_array_equal(result.bonus, sample(target, operands["uniforms"][:, 0]))
