"""int8 products with unsigned weights, for CPUs on which sums with signed weights saturate.

A weight w is stored as w + 128, unsigned, with zero point 128, which is the same number.
`engine.runtimes.int8` finds out which CPUs need that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from dspark_batch.models.graph.builder import IR_VERSION, OPSET
from dspark_batch.models.graph.paged import with_twins

_PRODUCT, _DOMAIN = "MatMulIntegerToFloat", "com.microsoft"
_WEIGHT, _ZERO_POINT = 1, 5  # positions among the inputs of the product


def reopened(
    path: Path, *, outputs: Collection[str] = (), unsigned: bool = False, twins: bool = False
) -> bytes:
    """The graph in `path` with more of its values as `outputs`.

    If wanted, with unsigned weights, or with twins of attention over pages (`paged`).

    Data files do not change: the runtime converts the weights when it opens the graph. Raises
    ValueError as `rewrite` does.
    """
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    if unsigned:
        rewrite(model)
    if twins:
        with_twins(model)
    return bytes(model.SerializeToString())


def rewrite(model: onnx.ModelProto) -> None:
    """Give all int8 products, also those in branches and functions, unsigned weights.

    Three nodes convert each weight; the runtime folds them when it opens the graph.

    Raises:
        ValueError: a product's weight is not an initializer of the graph.
    """
    signed = {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8
    }
    functions = (node for function in model.functions for node in function.node)
    products = [
        node
        for node in _nodes([*model.graph.node, *functions])
        if node.op_type == _PRODUCT and node.domain == _DOMAIN
    ]
    if unknown := {node.input[_WEIGHT] for node in products} - signed:
        raise ValueError(f"int8 products with weights that are not stored: {sorted(unknown)}")
    if not products:
        return
    shift, zero_point = "int8.shift", "int8.zero_point"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(128, np.int16), shift),
            numpy_helper.from_array(np.array(128, np.uint8), zero_point),
        ]
    )
    conversions = []
    for name in dict.fromkeys(node.input[_WEIGHT] for node in products):
        wide, shifted = f"{name}.wide", f"{name}.shifted"
        conversions += [
            helper.make_node("Cast", [name], [wide], to=TensorProto.INT16),
            helper.make_node("Add", [wide, shift], [shifted]),
            helper.make_node("Cast", [shifted], [f"{name}.unsigned"], to=TensorProto.UINT8),
        ]
    for node in products:
        while len(node.input) <= _ZERO_POINT:
            node.input.append("")
        node.input[_ZERO_POINT] = zero_point
        node.input[_WEIGHT] = f"{node.input[_WEIGHT]}.unsigned"
    nodes = [*conversions, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those inside their branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g.node)


def product(weights: NDArray[Any], *, unsigned: bool = False) -> bytes:
    """A model of one product, y = x @ weights: as `Linears` writes it, or fp32 for fp32 weights.

    x `[T, in]` is uint8 with zero point 128, or fp32.
    """
    integers = weights.dtype == np.int8
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    if integers:
        inputs = ["x", "weights", "one", "one", "middle"]
        node = helper.make_node(_PRODUCT, inputs, ["y"], domain=_DOMAIN)
    x_type = TensorProto.UINT8 if integers else TensorProto.FLOAT
    height, width = weights.shape
    graph = GraphProto(name="product", node=[node])
    graph.input.append(helper.make_tensor_value_info("x", x_type, ["T", height]))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", width]))
    constants: dict[str, NDArray[Any]] = {"weights": weights}
    if integers:
        constants |= {"one": np.array(1, np.float32), "middle": np.array(128, np.uint8)}
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    if unsigned:
        rewrite(model)
    return bytes(model.SerializeToString())
