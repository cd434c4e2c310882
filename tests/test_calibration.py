"""Sequential temperature scaling recovers known temperatures and lowers the calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.decode.algorithm.calibration import (
    TEMPERATURE_GRID,
    Rounds,
    apply,
    brier_score,
    calibrated,
    concatenate,
    discrimination,
    expected_calibration_error,
    fit,
    reliability,
)

Array = NDArray[Any]


def rounds(seed: int, temperatures: Array, *, num_rounds: int = 12_000) -> tuple[Array, Array]:
    """Logits [n, γ] and accepted counts [n] of a head that is right at `temperatures`."""
    rng = np.random.default_rng(seed)
    logits = (1.0 + 2.0 * rng.normal(size=(num_rounds, len(temperatures)))) * temperatures
    passed = rng.random(logits.shape) < 1 / (1 + np.exp(-logits / temperatures))
    return logits.astype(np.float32), np.cumprod(passed, axis=1).sum(axis=1)


def errors(logits: Array, accepted: Array, temperatures: Array) -> Array:
    """[γ] calibration error of survival."""
    survival = np.cumprod(apply(logits, temperatures), axis=1)
    return np.array(
        [expected_calibration_error(survival[:, k], accepted > k) for k in range(logits.shape[1])]
    )


def test_known_temperatures_are_recovered() -> None:
    true = np.array([1.0, 2.5, 0.4, 5.0])
    fitted = fit(*rounds(0, true))
    # One grid step is 1/8 of an octave; a gain below the tolerance is not worth one.
    assert np.abs(np.log2(fitted / true)).max() < 0.6
    assert set(fitted) <= set(TEMPERATURE_GRID)


def test_fitting_lowers_the_error_of_every_position_on_unseen_rounds() -> None:
    true = np.array([2.0, 2.5, 0.3, 4.0])
    fitted = fit(*rounds(1, true))
    unseen = rounds(2, true)
    before, after = errors(*unseen, np.ones(4)), errors(*unseen, fitted)
    assert (before > 0.03).all()
    assert (after < 0.02).all()


def test_each_position_is_fitted_on_the_survival_of_those_before_it() -> None:
    logits, accepted = rounds(3, np.array([3.0, 1.5, 0.5]))
    fitted = fit(logits, accepted)
    np.testing.assert_array_equal(fit(logits[:, :2], np.minimum(accepted, 2)), fitted[:2])
    for position in range(3):
        tried = np.tile(fitted, (49, 1))
        tried[:, position] = TEMPERATURE_GRID
        by_temperature = [errors(logits, accepted, t)[position] for t in tried]
        # Up to the tolerance, and to float32: this test multiplies confidences in another one.
        best = errors(logits, accepted, fitted)[position]
        assert min(by_temperature) - 2e-4 < best < min(by_temperature) + 0.0022
        nearer = np.abs(np.log(TEMPERATURE_GRID)) < np.abs(np.log(fitted[position])) - 1e-9
        assert (np.array(by_temperature)[nearer] > min(by_temperature) + 0.0018).all()


def test_logits_that_no_temperature_can_change_keep_temperature_one() -> None:
    fitted = fit(np.zeros((40, 3), dtype=np.float32), np.arange(40) % 4)
    assert fitted.tolist() == [1.0, 1.0, 1.0]


def test_the_grid_has_49_log_spaced_values_around_one() -> None:
    ascending = np.sort(TEMPERATURE_GRID)
    np.testing.assert_allclose(ascending, np.geomspace(0.125, 8, 49))


def test_apply_is_the_sigmoid_by_position_without_overflow() -> None:
    logits = np.array([[0.0, 3.0], [1e4, -1e4]], dtype=np.float32)
    confidence = apply(logits, np.array([2.0, 1.5]))
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence, [[0.5, 1 / (1 + np.exp(-2))], [1, 0]], rtol=1e-6)


def test_the_error_equals_its_definition_bin_by_bin() -> None:
    rng = np.random.default_rng(4)
    predicted = np.concatenate([rng.random(500), [0.0, 0.05, 0.999999, 1.0]])
    observed = rng.random(504) < predicted**2
    expected = 0.0
    for low in range(20):
        inside = np.floor(np.minimum(predicted, 0.9999999) * 20) == low
        if inside.any():
            gap = abs(predicted[inside].mean() - observed[inside].mean())
            expected += inside.mean() * gap
    assert expected_calibration_error(predicted, observed) == pytest.approx(expected)
    assert expected_calibration_error(np.array([1.0, 0.0]), [1, 0]) == 0
    # 1 belongs to the last bin.
    assert expected_calibration_error(np.array([1.0, 0.96]), [0, 1]) == pytest.approx(0.48)
    assert expected_calibration_error(np.array([0.2, 0.8]), [1, 1], num_bins=1) == 0.5


def test_fitting_without_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        fit(np.zeros((0, 3)), np.zeros(0))


# --- what an export keeps ------------------------------------------------------------------------


def rounds_of(seed: int, temperatures: Array, *, num_rounds: int = 12_000) -> Rounds:
    """As `rounds`, thirty of them to a row."""
    logits, accepted = rounds(seed, temperatures, num_rounds=num_rounds)
    return Rounds(logits, accepted, np.arange(num_rounds) // 30, np.zeros(num_rounds, np.int64))


def test_what_is_reported_is_measured_on_rows_that_were_not_fitted() -> None:
    true = np.array([2.0, 2.5, 0.3, 4.0])
    found = rounds_of(5, true)
    even = (found.rows % 2) == 0
    report = calibrated(found)
    assert report.num_rounds == 12_000
    np.testing.assert_array_equal(
        report.temperatures, fit(found.logits[even], found.accepted[even])
    )
    others = found.where(~even)
    np.testing.assert_allclose(report.error_after, others.errors(report.temperatures))
    np.testing.assert_allclose(report.error_before, others.errors(np.ones(4)))
    assert max(report.error_after) < 0.025 < min(report.error_before)
    # The rows that are reported on do not count: their labels may be anything.
    accepted = np.where(even, found.accepted, 0)
    again = calibrated(Rounds(found.logits, accepted, found.rows, found.evidence))
    assert again.temperatures == report.temperatures
    assert again.error_after != report.error_after


def test_rounds_of_one_row_alone_scale_nothing() -> None:
    found = rounds_of(6, np.array([3.0, 0.3]), num_rounds=30)
    report = calibrated(found)
    assert report.temperatures == (1.0, 1.0)
    assert report.error_before == report.error_after == (0.0, 0.0)
    assert calibrated(concatenate([], 2)).acceptance == (0.5, 0.5)


def test_acceptance_is_conditional_on_the_positions_before() -> None:
    none = np.zeros((5, 3), np.float32)
    found = Rounds(none, np.array([0, 1, 1, 2, 3]), np.arange(5), np.arange(5))
    # 4 of 5, 2 of 4, 1 of 2, each with one success and one failure more.
    np.testing.assert_allclose(found.acceptance, [5 / 7, 3 / 6, 2 / 4])
    assert found.survived.tolist()[3] == [True, True, False]
    joined = concatenate([found, found.where(found.accepted > 1)], 3)
    assert joined.accepted.tolist() == [0, 1, 1, 2, 3, 2, 3]
    assert joined.rows.tolist() == joined.evidence.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert joined.logits.shape == (7, 3)


def test_reliability_counts_every_item_once() -> None:
    predicted = np.array([0.02, 0.03, 0.5, 0.99, 1.0])
    count, mean, frequency = reliability(predicted, [0, 1, 1, 1, 0])
    assert count.tolist() == [2, *[0] * 9, 1, *[0] * 8, 2]
    assert mean[[0, 10, 19]] == pytest.approx([0.025, 0.5, 0.995])
    assert frequency[[0, 10, 19]] == pytest.approx([0.5, 1.0, 0.5])


def test_discrimination_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(7)
    predicted = rng.choice([0.1, 0.4, 0.4, 0.8, 0.9], 200)
    observed = rng.random(200) < predicted
    pairs = [(p > q) + 0.5 * (p == q) for p in predicted[observed] for q in predicted[~observed]]
    assert discrimination(predicted, observed) == pytest.approx(np.mean(pairs))
    assert discrimination(np.array([0.2, 0.9]), [0, 1]) == 1.0
    assert np.isnan(discrimination(np.array([0.2, 0.9]), [1, 1]))


def test_the_brier_score_is_the_mean_squared_error() -> None:
    assert brier_score(np.array([0.0, 0.5, 1.0]), [0, 1, 0]) == pytest.approx((0.25 + 1) / 3)
