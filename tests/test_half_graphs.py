"""Graphs for TensorRT on ONNX Runtime's CPU: native attention, half precision, small weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from draft_graph import DraftGraph, build_draft
from safetensors.numpy import load_file, save_file
from tiny import VOCAB, draft_config, target_config, write_draft, write_target

from dspark_batch.errors import EngineError
from dspark_batch.export.check import Texts, check_target
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph import linears
from dspark_batch.models.graph.builder import BFLOAT16, FLOAT, FLOAT16, in_fp32
from dspark_batch.models.graph.linears import Precision, quantize_blocks
from dspark_batch.models.weights import open_weights

TAPS = (0, 1)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": target_config("llama"),
    "qwen3": target_config("qwen3", tie_word_embeddings=True),
    "gemma3": target_config("gemma3_text", final_logit_softcapping=2.0),
}
DRAFTS: dict[str, dict[str, Any]] = {
    "vanilla": draft_config(),
    "gated": draft_config(markov_head_type="gated"),
    "rnn": draft_config(markov_head_type="rnn"),
    "dflash": draft_config(
        markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
    ),
    "anchor-drafts-nothing": draft_config(sample_from_anchor=False),
}


def pair(folder: Path, family: str, draft: dict[str, Any] | None = None) -> tuple[Path, Path]:
    target = write_target(folder / "target", CONFIGS[family])
    return target, write_draft(folder / "draft", draft or draft_config())


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, n).tolist() for n in (40, 7, 19, 30)]


def parity(graph: Path, target: Path, precision: str) -> dict[str, float]:
    with open_weights(target) as weights:
        spec = decoder_spec(weights.config)
        texts = Texts.from_rows(spec, weights.tensor, prompts(), taps=TAPS)
        return check_target(graph, spec, weights.tensor, texts, precision=precision)


def all_rounds(graph: DraftGraph) -> list[np.ndarray]:
    """All outputs of a draft in rounds with contexts of different lengths; some rows sample."""
    rng = np.random.default_rng(3)
    found = []
    for counts in ([3, 1, 5], [1, 4, 2], [2, 2, 1]):
        context = [rng.standard_normal((n, graph.num_features)).astype(np.float32) for n in counts]
        uniforms = rng.uniform(size=(3, graph.num_drafts)).astype(np.float32)
        found += graph(context, [4, 9, 17], temperature=[0.0, 0.7, 1.0], uniforms=uniforms)
    return found


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_block_behind_its_context_is_drafted_as_one_beside_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = Precision(FLOAT, native_attention=True)
    monkeypatch.setitem(linears.PRECISIONS, "native", native)
    sources = pair(tmp_path, "llama", DRAFTS[kind])
    folded = build_draft(tmp_path / "fp32", *sources)
    joined = build_draft(tmp_path / "native", *sources, precision="native")
    nodes = [node.op_type for node in onnx.load(joined.path, load_external_data=False).graph.node]
    assert nodes.count("Attention") == 2
    assert nodes.count("TensorScatter") == 4
    for wanted, found in zip(all_rounds(folded), all_rounds(joined), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
def test_a_target_is_close_to_fp32(family: str, precision: str, tmp_path: Path) -> None:
    sources = pair(tmp_path, family)
    draft = build_draft(tmp_path / "half", *sources, precision=precision)
    graph = draft.path.with_name("target.onnx")
    found = parity(graph, sources[0], precision)
    assert found["agreement"] > 0.9
    model = onnx.load(graph, load_external_data=False)
    assert {entry.domain for entry in model.opset_import} == {"", "dspark"}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert types["past_key_0"] == types["past_value_2"] == FLOAT16
    assert types["draft_logits"] == FLOAT
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert (types["context"], types["present_key_0"], types["logits"]) == (FLOAT16, FLOAT16, FLOAT)
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT16 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


def test_a_draft_in_fp16_is_close_to_fp32(tmp_path: Path) -> None:
    sources = pair(tmp_path, "qwen3")
    wide = build_draft(tmp_path / "fp32", *sources)
    half = build_draft(tmp_path / "fp16", *sources, precision="fp16")
    (_, wanted, sure), (_, found, half_sure) = (
        graph([np.full((3, graph.num_features), 0.5, np.float32)], [7]) for graph in (wide, half)
    )
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=0, atol=0.1)
    np.testing.assert_allclose(half_sure[:, 0], sure[:, 0], rtol=0, atol=0.1)


def test_a_bfloat16_graph_has_a_twin_that_runs(tmp_path: Path) -> None:
    sources = pair(tmp_path, "llama")
    folder = tmp_path / "bf16"
    with pytest.raises(EngineError, match=r"ONNX Runtime .* cannot open it"):
        build_draft(folder, *sources, precision="bf16").num_features  # noqa: B018
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "target.onnx.data").hardlink_to(folder / "target.onnx.data")
    found = parity(in_fp32(folder / "target.onnx", twin), sources[0], "bf16")
    assert found["context_error"] > 1e-4  # the weights are those of the engine
    first, second = (
        onnx.load(path / "target.onnx", load_external_data=False) for path in (folder, twin)
    )
    assert {value.type.tensor_type.elem_type for value in first.graph.output} >= {BFLOAT16}
    assert not {value.type.tensor_type.elem_type for value in second.graph.output} & {BFLOAT16}
    casts = len(second.graph.node) - len(first.graph.node)
    stored = [t for t in first.graph.initializer if t.data_type == BFLOAT16 and t.external_data]
    assert casts == len(stored) > 10


def test_int4_takes_the_scale_with_the_smallest_error_of_each_block() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((96, 6)).astype(np.float32)
    matrix[32:64, 2] = 0.0
    weights, scales = quantize_blocks(matrix)
    assert weights.shape == matrix.shape
    assert scales.shape == (3, 6)
    assert (scales > 0).all()
    values = weights.astype(np.float32)
    assert set(np.unique(values)) <= set(range(-8, 8))

    def error(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return np.square(values * scales.repeat(32, axis=0) - matrix).reshape(3, 32, 6).sum(axis=1)

    largest = np.abs(matrix).reshape(3, 32, 6).max(axis=1)
    plain = np.maximum(largest, 1e-9) / 7
    found, rounded = error(values, scales), error(np.rint(matrix / plain.repeat(32, axis=0)), plain)
    assert found[1, 2] == 0
    assert (found <= rounded + 1e-6).mean() > 0.8
    assert found.sum() < 0.9 * rounded.sum()


def test_matrices_of_whole_blocks_have_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"HIDDEN": 64, "HEAD_DIM": 16, "FFN": 128}.items():
        monkeypatch.setattr(tiny, name, size)
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    graph = build_draft(tmp_path / "int4", target, draft, precision="int4-weights").path
    made = onnx.load(graph.with_name("target.onnx"), load_external_data=False)
    types = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    four = {name for name, kind in types.items() if kind == onnx.TensorProto.INT4}
    assert len(four) == 4 * tiny.LAYERS
    assert types["lm_head"] == onnx.TensorProto.INT8
    found = parity(graph.with_name("target.onnx"), target, "int4-weights")
    assert found["context_error"] > 1e-3
    assert found["agreement"] > 0.3  # of random weights, where chance is 0.03


def test_a_target_that_fp16_is_too_small_for_is_refused(tmp_path: Path) -> None:
    target, draft = pair(tmp_path, "llama")
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 3e4
    save_file(tensors, target / "model.safetensors")
    graph = build_draft(tmp_path / "fp16", target, draft, precision="fp16").path
    with pytest.raises(
        EngineError, match=r"(?s)is nan.*nothing was installed.*hint: .* --precision bf16"
    ):
        parity(graph.with_name("target.onnx"), target, "fp16")
