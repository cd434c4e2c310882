"""Every variant of the draft against a slow one written from its definition, round after round.

The slow one computes each round from all context positions; the graph keeps a cache. Where the
reference implementation's arrays are at hand, the slow one is held against them first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_graph import DraftGraph, build_draft
from numpy.typing import NDArray
from safetensors.numpy import load_file
from slow_draft import SlowDraft
from tiny import LAYERS, VOCAB, draft_config, target_config, write_draft, write_target

from dspark_batch.drafters.spec import CERTAIN
from dspark_batch.errors import EngineError

REDUCED = np.array([1, 2, 5, 7, 11, 12, 20, 28, 33, 39])
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "rank-0": {"markov_rank": 0, "confidence_head_with_markov": False},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    "confidence-without-markov": {"confidence_head_with_markov": False},
    "tied-embedding-tap-block-5": {
        "block_size": 5,
        "target_layer_ids": [-1, 1, 2],
        "confidence_head_with_markov": False,
    },
    "rnn-block-5": {"markov_head_type": "rnn", "block_size": 5, "target_layer_ids": [-1, 0, 2]},
    "last-layer": {"target_layer_ids": [LAYERS - 1]},
    "anchor-predicts-nothing": {"sample_from_anchor": False},
    "anchor-predicts-nothing-gated": {
        "sample_from_anchor": False,
        "markov_head_type": "gated",
        "block_size": 2,
    },
    "classic-dflash": {
        "sample_from_anchor": False,
        "markov_rank": 0,
        "enable_confidence_head": False,
    },
}
ROUNDS = ((9, 2, 5), (1, 4, 3), (5, 1, 1), (2, 2, 2))


def slow_twin(target: Path, draft: Path, *, vocab: NDArray[np.int64] | None = None) -> SlowDraft:
    tables = load_file(target / "model.safetensors")
    embed = tables["model.embed_tokens.weight"]
    head = tables.get("lm_head.weight", embed)
    return SlowDraft(
        json.loads((draft / "config.json").read_text()),
        load_file(draft / "model.safetensors"),
        embed=embed,
        head=head if vocab is None else head[vocab],
        vocab=vocab,
    )


def assert_same_rounds(graph: DraftGraph, slow: SlowDraft, *, seed: int = 0) -> None:
    """Four greedy rounds of three rows of different lengths, each round one call of the graph."""
    rng = np.random.default_rng(seed)
    seen: list[list[NDArray[np.float32]]] = [[], [], []]
    drafted = set()
    for counts in ROUNDS:
        new = [rng.standard_normal((n, graph.num_features)).astype(np.float32) for n in counts]
        anchors = rng.integers(0, VOCAB, 3).tolist()
        tokens, logits, confidence = graph(new, anchors)
        for r in range(3):
            seen[r].append(new[r])
            wanted = slow(np.concatenate(seen[r]), anchors[r])
            assert tokens[r].tolist() == wanted[0]
            np.testing.assert_allclose(logits[r], wanted[1], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(
                confidence[r], np.minimum(wanted[2], CERTAIN), atol=1e-4, rtol=1e-4
            )
            drafted.add(tuple(wanted[0]))
    assert len(drafted) > 6  # or nothing was told apart


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_drafts_as_the_definition_says(name: str, tmp_path: Path) -> None:
    tied = "tied" in name
    target = write_target(tmp_path / "target", target_config("llama", tie_word_embeddings=tied))
    draft = write_draft(tmp_path / "draft", draft_config(**VARIANTS[name]))
    graph = build_draft(tmp_path / "graph", target, draft)
    slow = slow_twin(target, draft)
    assert_same_rounds(graph, slow)
    config = draft_config(**VARIANTS[name])
    drafts = config["block_size"] - (not config.get("sample_from_anchor", True))
    features = np.ones((2, graph.num_features), np.float32)
    assert len(slow(features, 3)[0]) == drafts


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_reduced_vocabulary_changes_what_is_drafted_and_nothing_else(
    head: str, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    config = draft_config(markov_head_type=head)
    draft = write_draft(tmp_path / "draft", config, draft_vocab=REDUCED)
    graph = build_draft(tmp_path / "graph", target, draft)
    assert_same_rounds(graph, slow_twin(target, draft, vocab=REDUCED))


@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn", "rank-0", "rnn-block-5"])
def test_the_torch_network_is_the_definition_too(name: str, tmp_path: Path) -> None:
    """So whatever is trained with it is what the graph serves."""
    torch = pytest.importorskip("torch")
    network = pytest.importorskip("dspark_batch.training.draft")
    checkpoint = pytest.importorskip("dspark_batch.training.checkpoint")
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config(**VARIANTS[name]))
    tables = load_file(target / "model.safetensors")
    model = checkpoint.load_draft(
        draft,
        embed_tokens=torch.tensor(tables["model.embed_tokens.weight"]),
        lm_head=torch.tensor(tables["lm_head.weight"]),
    ).eval()
    slow = slow_twin(target, draft)
    rng = np.random.default_rng(0)
    cache, seen = network.DraftCache(), []
    for count in (9, 1, 3):
        seen.append(rng.standard_normal((count, model.config.feature_size)).astype(np.float32))
        anchor = int(rng.integers(VOCAB))
        with torch.no_grad():
            found = model.forward_block(torch.tensor([anchor]), torch.tensor(seen[-1])[None], cache)
        tokens, logits, confidence = slow(np.concatenate(seen), anchor)
        assert found.tokens[0].tolist() == tokens
        np.testing.assert_allclose(found.logits[0].numpy(), logits, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(
            found.confidence_logits[0].numpy(), confidence, atol=1e-4, rtol=1e-4
        )


def test_an_rnn_whose_anchor_predicts_nothing_is_refused(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    config = draft_config(sample_from_anchor=False, markov_head_type="rnn")
    draft = write_draft(tmp_path / "draft", config)
    with pytest.raises(EngineError, match=r"sample_from_anchor false.*'rnn'"):
        build_draft(tmp_path / "graph", target, draft)


SHARED = Path(__file__).parents[2] / "shared" / "conformance"
SETS = sorted(path.parent for path in SHARED.glob("*/draft/config.json"))


@pytest.mark.skipif(not SETS, reason="the reference's arrays are not here")
@pytest.mark.parametrize("folder", [path.parent for path in SETS], ids=lambda path: path.name)
def test_the_definition_is_the_reference_s(folder: Path) -> None:
    """The NumPy reference against every recorded round with greedy drafts."""
    tensors = load_file(folder / "draft" / "model.safetensors")
    slow = SlowDraft(
        json.loads((folder / "draft" / "config.json").read_text()),
        tensors,
        embed=tensors["embed_tokens.weight"],
        head=tensors["lm_head.weight"],
    )
    checked = 0
    for path in sorted(folder.glob("prompt_*.npz")):
        with np.load(path) as arrays:
            for run in ("greedy", "threshold", "stop"):
                seen = []
                for number in range(int(arrays[f"{run}/num_rounds"])):
                    step = f"{run}/r{number:03d}/"
                    seen.append(arrays[step + "context_features"][0])
                    anchor = int(arrays[step + "draft_input_ids"][0, 0])
                    tokens, logits, confidence = slow(np.concatenate(seen), anchor)
                    assert tokens == arrays[step + "draft_tokens"][0].tolist()
                    np.testing.assert_allclose(
                        logits, arrays[step + "draft_logits"][0], atol=1e-4, rtol=1e-4
                    )
                    np.testing.assert_allclose(
                        confidence, arrays[step + "confidence_logits_full"][0], atol=1e-4
                    )
                    checked += 1
    assert checked > 20
