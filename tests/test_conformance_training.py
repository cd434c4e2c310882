"""The torch draft against arrays that the reference implementation computed (fp32)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dspark_batch.training.anchors import anchor_batch, valid_anchors  # noqa: E402
from dspark_batch.training.checkpoint import load_draft  # noqa: E402
from dspark_batch.training.draft import DraftCache, DSparkDraft  # noqa: E402
from dspark_batch.training.features import FeatureBatch  # noqa: E402
from dspark_batch.training.losses import LossWeights, dspark_loss  # noqa: E402

VANILLA = Path(__file__).parents[2] / "shared" / "conformance" / "vanilla"
pytestmark = pytest.mark.skipif(not VANILLA.exists(), reason="no conformance arrays here")
PROMPTS = sorted(path.name for path in VANILLA.glob("prompt_*.npz"))


def arrays(name: str) -> dict[str, Any]:
    with np.load(VANILLA / name) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


@pytest.fixture(scope="module")
def draft() -> DSparkDraft:
    return load_draft(VANILLA / "draft").requires_grad_(False)


def reference_batch(forward: dict[str, Any]) -> FeatureBatch:
    return FeatureBatch(
        forward["input_ids"],
        forward["loss_mask"].bool(),
        forward["target_features"],
        forward["target_last_hidden"],
        forward["target_logits"].logsumexp(-1),
    )


def test_packed_training_forward_and_loss_equal_the_reference(draft: DSparkDraft) -> None:
    forward = arrays("train_forward.npz")
    batch = reference_batch(forward)
    anchors = forward["anchors"].expand(2, -1)
    blocks = anchor_batch(batch, anchors, draft.config.block_size)
    scores = draft.forward_packed(batch.features, anchors=blocks.anchors, previous=blocks.previous)
    counts = forward["eval_mask"]
    torch.testing.assert_close(blocks.mask, counts)
    assert torch.equal(blocks.labels[counts], forward["target_ids"][counts])
    for got, expected in (
        (scores.logits, forward["draft_logits"]),
        (scores.confidence_logits, forward["confidence_pred"]),
    ):
        assert got is not None
        torch.testing.assert_close(got[counts], expected[counts], atol=1e-4, rtol=0)

    terms = dspark_loss(
        scores.logits,
        confidence_logits=scores.confidence_logits,
        target_probs=forward["aligned_target_logits"].softmax(-1),
        labels=blocks.labels,
        mask=blocks.mask,
        weights=LossWeights(),
    )
    assert float(terms.total) == pytest.approx(float(forward["loss"]), rel=1e-3)
    kept = terms.acceptance * counts
    by_slot = kept.sum((0, 1)) / counts.sum((0, 1))
    expected_slots = torch.tensor([0.755, 0.689, 0.555, 0.502, 0.492, 0.469, 0.476])
    torch.testing.assert_close(by_slot, expected_slots, atol=1e-3, rtol=0)


def test_valid_anchors_are_those_of_the_reference() -> None:
    forward = arrays("train_forward.npz")
    valid = valid_anchors(forward["loss_mask"].bool())
    for row in valid:
        assert torch.equal(row.nonzero().squeeze(-1), forward["anchors"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_greedy_round_equals_the_reference(draft: DSparkDraft, prompt: str) -> None:
    recorded = arrays(prompt)
    cache = DraftCache()
    for number in range(int(recorded["greedy/num_rounds"])):
        expected = {
            key.split("/")[-1]: value
            for key, value in recorded.items()
            if key.startswith(f"greedy/r{number:03d}/")
        }
        assert cache.length == int(expected["cache_len_before"])
        scores = draft.forward_block(
            expected["draft_input_ids"][:, 0], expected["context_features"], cache
        )
        assert cache.length == int(expected["cache_len_after"]) == int(expected["start"])
        keys, values = cache.layers[0]
        for got, name in (
            (keys.transpose(1, 2), "draft_k0"),
            (values.transpose(1, 2), "draft_v0"),
            (scores.hidden, "block_hidden"),
            (scores.base_logits, "base_logits"),
            (scores.logits, "draft_logits"),
            (scores.confidence_logits, "confidence_logits_full"),
        ):
            assert got is not None
            torch.testing.assert_close(got, expected[name], atol=1e-4, rtol=0, msg=name)
        assert scores.tokens is not None
        assert torch.equal(scores.tokens, expected["draft_tokens"])
