"""Gemma 4 (text) against transformers, on tiny random models that transformers itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import export_pair, smoothing_factors

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.engine.engine import open_engine
from dspark_batch.errors import EngineError
from dspark_batch.export.probes import TargetProbe
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.builder import GraphBuilder
from dspark_batch.models.reference import forward
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.weights import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, LAYERS, WINDOW = 40, 32, 6, 6
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
TAPS = (-1, 0, 2, LAYERS - 2)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "layer_types": KINDS,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "keys-as-values": {},
    "own-values": {"attention_k_eq_v": False},
    "untied": {"tie_word_embeddings": False},
    "no-cap": {"final_logit_softcapping": None},
    "layer-inputs": {"hidden_size_per_layer_input": 8},
    "shared-keys": {"num_kv_shared_layers": 3},
    "e2b": {
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "one-head-size": {"global_head_dim": 8, "attention_k_eq_v": False},
}


def write_gemma4(folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Write a model whose weights are large enough for logits to differ, and whose norms and
    scalars are not 1. Returns it in fp32.
    """
    config = transformers.Gemma4TextConfig(**(BASE | changes))
    model = transformers.Gemma4ForCausalLM(config)
    torch.manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("layer_scalar"):
            tensor.data.uniform_(0.5, 1.2)
        elif tensor.dim() == 1 and "inv_freq" not in name:
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.dim() == 2:
            tensor.data.normal_(std=1.5 * tensor.shape[1] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


def build(folder: Path, source: Path, precision: str, smooth: Any = None) -> TargetProbe:
    folder.mkdir(exist_ok=True)
    with open_weights(source) as weights:
        spec = decoder_spec(weights.config)
        factors = None if smooth is None else smooth(spec, weights.tensor)
        graph = GraphBuilder("target", folder)
        DecoderGraph(
            graph, spec, weights.tensor, precision=precision, smoothing=Smoothing(factors)
        ).build(taps=TAPS, draft_vocab=np.arange(VOCAB), max_tokens=128)
        return TargetProbe(graph.save(), spec, capacity=64)


@pytest.mark.parametrize("name", CASES)
def test_graph_and_reference_equal_transformers(name: str, tmp_path: Path) -> None:
    model = write_gemma4(tmp_path / "target", **CASES[name])
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, VOCAB, n).tolist() for n in (40, 7, 19)]
    probe = build(tmp_path / "graph", tmp_path / "target", "fp32")
    logits, context, _ = probe.run(rows, [0] * 3, probe.empty(3))
    with open_weights(tmp_path / "target") as weights:
        spec = decoder_spec(weights.config)
        slow = forward(spec, weights.tensor, rows, taps=TAPS)
        slow_logits = [found.logits for found in slow]
    for r, row in enumerate(rows):
        with torch.no_grad():
            wanted = model(torch.tensor([row]), output_hidden_states=True)
        expected = wanted.logits[0].numpy()
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits[r], expected, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(slow_logits[r], expected, atol=1e-4, rtol=1e-4)
        streams = [wanted.hidden_states[tap + 1][0].numpy() for tap in TAPS]
        np.testing.assert_allclose(
            context[r], np.concatenate(streams, axis=1), atol=1e-4, rtol=1e-4
        )
        for tap, stream in zip(TAPS, streams, strict=True):
            np.testing.assert_allclose(slow[r].streams[tap], stream, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["keys-as-values", "e2b"])
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Many rows at once, some longer than the window; layers have caches of two shapes."""
    model = write_gemma4(tmp_path / "target", seed=3, **CASES[name])
    engine = open_engine(export_pair(tmp_path, tmp_path / "target", None))
    shapes = engine.manifest.target.cache.cache_shapes
    assert len(set(shapes)) == 2
    assert len(shapes) == LAYERS - CASES[name].get("num_kv_shared_layers", 0)
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, VOCAB, n).tolist() for n in (3, 30, WINDOW, 17, 25)]
    prompts = [Prompt(r, tuple(t), SamplingParams(max_new_tokens=24)) for r, t in enumerate(texts)]
    found = {
        c.row: list(c.token_ids) for c in decode(prompts, engine, spec="off", stats=DecodeStats())
    }
    engine.close()
    for r, text in enumerate(texts):
        with torch.no_grad():
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
def test_logits_depend_neither_on_neighbours_nor_on_tokens_per_call(
    precision: str, tmp_path: Path
) -> None:
    write_gemma4(tmp_path / "target", **CASES["e2b"])
    probe = build(tmp_path / "graph", tmp_path / "target", precision)
    rng = np.random.default_rng(0)
    row, other = rng.integers(1, VOCAB, 24).tolist(), rng.integers(1, VOCAB, 31).tolist()
    alone = probe.run([row], [0], probe.empty(1))[0][0]
    company = probe.run([other, row], [0, 0], probe.empty(2))[0][1]
    np.testing.assert_allclose(alone, company, atol=1e-4)
    caches = probe.empty(1)
    for begin, end in ((0, 5), (5, 6), (6, 20), (20, 24)):
        step, _, caches = probe.run([row[begin:end]], [begin], caches)
        np.testing.assert_allclose(step[0], alone[begin:end], atol=1e-4)


@pytest.mark.parametrize("name", ["keys-as-values", "e2b"])
def test_smoothing_leaves_the_function_as_it_is(name: str, tmp_path: Path) -> None:
    write_gemma4(tmp_path / "target", **CASES[name])
    row = np.random.default_rng(0).integers(1, VOCAB, 40).tolist()

    def factors(spec: Any, tensor: Any) -> Any:
        found = smoothing_factors(spec, tensor, [row[:20], row[20:]])
        moved = {name for name, factor in found.items() if (factor != 1).any()}
        assert moved == {name for name in found if not name.endswith("o_proj")}
        return found | {"lm_head": np.ones_like(found["lm_head"])}  # fp32 heads are never smoothed

    logits = []
    for smooth in (None, factors):
        probe = build(tmp_path / str(smooth is None), tmp_path / "target", "fp32", smooth)
        logits.append(probe.run([row], [0], probe.empty(1))[0][0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_int8_stays_close_to_fp32(tmp_path: Path) -> None:
    write_gemma4(tmp_path / "target", **CASES["e2b"])
    row = np.random.default_rng(0).integers(1, VOCAB, 40).tolist()
    logits = {}
    for precision in ("fp32", "int8"):
        probe = build(tmp_path / precision, tmp_path / "target", precision)
        logits[precision] = probe.run([row], [0], probe.empty(1))[0][0]
    error = np.linalg.norm(logits["int8"] - logits["fp32"]) / np.linalg.norm(logits["fp32"])
    assert 0 < error < 0.3


def published(folder: Path, source: Path) -> Path:
    """The same model as part of a multimodal checkpoint: nested, with flat attention keys."""
    config = json.loads((source / "config.json").read_text())
    del config["per_layer_config"], config["architectures"]
    text = config | {
        "model_type": "gemma4_unified_text",
        "global_head_dim": BASE["global_head_dim"],
        "num_global_key_value_heads": BASE["num_global_key_value_heads"],
        "use_bidirectional_attention": "vision",
    }
    folder.mkdir()
    outer = {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "text_config": text,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    tensors["model.embed_vision.embedding_projection.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_text_model_of_a_multimodal_checkpoint_is_found(tmp_path: Path) -> None:
    write_gemma4(tmp_path / "target")
    nested = published(tmp_path / "nested", tmp_path / "target")
    row = np.random.default_rng(0).integers(1, VOCAB, 30).tolist()
    logits = []
    for name in ("target", "nested"):
        with open_weights(tmp_path / name) as weights:
            spec = decoder_spec(weights.config)
            logits.append(forward(spec, weights.tensor, [row])[0].logits)
            assert spec.family == "gemma4"
    np.testing.assert_array_equal(*logits)
    assert nested.exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"enable_moe_block": True}, "enable_moe_block"),
    "bidirectional": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "attention-bias": ({"attention_bias": True}, "attention_bias"),
    "no-layer-to-share-with": ({"num_kv_shared_layers": 5}, "num_kv_shared_layers 5"),
    "small-layer-vocabulary": (
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 20},
        "vocab_size_per_layer_input",
    ),
    "other-override": ({"per_layer_config": {"0": {"sliding_window": 3}}}, "per_layer_config"),
    "activation": ({"hidden_activation": "relu"}, "'relu'"),
    "rope": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}
            }
        },
        "partial_rotary_factor 0.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    write_gemma4(tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(EngineError, match=message):
        export_pair(tmp_path, tmp_path / "target", None)
    assert not (tmp_path / "engines").exists()
