"""Target families against transformers: logits, hidden states and greedy text on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tiny import HEADS, LAYERS, VOCAB, export_pair, smoothing_factors, target_config, write_target

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.engine.engine import open_engine
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.errors import EngineError
from dspark_batch.export.probes import TargetProbe
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.blocks import folded_scores
from dspark_batch.models.graph.builder import FLOAT, GraphBuilder
from dspark_batch.models.reference import forward
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.weights import open_weights

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": target_config("llama"),
    "llama-tied": target_config("llama", tie_word_embeddings=True),
    "llama-every-head-its-own-keys": target_config("llama", num_key_value_heads=HEADS),
    "llama-rope-llama3": target_config("llama", rope_parameters=LLAMA3),
    "llama-rope-yarn": target_config("llama", rope_parameters=YARN),
    "llama-rope-linear": target_config("llama", rope_parameters=LINEAR),
    "qwen3": target_config("qwen3"),
    "qwen3-rope-yarn": target_config("qwen3", rope_parameters=YARN),
    "gemma3": target_config("gemma3_text"),
    "gemma3-untied": target_config("gemma3_text", tie_word_embeddings=False),
    "gemma3-cap": target_config("gemma3_text", final_logit_softcapping=2.0),
}
TAPS = (-1, 0, LAYERS - 2)


def build(folder: Path, source: Path, precision: str) -> Path:
    with open_weights(source) as weights:
        builder = GraphBuilder("target", folder)
        graph = DecoderGraph(
            builder, decoder_spec(weights.config), weights.tensor, precision=precision
        )
        graph.build(taps=TAPS, draft_vocab=np.arange(VOCAB), max_tokens=128)
        return builder.save()


def oracle(source: Path) -> Any:
    """transformers' own model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_graph_and_reference_equal_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = write_target(tmp_path / "target", CASES[name])
    model = oracle(source)
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, VOCAB, n).tolist() for n in (40, 7, 19)]
    path = build(tmp_path, source, "fp32")
    with open_weights(source) as weights:
        spec = decoder_spec(weights.config)
        slow = forward(spec, weights.tensor, rows)
        probe = TargetProbe(path, spec, capacity=64)
        logits, context, _ = probe.run(rows, [0] * len(rows), probe.empty(len(rows)))
        for r, row in enumerate(rows):
            with torch.no_grad():
                wanted = model(torch.tensor([row]), output_hidden_states=True)
            np.testing.assert_allclose(logits[r], wanted.logits[0], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(slow[r].logits, wanted.logits[0], atol=1e-4, rtol=1e-4)
            streams = [wanted.hidden_states[tap + 1][0].numpy() for tap in TAPS]
            np.testing.assert_allclose(
                context[r], np.concatenate(streams, axis=1), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("name", ["llama", "llama-every-head-its-own-keys", "gemma3"])
def test_a_step_of_one_token_rounds_as_a_longer_one(name: str, tmp_path: Path) -> None:
    """The export measures by how much it does not; in int8, only the attention could differ."""
    source = write_target(tmp_path / "target", CASES[name])
    engine = export_pair(tmp_path, source, None, precision="int8")
    assert read_manifest(engine).parity["invariance"] == 0.0


@pytest.mark.parametrize(
    "name", ["llama-tied", "llama-rope-llama3", "llama-rope-yarn", "qwen3", "gemma3", "gemma3-cap"]
)
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Through the engine, many rows at once; some prompts are longer than Gemma's window of 6."""
    torch = pytest.importorskip("torch")
    source = write_target(tmp_path / "target", CASES[name], seed=2)
    engine = open_engine(export_pair(tmp_path, source, None))
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, VOCAB, n).tolist() for n in (3, 30, 6, 17, 25)]
    prompts = [Prompt(r, tuple(t), SamplingParams(max_new_tokens=24)) for r, t in enumerate(texts)]
    done = decode(prompts, engine, spec="off", stats=DecodeStats())
    found = {c.row: list(c.token_ids) for c in done}
    engine.close()
    model = oracle(source)
    for r, text in enumerate(texts):
        ids = torch.tensor([text])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert found[r] == output[0, len(text) :].tolist()
    assert len({tuple(ids) for ids in found.values()}) > 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma3-cap"])
def test_logits_depend_neither_on_neighbours_nor_on_tokens_per_call(
    name: str, precision: str, tmp_path: Path
) -> None:
    source = write_target(tmp_path / "target", CASES[name])
    path = build(tmp_path, source, precision)
    with open_weights(source) as weights:
        spec = decoder_spec(weights.config)
    probe = TargetProbe(path, spec, capacity=64)
    rng = np.random.default_rng(0)
    row, other = rng.integers(1, VOCAB, 24).tolist(), rng.integers(1, VOCAB, 31).tolist()
    alone = probe.run([row], [0], probe.empty(1))[0][0]
    company = probe.run([other, row], [0, 0], probe.empty(2))[0][1]
    np.testing.assert_allclose(alone, company, atol=1e-4)
    caches = probe.empty(1)
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 20), (20, 24)):
        step, _, caches = probe.run([row[begin:end]], [begin], caches)
        np.testing.assert_allclose(step[0], alone[begin:end], atol=1e-4)


