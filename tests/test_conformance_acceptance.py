"""The acceptance test replays the rounds that the reference implementation recorded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.decode.algorithm.calibration import apply
from dspark_batch.decode.algorithm.sampling import filtered_probs, softmax
from dspark_batch.decode.algorithm.scheduler import threshold
from dspark_batch.decode.types import VerifyResult
from dspark_batch.models.plugin.specification import residual_probs, verify

Array = NDArray[Any]
FOLDER = Path(__file__).parents[2] / "shared" / "conformance" / "vanilla"
PROMPTS = sorted(FOLDER.glob("prompt_*.npz"))
BLOCK_SIZE = 7

pytestmark = pytest.mark.skipif(not PROMPTS, reason="the conformance recordings are not here")


FIELDS = (
    "proposal_len",
    "draft_tokens",
    "draft_logits",
    "confidence_logits_full",
    "target_logits",
    "accepted",
    "next_token",
)
SAMPLED_FIELDS = ("uniforms", "draft_probs", "target_probs", "residual")


@cache
def rounds(path: Path, run: str) -> dict[str, Array]:
    """Every round of a run, stacked; target rows that were not verified are NaN.

    Rounds that a stop token ended are left out: their accepted count was cut afterwards.
    """
    fields = FIELDS + SAMPLED_FIELDS if run == "sampled" else FIELDS
    stacked: dict[str, list[Array]] = {name: [] for name in fields}
    with np.load(path) as recorded:
        for index in range(int(recorded[f"{run}/num_rounds"])):
            prefix = f"{run}/r{index:03d}/"
            if recorded[prefix + "stopped"]:
                continue
            for name in fields:
                value = recorded[prefix + name]
                # The reference runs one sequence: a leading axis of 1, except for plain counts.
                value = value[0] if value.ndim else value
                if name == "target_logits":
                    missing = BLOCK_SIZE + 1 - len(value)
                    value = np.pad(value, ((0, missing), (0, 0)), constant_values=np.nan)
                stacked[name].append(value)
    return {name: np.stack(values) for name, values in stacked.items()}


def replay(recorded: dict[str, Array], *, temperature: float, bonus_uniform: float) -> VerifyResult:
    num_rounds, _, vocab_size = recorded["target_logits"].shape
    acceptance = recorded.get("uniforms", np.zeros((num_rounds, BLOCK_SIZE), dtype=np.float32))
    bonus = np.full((num_rounds, 1), bonus_uniform, dtype=np.float32)
    return verify(
        recorded["target_logits"].reshape(-1, vocab_size),
        np.arange(num_rounds * (BLOCK_SIZE + 1)).reshape(num_rounds, -1),
        recorded["draft_tokens"],
        recorded["proposal_len"],
        np.zeros(num_rounds, np.int64),
        recorded["draft_logits"],
        np.arange(vocab_size),
        np.full(num_rounds, temperature),
        np.zeros(num_rounds, np.int64),
        np.ones(num_rounds),
        np.concatenate([acceptance, bonus], axis=1),
    )


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run", ["greedy", "threshold", "stop"])
def test_greedy_rounds_are_replayed_exactly(path: Path, run: str) -> None:
    recorded = rounds(path, run)
    result = replay(recorded, temperature=0, bonus_uniform=0.5)
    np.testing.assert_array_equal(result.num_accepted, recorded["accepted"])
    np.testing.assert_array_equal(result.bonus, recorded["next_token"])


def test_the_replay_reaches_both_ends_of_a_block() -> None:
    seen: set[int] = set()
    for path in PROMPTS:
        result = replay(rounds(path, "greedy"), temperature=0, bonus_uniform=0.5)
        seen.update(result.num_accepted.tolist())
    assert {0, BLOCK_SIZE} <= seen


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_threshold_lengths_are_replayed_exactly(path: Path) -> None:
    recorded = rounds(path, "threshold")
    with np.load(path) as prompt:
        value = float(prompt["threshold/value"])
    confidence = apply(recorded["confidence_logits_full"], np.ones(BLOCK_SIZE))
    lengths = threshold(confidence, np.full(len(confidence), BLOCK_SIZE), value)
    np.testing.assert_array_equal(lengths, recorded["proposal_len"])


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_sampled_rounds_are_replayed_exactly(path: Path) -> None:
    recorded = rounds(path, "sampled")
    accepted = recorded["accepted"]
    at_rejection = (np.arange(len(accepted)), accepted)
    possible = np.pad(recorded["draft_probs"], ((0, 0), (0, 1), (0, 0)))
    support = residual_probs(recorded["target_probs"][at_rejection], possible[at_rejection]) > 0
    for bonus_uniform in np.linspace(0, 1, 200, endpoint=False):
        result = replay(recorded, temperature=1, bonus_uniform=bonus_uniform)
        np.testing.assert_array_equal(result.num_accepted, accepted)
        assert support[np.arange(len(accepted)), result.bonus].all()


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_distributions_of_sampled_rounds_are_reproduced(path: Path) -> None:
    recorded = rounds(path, "sampled")
    vocab_size = recorded["target_logits"].shape[2]
    target_logits = recorded["target_logits"].reshape(-1, vocab_size)
    draft_logits = recorded["draft_logits"].reshape(-1, vocab_size)
    ones = np.ones(len(target_logits))
    target_probs = filtered_probs(target_logits, ones, 0 * ones, ones)
    target_probs = target_probs.reshape(recorded["target_probs"].shape)
    draft_probs = softmax(draft_logits, np.ones(len(draft_logits)))
    draft_probs = draft_probs.reshape(recorded["draft_probs"].shape)
    np.testing.assert_allclose(target_probs, recorded["target_probs"], atol=1e-6)
    np.testing.assert_allclose(draft_probs, recorded["draft_probs"], atol=1e-6)

    accepted = recorded["accepted"]
    rejected = np.flatnonzero(accepted < BLOCK_SIZE)
    assert len(rejected) > 5
    at_rejection = (rejected, accepted[rejected])
    residual = residual_probs(target_probs[at_rejection], draft_probs[at_rejection])
    drawn = recorded["next_token"][rejected]
    assert (residual[np.arange(len(rejected)), drawn] > 0).all()
    residual /= residual.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(residual, recorded["residual"][rejected], atol=1e-5)
