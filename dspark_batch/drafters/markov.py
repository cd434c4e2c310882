"""The sequential part of a draft: the Markov head, and drawing a token from a slot's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from dspark_batch.models.blocks import Linears, embedding
from dspark_batch.models.graph import FLOAT, FLOAT16

Tensor = Callable[[str], NDArray[Any]]

_DRAW = """
<domain: "dspark", opset_import: ["" : 24]>
Draw (logits, temperature, uniforms) => (ids)
{
    zero = Constant <value_float = 0.0> ()
    warmest = ReduceMax <keepdims = 0> (temperature)
    sampling = Greater (warmest, zero)
    ids = If (sampling) <
        then_branch = sampled () => (ids_then) {
            one = Constant <value_float = 1.0> ()
            last_axis = Constant <value_int = 1> ()
            axis1 = Constant <value_ints = [1]> ()
            minus_ones = Constant <value_ints = [-1]> ()
            to_end = Constant <value_ints = [9223372036854775807]> ()
            hot = Greater (temperature, zero)
            divisor = Where (hot, temperature, one)
            divisor1 = Unsqueeze (divisor, axis1)
            largest = ReduceMax <keepdims = 1> (logits, axis1)
            shifted = Sub (logits, largest)
            cooled = Div (shifted, divisor1)
            probs = Softmax <axis = 1> (cooled)
            cumulative = CumSum (probs, last_axis)
            total = Slice (cumulative, minus_ones, to_end, axis1)
            uniforms1 = Unsqueeze (uniforms, axis1)
            threshold = Mul (uniforms1, total)
            below = LessOrEqual (cumulative, threshold)
            below_int = Cast <to = 7> (below)
            drawn0 = ReduceSum <keepdims = 0> (below_int, axis1)
            size = Shape <start = 1, end = 2> (logits)
            one_int = Constant <value_int = 1> ()
            last = Sub (size, one_int)
            drawn = Min (drawn0, last)
            best_then = ArgMax <axis = 1, keepdims = 0> (logits)
            ids_then = Where (hot, drawn, best_then)
        },
        else_branch = greedy () => (ids_else) {
            ids_else = ArgMax <axis = 1, keepdims = 0> (logits)
        }
    >
}
"""


def draw_function() -> onnx.FunctionProto:
    """`dspark::Draw`: argmax where the temperature is 0, else the inverse CDF at the uniform.

    logits float [R, D], temperature float [R], uniforms float [R] -> ids int64 [R].
    """
    return onnx.parser.parse_function(_DRAW)


class MarkovWalk:
    """The sequential head: the bias that the previous token puts on a slot's logits.

    vanilla, gated and rnn as in DeepSpec; the rnn carries its state from slot to slot.
    """

    def __init__(self, linears: Linears, tensor: Tensor, head: str | None, anchors: str) -> None:
        self._b, self._linears, self._tensor = linears.b, linears, tensor
        self._head, self._anchors = head, anchors
        table = tensor("markov_head.markov_w1.weight")
        self._type = FLOAT if linears.precision == "fp32" else FLOAT16
        dtype = np.float32 if self._type == FLOAT else np.float16
        self._table = self._b.weight("markov_head.markov_w1", table.astype(dtype))
        self._state: str | None = None

    def embed(self, previous: str) -> str:
        """`E[prev]`, fp32 `[R, r]`."""
        return embedding(self._b, self._table, previous, self._type)

    def bias(self, state: str, feature: str) -> str:
        """Bias `[R, D]` from the slot's hidden state `[R, d]` and `E[prev]` `[R, r]`."""
        b, head = self._b, self._head
        if head == "gated":
            gate = b.op("Sigmoid", self._joint("gate_proj", [state, feature]))
            feature = b.op("Mul", gate, feature)
        elif head == "rnn":
            feature = b.op("Tanh", self._step(state, feature))
        return self._project("markov_w2", feature)

    def _step(self, state: str, feature: str) -> str:
        b = self._b
        if self._state is None:
            self._state = b.op("Mul", feature, b.constant(0.0, np.float32))
        joint = self._joint("joint_proj", [self._state, feature, state])
        gate, candidate, out = b.ops("Split", joint, outputs=3, axis=1, num_outputs=3)
        gate = b.op("Sigmoid", gate)
        kept = b.op("Mul", gate, self._state)
        one = b.constant(1.0, np.float32)
        taken = b.op("Mul", b.op("Sub", one, gate), b.op("Tanh", candidate))
        self._state = b.op("Add", kept, taken)
        return out

    def _joint(self, name: str, parts: Sequence[str]) -> str:
        b = self._b
        product = self._project(name, b.op("Concat", *parts, axis=1))
        bias = self._tensor(f"markov_head.{name}.bias").astype(np.float32)
        return b.op("Add", product, b.weight(f"markov_head.{name}.bias", bias))

    def _project(self, name: str, x: str) -> str:
        matrix = self._tensor(f"markov_head.{name}.weight").T
        activation = self._linears.activation(x, self._anchors)
        return self._linears.linear(f"markov_head.{name}", activation, matrix)
