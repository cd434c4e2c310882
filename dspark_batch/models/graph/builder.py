"""`GraphBuilder`, a small writer of ONNX graphs whose weights go to a file of their own.

A weight is written to `<graph>.onnx.data` as soon as it is added, a block of rows at a time, so
that a build holds no more in memory than that block. A second graph can refer to a weight that the
first one wrote (`share`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
IR_VERSION = 11
_ALIGNMENT = 4096  # bytes: a page, so that the runtime can map a weight in place
_BLOCK = 2**26  # bytes of a weight that are converted and written at once
FLOAT, FLOAT16, BFLOAT16, INT32, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
DTYPES: dict[int, Any] = {FLOAT: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
INT4: Any = ml_dtypes.int4

Dim = int | str


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Where a weight is stored: file name in the engine folder, byte range, ONNX type, shape."""

    location: str
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class _DataFile:
    """What a graph, and those forked from it, have written so far."""

    location: str
    size: int = 0
    stored: dict[str, StoredWeight] = field(default_factory=dict)


class GraphBuilder:
    """Collects one graph. Values are names: `op` adds a node and returns the name of its output.

    The graph is written to `<name>.onnx` and `<name>.onnx.data` in `folder`. `data_type` is the
    type of its activations; what needs more than half precision goes between `wide` and `narrow`.
    """

    def __init__(self, name: str, folder: Path, data_type: int = FLOAT) -> None:
        self.name = name
        self.data_type = data_type
        self._folder = folder
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._functions: list[onnx.FunctionProto] = []
        self._domains: dict[str, int] = {"": OPSET}
        self._stored: dict[str, StoredWeight] = {}
        self._count = 0
        self._data = _DataFile(f"{name}.onnx.data")

    # values -------------------------------------------------------------------------------------

    def input(self, name: str, data_type: int, shape: Sequence[Dim]) -> str:
        """Declare a graph input. Strings in `shape` are symbolic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))
        return name

    def output(self, value: str, name: str, data_type: int, shape: Sequence[Dim]) -> str:
        """Rename `value` to `name` and declare it as a graph output; returns `name`."""
        self.rename(value, name)
        self._outputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))
        return name

    def rename(self, value: str, name: str) -> str:
        """Rename `value` to `name`, so that it can be found from outside; returns `name`."""
        for node in self._nodes:
            for values in (node.input, node.output):
                for i, candidate in enumerate(values):
                    if candidate == value:
                        values[i] = name
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant, stored in the graph file; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: Any) -> str:
        """A constant in the type of the graph."""
        return self.constant(value, DTYPES[self.data_type])

    def weight(self, name: str, array: NDArray[Any], dtype: Any = None) -> str:
        """Write `array` to the data file as initializer `name`, unless `name` is there already.

        It is stored as `dtype`, by default as it is. int4 rows must have an even length, because
        two values share a byte.
        """
        if name in self._stored:
            return name
        data = self._data
        if name in data.stored:
            return self.share(name, data.stored[name])
        stored_as = np.dtype(dtype or array.dtype)
        row_bytes = stored_as.itemsize * math.prod(array.shape[1:])
        if stored_as == INT4:
            row_bytes //= 2
        num_rows = max(1, _BLOCK // max(1, row_bytes))
        offset = -(-data.size // _ALIGNMENT) * _ALIGNMENT
        # Opened per weight: a build that fails half-way leaves no file open.
        with (self._folder / data.location).open("r+b" if data.size else "wb") as file:
            file.seek(offset)
            for begin in range(0, len(array), num_rows):
                block = np.ascontiguousarray(array[begin : begin + num_rows], stored_as)
                octets: NDArray[Any] = block.reshape(-1).view(np.uint8)
                if stored_as == INT4:
                    octets = (octets[::2] & 15) | (octets[1::2] << 4)
                file.write(octets.data)
        length = row_bytes * len(array)
        data.size = offset + length
        data.stored[name] = StoredWeight(
            location=data.location,
            offset=offset,
            length=length,
            data_type=helper.np_dtype_to_tensor_dtype(stored_as),
            shape=array.shape,
        )
        return self.share(name, data.stored[name])

    def share(self, name: str, stored: StoredWeight) -> str:
        """Declare initializer `name`, whose bytes are in a data file of the folder already."""
        if name in self._stored:
            return name
        tensor = TensorProto(name=name, data_type=stored.data_type, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(getattr(stored, key))
        self._initializers.append(tensor)
        self._stored[name] = stored
        return name

    def has(self, name: str) -> bool:
        """Whether the graph has weight `name`, written or shared."""
        return name in self._stored

    def stored(self, name: str) -> StoredWeight:
        """Where weight `name` is stored, to `share` it with another graph."""
        return self._stored[name]

    # nodes --------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: str,
        outputs: int,
        unused: Collection[int] = (),
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with `outputs` outputs; returns their names, "" for those that are unused."""
        self._count += 1
        stem = f"{op_type}_{self._count}"
        names = [stem if outputs == 1 else f"{stem}_{i}" for i in range(outputs)]
        names = ["" if i in unused else name for i, name in enumerate(names)]
        self._domains.setdefault(domain, 1)
        self._nodes.append(
            helper.make_node(op_type, list(inputs), names, name=stem, domain=domain, **attributes)
        )
        return names

    def wide(self, value: str) -> str:
        """Cast a value in the type of the graph to fp32."""
        return value if self.data_type == FLOAT else self.op("Cast", value, to=FLOAT)

    def narrow(self, value: str) -> str:
        """Cast an fp32 value to the type of the graph."""
        return value if self.data_type == FLOAT else self.op("Cast", value, to=self.data_type)

    def fork(self, name: str) -> GraphBuilder:
        """Another graph that begins with all that this one has, and shares its weights."""
        other = GraphBuilder(name, self._folder, self.data_type)
        other._inputs, other._outputs = list(self._inputs), list(self._outputs)
        other._initializers = list(self._initializers)
        other._nodes = [copy.deepcopy(node) for node in self._nodes]  # which `rename` changes
        other._functions = list(self._functions)
        other._constants, other._domains = dict(self._constants), dict(self._domains)
        other._stored, other._count, other._data = dict(self._stored), self._count, self._data
        return other

    def sibling(self, name: str) -> GraphBuilder:
        """Another, empty graph, whose weights are in the data file of this one."""
        other = GraphBuilder(name, self._folder, self.data_type)
        other._data = self._data
        return other

    def function(self, function: onnx.FunctionProto) -> None:
        """Add a model-local function; call it with `ops(..., domain=function.domain)`."""
        self._functions.append(function)
        self._domains.setdefault(function.domain, 1)

    @classmethod
    def opened(cls, path: Path) -> GraphBuilder:
        """A graph from its file, to add nodes to. Weights of its own it cannot get."""
        model = onnx.load(path, load_external_data=False)
        b = cls(model.graph.name, path.parent)
        b._nodes, b._functions = list(model.graph.node), list(model.functions)
        b._inputs, b._outputs = list(model.graph.input), list(model.graph.output)
        b._initializers = list(model.graph.initializer)
        b._domains = {each.domain: each.version for each in model.opset_import}
        b._count = 10 * len(b._nodes)  # above every number in a name
        kinds = [value.type.tensor_type.elem_type for value in b._outputs if value.name == "logits"]
        b.data_type = kinds[0] if kinds else FLOAT
        for tensor in b._initializers:
            if tensor.name.startswith("const_"):
                array = numpy_helper.to_array(tensor)
                b._constants[array.dtype.str, array.shape, array.tobytes()] = tensor.name
        return b

    def model(self) -> onnx.ModelProto:
        """The graph so far."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, self._initializers
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(d, v) for d, v in self._domains.items()],
            functions=self._functions,
            ir_version=IR_VERSION,
            producer_name="dspark-batch",
        )

    def save(self) -> Path:
        """Write `<name>.onnx`."""
        path = self._folder / f"{self.name}.onnx"
        path.write_bytes(self.model().SerializeToString())
        return path


def in_fp32(graph: Path, folder: Path) -> Path:
    """Write a copy of a bfloat16 graph that computes in fp32 to `folder`; returns its path.

    The weights are not copied: `folder` must have the data file of the graph too.
    """
    model = onnx.load(graph, load_external_data=False)
    in_fp32_model(model)
    path = folder / graph.name
    path.write_bytes(model.SerializeToString())
    return path


def in_fp32_model(model: onnx.ModelProto) -> None:
    """Let a bfloat16 model compute in fp32; what lies in a data file is cast."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != BFLOAT16:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            name = tensor.name
            tensor.name = f"{name}.bf16"
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=FLOAT))
        else:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def copy_graph() -> bytes:
    """A model that copies bytes on any device, from its input `source` [n] to output `target`."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["source"], ["target"])],
        "copy",
        [helper.make_tensor_value_info("source", TensorProto.UINT8, ["n"])],
        [helper.make_tensor_value_info("target", TensorProto.UINT8, ["n"])],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def clear_graph() -> bytes:
    """A model that writes `n` [1] int64 zeros to its output `target` [n]."""
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["n"], ["target"], value=zero)],
        "clear",
        [helper.make_tensor_value_info("n", INT64, [1])],
        [helper.make_tensor_value_info("target", INT64, ["n"])],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
