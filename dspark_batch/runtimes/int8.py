"""Whether this processor adds int8 products exactly, and the remedy where it does not.

Without VNNI, AMX or their like, ONNX Runtime's kernel for unsigned activations and signed weights
adds pairs of products in 16 bits, where 255 * 127 * 2 does not fit: the sum saturates, and the text
gets worse without a word. Its kernel for unsigned weights adds in 32 bits everywhere. So where a
probe finds a wrong sum, a graph is opened with every weight w rewritten as w + 128, unsigned, with
zero point 128: the same numbers, exact sums. Elsewhere signed weights are faster, so files keep
those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from dspark_batch.hardware import Int8
from dspark_batch.models.graph import IR_VERSION, OPSET

_PRODUCT, _DOMAIN = "MatMulIntegerToFloat", "com.microsoft"
_WEIGHT, _ZERO_POINT = 1, 5  # of the product's inputs
_ROWS = (1, 2, 3, 4, 8, 40)  # kernels differ by the number of rows
_INNER = 256
_TIMED = (32, 576, 3072)  # rows, inputs and outputs of a product that is timed
_REPEATS = 15


@cache
def sums_exactly() -> bool:
    """Whether products of the worst values with signed weights come out as integers do."""
    weights = np.full((_INNER, 64), 127, np.int8)
    weights[:, ::2] = -127
    weights[::2, 1::4] = 0
    session = _session(_product(weights))
    for num_rows in _ROWS:
        x = np.full((num_rows, _INNER), 255, np.uint8)
        x[:, 1::4] = 0
        (found,) = session.run(None, {"x": x})
        wanted = (x.astype(np.int64) - 128) @ weights.astype(np.int64)
        if not np.array_equal(found, wanted):  # below 2^24: fp32 holds them
            return False
    return True


def remedy_name() -> str | None:
    """What is done to weights here, in words; None where they are exact as they are stored."""
    return None if sums_exactly() else "unsigned int8 weights"


def remedy(model: onnx.ModelProto) -> None:
    """Change the graph so that its products are exact here; its data files stay what they are."""
    if not sums_exactly():
        rewrite(model)


def measure_int8() -> Int8:
    """Probe and time products, which takes a moment."""
    num_rows, height, width = _TIMED
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (height, width), dtype=np.int8)
    x = rng.integers(0, 256, (num_rows, height), dtype=np.uint8)
    stored, exact = _product(weights), _product(weights)
    rewrite(exact)
    floats = _product(weights.astype(np.float32))
    sessions = [_session(model) for model in (stored, exact, floats)]
    feeds: list[dict[str, NDArray[Any]]] = [{"x": x}, {"x": x}, {"x": x.astype(np.float32)}]
    sweeps = [
        [_seconds(s, f) for s, f in zip(sessions, feeds, strict=True)] for _ in range(_REPEATS)
    ]
    as_stored, unsigned, fp32 = (median(times) for times in zip(*sweeps[1:], strict=True))
    used = as_stored if sums_exactly() else unsigned
    return Int8(sums_exactly(), used / fp32, used / as_stored)


def rewrite(model: onnx.ModelProto) -> int:
    """Make every product of a signed stored weight one of an unsigned one; how many there were.

    The three nodes that turn a weight are folded when a session is opened. A weight of several
    products is turned once, and products in branches and functions are found too.
    """
    signed = {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8
    }
    products = [
        node
        for node in _nodes(model.graph.node)
        if node.op_type == _PRODUCT and node.domain == _DOMAIN and node.input[_WEIGHT] in signed
    ]
    if not products:
        return 0
    shift, zero_point = "int8.shift", "int8.zero_point"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(128, np.int16), shift),
            numpy_helper.from_array(np.array(128, np.uint8), zero_point),
        ]
    )
    turned = []
    for name in dict.fromkeys(node.input[_WEIGHT] for node in products):
        wide, shifted = f"{name}.wide", f"{name}.shifted"
        turned += [
            helper.make_node("Cast", [name], [wide], to=TensorProto.INT16),
            helper.make_node("Add", [wide, shift], [shifted]),
            helper.make_node("Cast", [shifted], [f"{name}.unsigned"], to=TensorProto.UINT8),
        ]
    for node in products:
        while len(node.input) <= _ZERO_POINT:
            node.input.append("")
        node.input[_ZERO_POINT] = zero_point
        node.input[_WEIGHT] = f"{node.input[_WEIGHT]}.unsigned"
    nodes = [*turned, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(products)


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of their branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g.node)


def _product(weights: NDArray[Any]) -> onnx.ModelProto:
    """A model of one product `x @ weights`, as `models.linears` writes it, or in fp32."""
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
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _seconds(session: ort.InferenceSession, feeds: dict[str, NDArray[Any]]) -> float:
    begin = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - begin
