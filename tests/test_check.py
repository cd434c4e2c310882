"""The check of an export: what passes, and what the message says about a wrong graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from slow_draft import SlowDraft
from tiny import HIDDEN, VOCAB, draft_config, export_pair, target_config, write_draft, write_target
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from dspark_batch.drafters.dspark import DSparkGraph
from dspark_batch.drafters.layouts import draft_spec
from dspark_batch.drafters.reference import ReferenceDraft
from dspark_batch.drafters.shared import tables
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.engine.tokenizer import Tokenizer
from dspark_batch.errors import EngineError
from dspark_batch.export import check, texts
from dspark_batch.export.check import Texts, check_target, divergence
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.builder import GraphBuilder
from dspark_batch.models.graph.linears import PRECISIONS
from dspark_batch.models.weights import open_weights

TAPS = (0, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1e-2, 1.0, 10.0]))
def test_divergence_is_the_kl_of_the_softmaxes(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal((70, 11)).astype(np.float32) * 4
    found = wanted + rng.standard_normal((70, 11)).astype(np.float32) * np.float32(scale)
    p = softmax(wanted.astype(np.float64), axis=1)
    terms = p * (log_softmax(wanted.astype(np.float64), 1) - log_softmax(found.astype(float), 1))
    assert divergence(wanted, found) == pytest.approx(terms.sum(1).mean(), rel=1e-3, abs=1e-7)


def build(folder: Path, target: Path, precision: str, change: Any) -> Path:
    """The target's graph, with each weight replaced by `change(name, weight)`."""
    folder.mkdir()
    with open_weights(target) as weights:
        builder = GraphBuilder("target", folder, PRECISIONS[precision].data_type)
        graph = DecoderGraph(
            builder,
            decoder_spec(weights.config),
            lambda name: change(name, weights.tensor(name)),
            precision=precision,
        )
        graph.build(taps=TAPS, draft_vocab=np.arange(VOCAB), max_tokens=128)
        return builder.save()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1"),
        ("model.layers.2.self_attn.v_proj.weight", "model.layers.2"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_graph_that_is_off_names_the_layer(
    wrong: str, named: str, precision: str, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    rng = np.random.default_rng(0)

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        if name != wrong:
            return tensor
        return tensor + rng.standard_normal(tensor.shape).astype(np.float32) * tensor.std()

    path = build(tmp_path / "graph", target, precision, change)
    rows = [rng.integers(1, VOCAB, n).tolist() for n in (40, 12, 30)]
    with open_weights(target) as weights:
        spec = decoder_spec(weights.config)
        ours = Texts.from_rows(spec, weights.tensor, rows, taps=TAPS)
        with pytest.raises(EngineError, match=f"fails its check.* from {named} "):
            check_target(path, spec, weights.tensor, ours, precision=precision)


def pair(folder: Path) -> tuple[Path, Path]:
    return (
        write_target(folder / "target", target_config("llama")),
        write_draft(folder / "draft", draft_config()),
    )


def test_both_graphs_are_checked_on_two_thousand_tokens(tmp_path: Path) -> None:
    folder = export_pair(tmp_path, *pair(tmp_path), precision="int8")
    parity = read_manifest(folder).parity
    assert parity["tokens"] >= 2000
    assert parity["draft_tokens"] >= 2000
    assert 0 < parity["kl"] < check.LIMITS["int8"]["kl"]
    assert 0 < parity["draft_kl"] < check.DRAFT_LIMITS["int8"]["draft_kl"]
    assert parity["draft_agreement"] > 0.9


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("wrong", "figure"),
    [
        ("layers.1.self_attn.v_proj.weight", "draft_kl"),
        ("markov_head.markov_w1.weight", "draft_kl"),
        ("confidence_head.proj.bias", "draft_confidence"),
    ],
)
def test_a_draft_that_is_off_is_not_installed(
    wrong: str, figure: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(DSparkGraph):
        def __init__(self, builder: Any, spec: Any, tensor: Any, **options: Any) -> None:
            def changed(name: str) -> np.ndarray:
                return tensor(name) + 0.5 * np.float32(name == wrong)

            super().__init__(builder, spec, changed, **options)

    monkeypatch.setattr("dspark_batch.drafters.dspark.DSparkGraph", Wrong)
    with pytest.raises(EngineError, match=rf"^draft\.onnx fails its check: {figure} is"):
        export_pair(tmp_path, *pair(tmp_path), precision=precision)
    assert not (tmp_path / "engines" / "tiny").exists()


def test_the_reference_s_blocks_are_those_of_the_formulas(tmp_path: Path) -> None:
    """All blocks of a row, against a twin in float64 that uses nothing of the package."""
    target, draft = pair(tmp_path)
    rng = np.random.default_rng(0)
    row = rng.integers(1, VOCAB, 23).tolist()
    context = rng.standard_normal((23, 2 * HIDDEN)).astype(np.float32)
    with open_weights(target) as theirs, open_weights(draft) as own:
        spec = draft_spec(own)
        vocab = np.arange(VOCAB)
        embed, head = tables(own, theirs, tied=False, vocab=vocab)
        ours = ReferenceDraft(spec, own.tensor, embed=embed, head=head, vocab=vocab)
        [blocks] = ours.blocks([row], [context])
        slow = SlowDraft(
            draft_config(),
            {name: own.tensor(name) for name in own.names()},
            embed=embed,
            head=head,
        )
        gamma = spec.block_size
        assert len(blocks.tokens) == 22 // gamma
        for b in range(len(blocks.tokens)):
            end = (b + 1) * gamma
            tokens, logits, confidence = slow(context[:end], row[end])
            assert blocks.tokens[b].tolist() == tokens
            np.testing.assert_allclose(blocks.logits[b], logits, atol=1e-4)
            np.testing.assert_allclose(blocks.confidence[b], confidence, atol=1e-4)


def test_a_tap_of_another_layer_is_refused(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    path = build(tmp_path / "graph", target, "fp32", lambda name, tensor: tensor)
    rows = [np.random.default_rng(0).integers(1, VOCAB, 30).tolist()] * 2
    with open_weights(target) as weights:
        spec = decoder_spec(weights.config)
        shifted = Texts.from_rows(spec, weights.tensor, rows, taps=(1, 2))
        with pytest.raises(EngineError, match="context_error"):
            check_target(path, spec, weights.tensor, shifted, precision="fp32")


def test_texts_are_filled_up_and_cut_to_what_the_engine_takes() -> None:
    prompts = texts.example_prompts(None, vocab_size=VOCAB)
    rows = texts.check_rows(None, prompts, vocab_size=VOCAB, max_tokens=20)
    assert sum(map(len, rows)) >= 2000
    assert max(map(len, rows)) == 20
    assert rows == texts.check_rows(None, prompts, vocab_size=VOCAB, max_tokens=20)


def test_a_tokenizer_s_rows_have_the_passages(tmp_path: Path) -> None:
    fast = Fast(models.WordLevel({"the": 1, "[UNK]": 0}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.open(tmp_path)
    prompts = texts.example_prompts(tokenizer, vocab_size=2)
    rows = texts.check_rows(tokenizer, prompts, vocab_size=2, max_tokens=400)
    wanted = [tuple(tokenizer.encode(text, add_special=True)) for text in texts.PASSAGES]
    assert rows[len(prompts) : len(prompts) + len(wanted)] == wanted
