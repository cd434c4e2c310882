"""Graphs that were written before, with more outputs or other nodes; and one of a product alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper

from dspark_batch.models.graph.builder import IR_VERSION, OPSET
from dspark_batch.models.graph.linears import MOST_LEVEL
from dspark_batch.models.graph.paged import with_twins


def reopened(path: Path, *, outputs: Collection[str] = (), twins: bool = False) -> bytes:
    """The graph in `path` with more of its values as `outputs`.

    If wanted, with twins of attention over pages (`paged`). Its data files stay what they are.
    """
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    if twins:
        with_twins(model)
    return bytes(model.SerializeToString())


def product(weights: NDArray[Any]) -> bytes:
    """A model of one product, y = x @ weights: as `Linears` writes it, or fp32 for fp32 weights.

    x `[T, in]` is uint8 with zero point `MOST_LEVEL`, or fp32.
    """
    integers = weights.dtype == np.int8
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    if integers:
        inputs = ["x", "weights", "one", "one", "middle"]
        node = helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain="com.microsoft")
    x_type = TensorProto.UINT8 if integers else TensorProto.FLOAT
    height, width = weights.shape
    graph = GraphProto(name="product", node=[node])
    graph.input.append(helper.make_tensor_value_info("x", x_type, ["T", height]))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", width]))
    constants: dict[str, NDArray[Any]] = {"weights": weights}
    if integers:
        constants |= {"one": np.array(1, np.float32), "middle": np.array(MOST_LEVEL, np.uint8)}
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
