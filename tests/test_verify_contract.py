"""Every body of the verification op takes and gives what its contract says, in that order."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from verify_calls import SETTINGS, make_call

import dspark_batch
from dspark_batch.models.plugin import contract, launch, onnx_body, specification

ROOT = Path(dspark_batch.__file__).parent
NAMES = (*contract.INPUT_NAMES, *contract.OUTPUT_NAMES)


def test_every_operand_is_described_once() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(contract.OPERANDS)
    assert all(operand.meaning for operand in contract.OPERANDS.values())
    used = {size for operand in contract.OPERANDS.values() for size in operand.shape}
    assert used == set(contract.DIMENSIONS)
    assert set(contract.FED) | {"logits", "draft_vocab"} == set(contract.INPUT_NAMES)


def test_the_specification_takes_the_operands_in_order() -> None:
    assert tuple(inspect.signature(specification.verify).parameters) == contract.INPUT_NAMES


def test_the_onnx_function_has_the_operands_in_order() -> None:
    function = onnx_body.verify_function()
    assert tuple(function.input) == contract.INPUT_NAMES
    assert tuple(function.output) == contract.OUTPUT_NAMES
    assert (function.domain, function.name) == (contract.DOMAIN, contract.OP_TYPE)
    assert tuple(function.attribute) == tuple(contract.ATTRIBUTES)


def test_the_kernel_has_the_parameters_that_a_launch_passes() -> None:
    source = (ROOT / "models/plugin/triton_kernel.py").read_text()
    found = re.search(r"def dspark_verify\((.*?)\):", source, re.DOTALL)
    assert found is not None
    parameters = [line.strip().rstrip(",") for line in found[1].strip().split("\n")]
    assert parameters == [
        *launch.PARAMETERS,
        *(f"{name}: tl.constexpr" for name in launch.CONSTANTS),
    ]
    assert set(launch.PARAMETERS) == {*NAMES, *launch.SIZES, "workspace"}


@pytest.mark.parametrize("name", ["mixed", "reduced", "no-columns"])
def test_calls_have_the_types_and_shapes_of_the_contract(name: str) -> None:
    call = make_call(seed=0, rows=20, **SETTINGS[name])
    sizes: dict[str, int] = {}
    for operand in contract.INPUTS:
        array = call.feeds[operand.name]
        assert array.dtype == np.dtype(operand.dtype), operand.name
        assert array.ndim == len(operand.shape), operand.name
        for size, number in zip(operand.shape, array.shape, strict=True):
            assert sizes.setdefault(size, number) == number, (operand.name, size)
    assert sizes["K1"] == sizes["K"] + 1
    assert sizes["G1"] == sizes["G"] + 1


def test_a_target_graph_is_fed_what_the_contract_says(tmp_path: Path) -> None:
    from tiny import target_config, write_target

    from dspark_batch.models import DecoderGraph
    from dspark_batch.models.families import decoder_spec
    from dspark_batch.models.graph import FLOAT, GraphBuilder
    from dspark_batch.models.weights import open_weights

    with open_weights(str(write_target(tmp_path / "target", target_config("llama")))) as weights:
        builder = GraphBuilder("target", tmp_path, FLOAT)
        spec = decoder_spec(weights.config)
        DecoderGraph(builder, spec, weights.tensor, precision="fp32").build(
            taps=(0,), draft_vocab=np.arange(5), max_tokens=64
        )
        builder.save()
    graph = onnx.load(tmp_path / "target.onnx", load_external_data=False).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    for name in (*contract.FED, *contract.OUTPUT_NAMES):
        operand = contract.OPERANDS[name]
        shape = [dim.dim_param or str(dim.dim_value) for dim in values[name].shape.dim]
        assert shape == ["5" if size == "D" else size for size in operand.shape], name
        kind = onnx.helper.tensor_dtype_to_np_dtype(values[name].elem_type)
        assert kind == np.dtype(operand.dtype), name
    node = next(node for node in graph.node if node.op_type == contract.OP_TYPE)
    assert list(node.input) == list(contract.INPUT_NAMES)
    attributes = {a.name: onnx.helper.get_attribute_value(a).decode() for a in node.attribute}
    assert attributes == contract.ATTRIBUTES