def test_int8_stays_close_to_fp32(tmp_path: Path) -> None:
    source = write_target(tmp_path / "target", CASES["llama"])
    row = np.random.default_rng(0).integers(1, VOCAB, 40).tolist()
    logits = {}
    for precision in ("fp32", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        path = build(folder, source, precision)
        with open_weights(source) as weights:
            probe = TargetProbe(path, decoder_spec(weights.config), capacity=64)
        logits[precision] = probe.run([row], [0], probe.empty(1))[0][0]
    error = np.abs(logits["int8"] - logits["fp32"]).max() / np.abs(logits["fp32"]).max()
    assert 0 < error < 0.12


def test_export_refuses_a_family_it_does_not_know(tmp_path: Path) -> None:
    config = target_config("llama", model_type="mamba")
    source = write_target(tmp_path / "target", config)
    with pytest.raises(EngineError, match=r"(?s)'mamba' are not supported.*supported: gemma3_text"):
        export_pair(tmp_path, source, None)


def test_unknown_rope_type_is_refused_not_ignored() -> None:
    with pytest.raises(EngineError, match="rope_type 'dynamic'"):
        decoder_spec(target_config("llama", rope_parameters=LINEAR | {"rope_type": "dynamic"}))


def test_a_weight_is_stored_once(tmp_path: Path) -> None:
    source = write_target(tmp_path / "target", CASES["llama-tied"])
    build(tmp_path, source, "fp32")
    with open_weights(source) as weights:
        total = sum(4 * int(np.prod(weights.shape(name))) for name in weights.names())
    padding = 4096 * 60  # every weight starts on a page
    assert (tmp_path / "target.onnx.data").stat().st_size < total + padding


def test_what_gemma3_cannot_do_is_refused() -> None:
    for name in ("use_bidirectional_attention", "attention_bias", "attn_logit_softcapping"):
        with pytest.raises(EngineError, match=name):
            decoder_spec(target_config("gemma3_text", **{name: True}))
    with pytest.raises(EngineError, match="'relu'"):
        decoder_spec(target_config("gemma3_text", hidden_activation="relu"))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma3"])
def test_smoothing_leaves_the_function_as_it_is(name: str, tmp_path: Path) -> None:
    source = write_target(tmp_path / "target", CASES[name])
    row = np.random.default_rng(0).integers(1, VOCAB, 40).tolist()
    logits = []
    with open_weights(source) as weights:
        spec = decoder_spec(weights.config)
        factors = smoothing_factors(spec, weights.tensor, [row[:20], row[20:]])
        assert all((factor != 1).any() for factor in factors.values())
        factors["lm_head"] = np.ones_like(factors["lm_head"])  # fp32 heads are never smoothed
        for smoothing in (None, Smoothing(factors)):
            folder = tmp_path / str(smoothing is None)
            folder.mkdir()
            builder = GraphBuilder("target", folder)
            graph = DecoderGraph(
                builder, spec, weights.tensor, precision="fp32", smoothing=smoothing
            )
            graph.build(taps=TAPS, draft_vocab=np.arange(VOCAB), max_tokens=128)
            probe = TargetProbe(builder.save(), spec, capacity=64)
            logits.append(probe.run([row], [0], probe.empty(1))[0][0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128, 160, 256])
def test_a_score_does_not_depend_on_what_is_beside_it(head_dim: int, tmp_path: Path) -> None:
    """To the last bit: in a quantized target, a difference of one bit can change the text."""
    b = GraphBuilder("scores", tmp_path)
    q = b.input("q", FLOAT, ["R", "kv", "S", head_dim])
    keys = b.input("keys", FLOAT, ["R", "kv", "C", head_dim])
    scores = folded_scores(b, q, keys, head_dim=head_dim, may_be_one_row=True)
    b.output(scores, "scores", FLOAT, ["R", "kv", "S", "C"])
    session = ort.InferenceSession(str(b.save()), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 1, 32, head_dim)).astype(np.float32)
    cached = rng.standard_normal((2, 1, 512, head_dim)).astype(np.float32)
    (wide,) = session.run(None, {"q": queries, "keys": cached})
    exact = queries.astype(np.float64) @ cached.astype(np.float64).swapaxes(2, 3)
    np.testing.assert_allclose(wide, exact, atol=1e-4)
    for rows, num_queries, capacity in ((2, 32, 64), (1, 4, 128), (1, 8, 64), (2, 1, 192)):
        part = {"q": queries[:rows, :, :num_queries], "keys": cached[:rows, :, :capacity]}
        (found,) = session.run(None, part)
        np.testing.assert_array_equal(found, wide[:rows, :, :num_queries, :capacity])
