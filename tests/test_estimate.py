"""Acceptance that is estimated while a job runs, and what drafting saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.decode.algorithm.estimate import Estimator
from dspark_batch.decode.saving import Saving

Array = NDArray[Any]
GAMMA = 4


def play(
    estimator: Estimator,
    truth: float | Array,
    given: float | Array,
    *,
    rounds: int,
    evidence: int = 0,
    lengths: int = GAMMA,
    seed: int = 0,
) -> None:
    """Rounds of 8 rows whose tokens are accepted with probability `truth` [γ]."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        confidence = np.full((8, GAMMA), 0.0) + given
        passed = rng.random((8, GAMMA)) < truth
        accepted = np.minimum(np.cumprod(passed, axis=1).sum(axis=1), lengths)
        estimator.learn(confidence, np.full(8, evidence), np.full(8, lengths), accepted)


def believed(estimator: Estimator, given: float, *, evidence: int = 0) -> Array:
    return estimator.corrected(np.full((1, GAMMA), given), np.array([evidence]))[0]


def test_before_anything_was_seen_confidence_is_what_was_given() -> None:
    confidence = np.random.default_rng(0).uniform(0.01, 0.99, (5, GAMMA))
    for evidence in (None, np.array([0, 1, 2, 8, 50])):
        found = Estimator(GAMMA).corrected(confidence, evidence)
        np.testing.assert_allclose(found, confidence, atol=1e-9)


def test_what_can_never_be_accepted_stays_so() -> None:
    estimator = Estimator(GAMMA)
    confidence = np.array([[0.0, np.nan, 0.5, 0.9]] * 2)
    for _ in range(20):
        estimator.learn(confidence, None, np.full(2, GAMMA), np.full(2, GAMMA))
    found = estimator.corrected(confidence, None)[0]
    assert found[0] == 0
    assert np.isnan(found[1])
    assert 0.5 < found[2] < 1


@pytest.mark.parametrize("evidence", [0, 3])
@pytest.mark.parametrize(("given", "truth"), [(0.5, 0.9), (0.9, 0.3), (0.55, 0.6)])
def test_it_comes_to_what_is_accepted(given: float, truth: float, evidence: int) -> None:
    """At every position, though a late one is seen only where all before it were accepted."""
    estimator = Estimator(GAMMA)
    play(estimator, truth, given, rounds=200, evidence=evidence)
    np.testing.assert_allclose(believed(estimator, given, evidence=evidence)[:2], truth, atol=0.06)
    assert np.abs(believed(estimator, given, evidence=evidence) - truth).max() < 0.2


def test_positions_are_told_apart() -> None:
    estimator, truth = Estimator(GAMMA), np.array([0.9, 0.5, 0.9, 0.5])
    play(estimator, truth, 0.7, rounds=300)
    np.testing.assert_allclose(believed(estimator, 0.7), truth, atol=0.1)


def test_tokens_that_were_not_verified_teach_nothing() -> None:
    estimator = Estimator(GAMMA)
    play(estimator, 1.0, 0.5, rounds=100, lengths=2)
    found = believed(estimator, 0.5)
    assert (found[:2] > 0.9).all()
    np.testing.assert_allclose(found[2:], 0.5)
    play(estimator, 0.0, 0.5, rounds=100, lengths=0)
    assert (believed(estimator, 0.5)[:2] > 0.9).all()


def test_drafters_are_told_apart_and_levels_learn_from_each_other() -> None:
    estimator = Estimator(GAMMA)
    play(estimator, 0.95, 0.5, rounds=50, evidence=2)
    network, known, other = (
        believed(estimator, 0.5, evidence=evidence)[0] for evidence in (0, 2, 7)
    )
    assert network == pytest.approx(0.5)
    assert known > 0.9
    assert other > 0.8  # nothing was seen of this level but that it is a lookup's


def test_intervals_of_confidence_are_told_apart() -> None:
    """Confidence may promise too little where it is high, and too much where it is low."""
    estimator = Estimator(GAMMA)
    for seed in range(150):
        play(estimator, 0.97, 0.85, rounds=1, seed=seed)
        play(estimator, 0.1, 0.3, rounds=1, seed=1000 + seed)
    assert believed(estimator, 0.85)[0] > 0.93
    assert believed(estimator, 0.3)[0] < 0.17


def test_the_past_fades() -> None:
    estimator = Estimator(GAMMA)
    play(estimator, 0.95, 0.5, rounds=500)
    play(estimator, 0.2, 0.5, rounds=250, seed=1)
    assert believed(estimator, 0.5)[0] == pytest.approx(0.2, abs=0.08)


def test_a_token_s_estimate_depends_on_nothing_behind_it() -> None:
    """Else a plan could tell what was drawn: docs/scheduling.md."""
    estimator = Estimator(GAMMA)
    play(estimator, np.array([0.9, 0.3, 0.8, 0.2]), 0.5, rounds=50)
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0, 1, (6, GAMMA))
    for k in range(GAMMA):
        other = confidence.copy()
        other[:, k + 1 :] = rng.uniform(0, 1, other[:, k + 1 :].shape)
        other[1:, :] = rng.uniform(0, 1, other[1:, :].shape)
        found = [estimator.corrected(c, None)[0, : k + 1] for c in (confidence, other)]
        np.testing.assert_array_equal(*found)


def test_what_drafting_saved_is_against_plain_rounds_of_as_many_rows() -> None:
    saving = Saving()
    saving.add(4, 11, 2.0, drafted=True)
    assert saving.seconds == 0.0  # nothing to compare with
    for seconds in (1.0, 3.0):
        saving.add(4, 4, seconds, drafted=False)
    assert saving.seconds == pytest.approx(11 / 4 * 2.0 - 2.0)
    saving.add(8, 8, 4.0, drafted=False)
    saving.add(6, 6, 5.0, drafted=True)  # between 4 rows and 8: a plain round takes 3 s
    expected = 11 / 4 * 2.0 - 2.0 + 3.0 - 5.0
    assert saving.seconds == pytest.approx(expected)
    for num_rows in (1, 64):  # what plain rounds of so many rows take was not seen
        saving.add(num_rows, 7 * num_rows, 0.1, drafted=True)
    assert saving.seconds == pytest.approx(expected)
