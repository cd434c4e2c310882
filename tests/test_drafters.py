"""The exported draft graph against the torch draft, which shares nothing with it but weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_graph import DraftGraph
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny import (
    HIDDEN,
    LAYERS,
    VOCAB,
    draft_config,
    export_pair,
    target_config,
    write_draft,
    write_target,
)

from dspark_batch.decode.algorithm import sampling
from dspark_batch.drafters.spec import CERTAIN
from dspark_batch.errors import EngineError
from dspark_batch.export.pipeline import export

REDUCED = np.array([1, 2, 5, 7, 11, 12, 20, 28, 33, 39])
PLAIN = {"confidence_head_with_markov": False}
CASES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no-markov": {"markov_rank": 0, **PLAIN},
    "confidence-without-markov": PLAIN,
    "no-confidence": {"enable_confidence_head": False},
    "gamma-5": {"block_size": 5, "markov_head_type": "rnn"},
    "gamma-1": {"block_size": 1},
    "embedding-tap": {"target_layer_ids": [-1, 1, 2]},
    "one-tap": {"target_layer_ids": [0]},
}


def build(
    folder: Path,
    changes: dict[str, Any],
    *,
    draft_vocab: NDArray[np.int64] | None = None,
    tied: bool = False,
    extra: dict[str, NDArray[Any]] | None = None,
    qk_norm: bool = True,
) -> tuple[DraftGraph, Path, Path]:
    """An exported pair's draft graph, and its two checkpoints; `extra` goes into the draft's."""
    target = write_target(folder / "target", target_config("llama", tie_word_embeddings=tied))
    draft = write_draft(folder / "draft", draft_config(**changes), draft_vocab=draft_vocab)
    tensors = load_file(draft / "model.safetensors") | (extra or {})
    norms = (".q_norm.weight", ".k_norm.weight")
    kept = {name: t for name, t in tensors.items() if qk_norm or not name.endswith(norms)}
    save_file(kept, draft / "model.safetensors")
    return DraftGraph(export_pair(folder, target, draft) / "draft.onnx"), target, draft


def torch_draft(target: Path, draft: Path) -> Any:
    torch = pytest.importorskip("torch")
    network = pytest.importorskip("dspark_batch.training.draft")
    from dspark_batch.drafters import config as configs

    config = configs.config_from_json(draft / "config.json")
    theirs = load_file(target / "model.safetensors")
    own = load_file(draft / "model.safetensors")
    offsets = own.pop("d2t", None)
    vocab = np.arange(config.num_draft_ids) + (0 if offsets is None else offsets)
    table = own.pop("embed_tokens.weight", theirs["model.embed_tokens.weight"])
    head = theirs.get("lm_head.weight", theirs["model.embed_tokens.weight"])[vocab]
    head = own.pop("lm_head.weight", head)
    model = network.DSparkDraft(
        config,
        embed_tokens=torch.tensor(table),
        lm_head=torch.tensor(head),
        draft_vocab=torch.tensor(vocab),
    )
    model.load_state_dict({name: torch.tensor(array) for name, array in own.items()}, strict=True)
    return model.eval()


def assert_graph_is_the_network(graph: DraftGraph, target: Path, draft: Path) -> None:
    """Four greedy rounds of three rows of different lengths in one call each."""
    torch = pytest.importorskip("torch")
    network = pytest.importorskip("dspark_batch.training.draft")
    model = torch_draft(target, draft)
    rng = np.random.default_rng(0)
    caches = [network.DraftCache() for _ in range(3)]
    for counts in ((9, 2, 5), (1, 4, 3), (5, 1, 1), (2, 2, 2)):
        context = [
            rng.standard_normal((n, model.config.feature_size)).astype(np.float32) for n in counts
        ]
        anchors = rng.integers(0, VOCAB, 3).tolist()
        tokens, logits, confidence = graph(context, anchors)
        for r, (features, anchor) in enumerate(zip(context, anchors, strict=True)):
            with torch.no_grad():
                wanted = model.forward_block(
                    torch.tensor([anchor]), torch.tensor(features)[None], caches[r]
                )
            np.testing.assert_array_equal(tokens[r], wanted.tokens[0].numpy())
            np.testing.assert_allclose(logits[r], wanted.logits[0].numpy(), atol=1e-4)
            if wanted.confidence_logits is None:
                assert (confidence[r] == CERTAIN).all()
            else:
                np.testing.assert_allclose(
                    confidence[r], wanted.confidence_logits[0].numpy(), atol=1e-4
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_graph_is_the_torch_network(name: str, tmp_path: Path) -> None:
    assert_graph_is_the_network(*build(tmp_path, CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_reduced_vocabulary_is_mapped_back(head: str, tmp_path: Path) -> None:
    changes = {"markov_head_type": head}
    graph, target, draft = build(tmp_path, changes, draft_vocab=REDUCED)
    assert_graph_is_the_network(graph, target, draft)
    tokens = graph([np.ones((1, 2 * HIDDEN), np.float32)] * 3, [1, 2, 3])[0]
    assert set(tokens.ravel().tolist()) <= set(REDUCED.tolist())


@pytest.mark.slow
def test_a_tied_target_lends_its_embedding_as_head(tmp_path: Path) -> None:
    assert_graph_is_the_network(*build(tmp_path, {}, tied=True))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_a_checkpoint_s_own_tables_are_used(names: tuple[str, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    extra = {
        f"{name}.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32) for name in names
    }
    assert_graph_is_the_network(*build(tmp_path, {}, extra=extra))


@pytest.mark.slow
def test_an_own_head_over_a_reduced_vocabulary_has_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    head = {"lm_head.weight": rng.standard_normal((len(REDUCED), HIDDEN)).astype(np.float32)}
    graph, target, draft = build(tmp_path / "fits", {}, draft_vocab=REDUCED, extra=head)
    assert_graph_is_the_network(graph, target, draft)
    head = {"lm_head.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)}
    with pytest.raises(EngineError, match=r"lm_head.weight.*40.*10"):
        build(tmp_path / "does-not", {}, draft_vocab=REDUCED, extra=head)


@pytest.mark.slow
def test_a_draft_without_query_and_key_norms(tmp_path: Path) -> None:
    assert_graph_is_the_network(*build(tmp_path, {"qk_norm": False}, qk_norm=False))


def test_draws_are_the_inverse_cdf_of_the_uniforms(tmp_path: Path) -> None:
    graph, _, _ = build(tmp_path, {}, draft_vocab=REDUCED)
    rng = np.random.default_rng(2)
    rows = 60
    context = [rng.standard_normal((3, 2 * HIDDEN)).astype(np.float32) for _ in range(rows)]
    temperature = np.where(np.arange(rows) % 3 == 0, 0.0, rng.uniform(0.3, 4.0, rows))
    temperature = temperature.astype(np.float32)
    uniforms = rng.random((rows, 4), dtype=np.float32)
    anchors = rng.integers(0, VOCAB, rows).tolist()
    tokens, logits, _ = graph(context, anchors, temperature=temperature, uniforms=uniforms)
    for r in range(rows):
        if temperature[r] == 0:
            np.testing.assert_array_equal(tokens[r], REDUCED[logits[r].argmax(-1)])
            continue
        probs = sampling.softmax(logits[r], np.full(4, temperature[r]))
        np.testing.assert_array_equal(tokens[r], REDUCED[sampling.sample(probs, uniforms[r])])
    assert len(set(tokens.ravel().tolist())) > 5


@pytest.mark.slow
def test_filtered_rows_draw_from_the_filtered_distribution(tmp_path: Path) -> None:
    plain_graph, _, _ = build(tmp_path / "plain", {}, draft_vocab=REDUCED)
    graph, _, _ = build(tmp_path / "filtered", {}, draft_vocab=REDUCED)
    rng = np.random.default_rng(5)
    rows = 60
    context = [rng.standard_normal((3, 2 * HIDDEN)).astype(np.float32) for _ in range(rows)]
    uniforms = rng.random((rows, 4), dtype=np.float32)
    anchors = rng.integers(0, VOCAB, rows).tolist()
    top_k, top_p = rng.integers(0, 5, rows), rng.uniform(0.3, 1.0, rows).astype(np.float32)
    top_p[::4] = 1.0
    _, plain, _ = plain_graph(context, anchors, temperature=1.5, uniforms=uniforms)
    tokens, logits, _ = graph(
        context, anchors, temperature=1.5, top_k=top_k, top_p=top_p, uniforms=uniforms
    )
    every = np.full(rows, 1.5)
    wanted = sampling.filtered_probs(plain[:, 0], every, top_k, top_p)
    np.testing.assert_allclose(sampling.softmax(logits[:, 0], every), wanted, atol=1e-6)
    np.testing.assert_array_equal(tokens[:, 0], REDUCED[sampling.sample(wanted, uniforms[:, 0])])
    assert (wanted == 0).any(axis=1).sum() > rows // 2


def test_a_sampled_token_decides_the_next_slot_s_bias(tmp_path: Path) -> None:
    graph, _, draft = build(tmp_path, {})
    own = load_file(draft / "model.safetensors")
    w1, w2 = (own[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
    context = [np.ones((2, 2 * HIDDEN), np.float32)] * 2
    uniforms = np.array([[0.01] * 4, [0.99] * 4], np.float32)
    tokens, logits, _ = graph(context, [3, 3], temperature=2.0, uniforms=uniforms)
    assert tokens[0, 0] != tokens[1, 0]
    np.testing.assert_allclose(logits[0, 0], logits[1, 0], atol=1e-5)
    biases = w1[tokens[:, 0]] @ w2.T
    np.testing.assert_allclose(logits[1, 1] - logits[0, 1], biases[1] - biases[0], atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-such-layer": (
        {"target_layer_ids": [0, LAYERS]},
        rf"\[0, {LAYERS}\] go beyond {LAYERS} layers",
    ),
    "below-the-embedding": ({"target_layer_ids": [-2, 1]}, "must increase from -1 on"),
    "not-increasing": ({"target_layer_ids": [1, 0]}, "must increase from -1 on"),
    "twice": ({"target_layer_ids": [1, 1]}, "must increase from -1 on"),
    "no-taps": ({"target_layer_ids": []}, "must increase from -1 on"),
    "markov-confidence-at-rank-0": (
        {"markov_rank": 0, "confidence_head_with_markov": True},
        "needs markov_rank > 0",
    ),
    "unknown-head": ({"markov_head_type": "lstm"}, "'lstm'; known: vanilla, gated, rnn"),
    "other-width": ({"hidden_size": HIDDEN * 2}, rf"{HIDDEN * 2} is not the target's {HIDDEN}"),
    "other-vocabulary": ({"vocab_size": VOCAB + 1}, rf"vocab_size {VOCAB + 1}.*{VOCAB}"),
    "mask-out-of-range": (
        {"mask_token_id": VOCAB},
        rf"mask_token_id {VOCAB} is not in 0..{VOCAB - 1}",
    ),
    "empty-block": ({"block_size": 0}, "block_size 0"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
}


def export_draft(folder: Path, draft: Path) -> None:
    recipe = folder / "tiny.toml"
    target = write_target(folder / "target", target_config("llama"))
    recipe.write_text(f'[target]\nweights = "{target}"\n[draft]\nweights = "{draft}"\n')
    export(recipe, output=folder / "engine")


@pytest.mark.parametrize("name", REFUSED)
def test_a_draft_that_cannot_serve_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    draft = write_draft(tmp_path / "draft", draft_config())
    (draft / "config.json").write_text(json.dumps(draft_config(**changes)))
    with pytest.raises(EngineError, match=message):
        export_draft(tmp_path, draft)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("key", ["block_size", "mask_token_id", "target_layer_ids", "markov_rank"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    config = draft_config()
    draft = write_draft(tmp_path / "draft", config)
    del config[key]
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=f"lacks '{key}'"):
        export_draft(tmp_path, draft)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", draft_config())
    tensors = load_file(draft / "model.safetensors")
    del tensors["markov_head.markov_w2.weight"]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(EngineError, match="markov_w2"):
        export_draft(tmp_path, draft)


@pytest.mark.parametrize("broken", [-1, VOCAB, 1])
def test_a_map_out_of_the_vocabulary_is_refused(broken: int, tmp_path: Path) -> None:
    """The last case maps two draft tokens to one target token."""
    vocab = np.array([1, 2, 5, broken])
    draft = write_draft(tmp_path / "draft", draft_config(), draft_vocab=vocab)
    with pytest.raises(EngineError, match=r"d2t does not map its 4 tokens .* of 40"):
        export_draft(tmp_path, draft)
