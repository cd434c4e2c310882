"""The TensorRT plugin of the verification op, in builds of TensorRT-RTX that need no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rtx
from interpreted import prepare
from onnx import TensorProto, numpy_helper
from tiny import VOCAB, target_config, write_target
from verify_calls import assert_same, make_call, one_node_model

from dspark_batch.errors import EngineError
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.builder import GraphBuilder
from dspark_batch.models.plugin import trt_body
from dspark_batch.models.plugin.contract import INPUT_NAMES, OUTPUT_NAMES
from dspark_batch.models.plugin.launch import STAGES, Kernel, compile_kernels
from dspark_batch.models.weights import open_weights

pytest.importorskip("tensorrt_rtx_libs")
pytest.importorskip("triton")
DRAFT_VOCAB, GAMMA = 20, 4
KERNELS = (
    Kernel(89, "survey", num_threads=512, shared_bytes=256, cubin=bytes(range(256)) * 9),
    Kernel(89, "draw", num_threads=128, shared_bytes=64, cubin=b"\x01\xfe other"),
    Kernel(120, "survey", num_threads=256, shared_bytes=128, cubin=b"\x00\xff another"),
)


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """A process that imports TensorRT-RTX and interprets Triton."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare) as executor:
        yield executor


def profile() -> tuple[rtx.Shapes, rtx.Shapes, rtx.Shapes]:
    """From one row without drafts to eight rows with all."""

    def shapes(rows: int, drafts: int) -> rtx.Shapes:
        known = {
            "logits": (rows * (drafts + 1), VOCAB),
            "logit_rows": (rows, drafts + 1),
            "draft_tokens": (rows, drafts),
            "draft_logits": (rows, GAMMA, DRAFT_VOCAB),
            "draft_vocab": (DRAFT_VOCAB,),
            "uniforms": (rows, GAMMA + 1),
        }
        return {name: known.get(name, (rows,)) for name in INPUT_NAMES if name != "draft_vocab"}

    return shapes(1, 0), shapes(4, GAMMA), shapes(8, GAMMA)


def model(draft_vocab: Any = None, *, logits: int = TensorProto.FLOAT) -> bytes:
    """One node with its function body and plugin attributes; `draft_vocab` is a constant."""
    made = one_node_model(vocab=VOCAB, draft_vocab=DRAFT_VOCAB)
    made.graph.input[0].type.tensor_type.elem_type = logits
    ids = np.arange(DRAFT_VOCAB) * 2 if draft_vocab is None else np.asarray(draft_vocab)
    made.graph.initializer.append(numpy_helper.from_array(ids.astype(np.int64), "draft_vocab"))
    inputs = [value for value in made.graph.input if value.name != "draft_vocab"]
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    onnx.checker.check_model(made, full_check=logits == TensorProto.FLOAT)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize("arch", [75, 89, 120])
def test_the_parser_takes_the_plugin_and_the_engine_keeps_the_kernel(
    arch: int, process: Executor
) -> None:
    kernels = compile_kernels([arch])
    built = process.submit(rtx.build, model(), kernels, profile(), arch).result()
    assert sorted(built.layers) == ["CONSTANT", "PLUGIN_V3"]
    assert built.refusal is None
    for callback in (
        "get_capability_interface",
        "get_output_data_types",
        "get_output_shapes",
        "configure_plugin",
        "get_workspace_size",
        "get_fields_to_serialize",
    ):
        assert callback in built.callbacks, callback
    for position in range(len(INPUT_NAMES) + len(OUTPUT_NAMES)):
        assert f"supports_format_combination {position} True" in built.callbacks
    assert "enqueue" not in built.callbacks
    assert built.plan is not None
    assert len(kernels) == len(STAGES)
    for kernel in kernels:
        assert kernel.cubin in built.plan
        assert f"cubin_sm_{arch}_{kernel.stage}".encode() in built.plan


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_target_graph_builds_with_the_plugin(
    family: str, tmp_path: Path, process: Executor
) -> None:
    """The graph as ONNX Runtime has it, but for the cache's capacity."""
    rows, most, capacity = 4, 5, 64
    with open_weights(write_target(tmp_path / "target", target_config(family))) as weights:
        builder = GraphBuilder("target", tmp_path)
        spec = decoder_spec(weights.config)
        graph = DecoderGraph(builder, spec, weights.tensor, precision="fp32")
        graph.build(taps=[0, 1], draft_vocab=np.arange(0, VOCAB, 2), max_tokens=capacity)
        path = builder.save()
    made = onnx.load(path, load_external_data=False)
    least = {"R": 1, "S": 1, "T": 1, "N": 1, "K": 0, "K1": 1, "G": GAMMA, "G1": GAMMA + 1}
    largest = {"R": rows, "S": most, "T": rows * most, "N": rows * most, "K": most - 1, "K1": most}
    shapes: tuple[rtx.Shapes, rtx.Shapes] = ({}, {})
    for value in (*made.graph.input, *made.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if dim.dim_param == "C":
                dim.dim_value = capacity
        if value in made.graph.input:
            for found, sizes in zip(shapes, (least, least | largest), strict=True):
                found[value.name] = tuple(
                    sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims
                )
    onnx.save(made, path)
    profile = (shapes[0], shapes[1], shapes[1])
    built = process.submit(rtx.build, path, compile_kernels([89]), profile).result()
    assert built.refusal is None
    assert built.layers.count("PLUGIN_V3") == 1
    assert built.layers.count("KV_CACHE_UPDATE") == 2 * spec.num_layers
    assert built.layers.count("ROTARY_EMBEDDING") == spec.num_layers
    assert built.outputs["bonus"][1] == "INT64"
    assert built.plan is not None


def test_outputs_have_a_row_each(process: Executor) -> None:
    sizes = {"R": 3, "N": 12, "K": 3, "K1": 4, "G": GAMMA, "G1": GAMMA + 1}
    fixed = onnx.load_from_string(model())
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    built = process.submit(rtx.build, bytes(fixed.SerializeToString()), KERNELS).result()
    assert built.outputs == dict.fromkeys(OUTPUT_NAMES, ((3,), "INT64"))


def test_without_the_plugin_the_parser_expands_the_function() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        built = fresh.submit(rtx.build, model(), ()).result()
    assert "PLUGIN_V3" not in built.layers
    assert built.layers.count("TOPK") > 1
    assert built.refusal is not None
    assert "0 plugin layers" in built.refusal
    assert "register the plugin" in built.refusal


def test_half_precision_logits_are_refused(process: Executor) -> None:
    built = process.submit(rtx.build, model(logits=TensorProto.FLOAT16), KERNELS).result()
    assert built.refusal is not None
    assert "logits is DataType.HALF and must be DataType.FLOAT" in built.refusal


@pytest.mark.parametrize(
    "draft_vocab",
    [np.arange(DRAFT_VOCAB)[::-1], np.arange(DRAFT_VOCAB) // 2],
)
def test_a_draft_vocabulary_that_does_not_ascend_is_refused(
    draft_vocab: Any, process: Executor
) -> None:
    built = process.submit(rtx.build, model(draft_vocab), KERNELS).result()
    assert built.refusal is not None
    assert "must be ascending" in built.refusal


def test_the_runtime_reads_the_kernels_that_the_engine_keeps(process: Executor) -> None:
    assert tuple(process.submit(rtx.read_back, KERNELS).result()) == KERNELS


def test_an_engine_with_a_kernel_of_another_version_is_refused() -> None:
    """As before there were stages."""
    arrays = {"launch_sm_89": np.zeros(2, np.int32), "cubin_sm_89": np.zeros(9, np.int8)}
    with pytest.raises(EngineError, match=r"(?s)of another version.*export the engine again"):
        trt_body.kernels_from_arrays(arrays)


def test_an_engine_without_kernels_is_not_built(process: Executor) -> None:
    assert "without kernels" in process.submit(rtx.create_without_kernels).result()


@pytest.mark.parametrize("drafts", [4, 2, 0])
def test_enqueue_decides_as_the_specification(drafts: int, process: Executor) -> None:
    call = make_call(
        seed=31,
        rows=10,
        drafts=drafts,
        draft_vocab=20,
        temperature=[0.0, 0.8],
        top_k=[0, 5],
        top_p=[0.8, 1.0],
    )
    results, streams = process.submit(rtx.enqueue, call, 4711).result()
    assert_same(call, lambda _: results)
    assert streams == [4711]


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_body, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    with pytest.raises(EngineError, match=r"(?s)TensorRT-RTX is not installed.*pip install"):
        trt_body.import_tensorrt_rtx.__wrapped__()
