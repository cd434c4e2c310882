"""The sequential part of a draft: the Markov head, and drawing a token from a slot's logits."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.parser

from dspark_batch.models.graph import DTYPES, MASKED, Linears, embedding
from dspark_batch.models.weights import ReadTensor

# Candidates that a filter looks at; one that would keep more of them keeps everything.
CANDIDATES = 256

_DRAW = f"""
<domain: "dspark", opset_import: ["" : 24]>
Draw (logits, temperature, top_k, top_p, uniforms) => (ids, drawn_from)
{{
    zero = Constant <value_float = 0.0> ()
    warmest = ReduceMax <keepdims = 0> (temperature)
    sampling = Greater (warmest, zero)
    ids, drawn_from = If (sampling) <
        then_branch = sampled () => (ids_then, drawn_then) {{
            one = Constant <value_float = 1.0> ()
            masked = Constant <value_float = {MASKED}> ()
            no_tokens = Constant <value_int = 0> ()
            one_token = Constant <value_int = 1> ()
            last_axis = Constant <value_int = 1> ()
            axis1 = Constant <value_ints = [1]> ()
            minus_ones = Constant <value_ints = [-1]> ()
            to_end = Constant <value_ints = [9223372036854775807]> ()
            many = Constant <value_ints = [{CANDIDATES}]> ()
            hot = Greater (temperature, zero)
            divisor = Where (hot, temperature, one)
            divisor1 = Unsqueeze (divisor, axis1)
            cooled = Div (logits, divisor1)
            soft = Softmax <axis = 1> (cooled)

            size = Shape <start = 1, end = 2> (logits)
            few = Min (many, size)
            few_last = Sub (few, one_token)
            values, indices = TopK <axis = 1, sorted = 1> (soft, few)
            k_wanted = Greater (top_k, no_tokens)
            k_fits = LessOrEqual (top_k, few)
            k_on = And (k_wanted, k_fits)
            k_safe = Where (k_on, top_k, few)
            k_index = Sub (k_safe, one_token)
            k_index1 = Unsqueeze (k_index, axis1)
            k_value = GatherElements <axis = 1> (values, k_index1)
            k_on1 = Unsqueeze (k_on, axis1)
            k_floor = Where (k_on1, k_value, zero)
            in_k = GreaterOrEqual (soft, k_floor)
            in_k_probs = Where (in_k, soft, zero)
            k_mass = ReduceSum <keepdims = 1> (in_k_probs, axis1)
            top_p1 = Unsqueeze (top_p, axis1)
            wanted = Mul (top_p1, k_mass)
            running = CumSum (values, last_axis)
            short = Less (running, wanted)
            short_int = Cast <to = 7> (short)
            num_short = ReduceSum <keepdims = 1> (short_int, axis1)
            p_index = Min (num_short, few_last)
            p_value = GatherElements <axis = 1> (values, p_index)
            p_wanted = Less (top_p1, one)
            p_fits = Less (num_short, few)
            p_on = And (p_wanted, p_fits)
            p_floor = Where (p_on, p_value, zero)
            floor = Max (k_floor, p_floor)
            kept = GreaterOrEqual (soft, floor)
            kept_probs = Where (kept, soft, zero)
            drawn_then = Where (kept, logits, masked)

            cumulative = CumSum (kept_probs, last_axis)
            total = Slice (cumulative, minus_ones, to_end, axis1)
            uniforms1 = Unsqueeze (uniforms, axis1)
            threshold = Mul (uniforms1, total)
            below = LessOrEqual (cumulative, threshold)
            below_int = Cast <to = 7> (below)
            drawn0 = ReduceSum <keepdims = 0> (below_int, axis1)
            last = Sub (size, one_token)
            drawn = Min (drawn0, last)
            best_then = ArgMax <axis = 1, keepdims = 0> (logits)
            ids_then = Where (hot, drawn, best_then)
        }},
        else_branch = greedy () => (ids_else, drawn_else) {{
            ids_else = ArgMax <axis = 1, keepdims = 0> (logits)
            drawn_else = Identity (logits)
        }}
    >
}}
"""


def draw_function() -> onnx.FunctionProto:
    """`dspark::Draw`: argmax where the temperature is 0, else the inverse CDF at the uniform.

    logits float [R, D], temperature float [R], top_k int64 [R], top_p float [R], uniforms float
    [R] -> ids int64 [R] and the logits [R, D] whose softmax the token was drawn from: those that
    the row's filters drop are masked. Filtering is the row's wish for the *target*; a draft that
    does the same proposes nothing that the target cannot say.
    """
    return onnx.parser.parse_function(_DRAW)


class MarkovWalk:
    """The sequential head: the bias that the previous token puts on a slot's logits.

    vanilla, gated and rnn as in DeepSpec; the rnn carries its state from slot to slot.
    """

    def __init__(
        self, linears: Linears, tensor: ReadTensor, head: str | None, anchors: str
    ) -> None:
        self._b, self._linears, self._tensor = linears.b, linears, tensor
        self._head, self._anchors = head, anchors
        table = tensor("markov_head.markov_w1.weight")
        self._type = linears.precision.table_type
        self._table = self._b.weight("markov_head.markov_w1", table, DTYPES[self._type])
        self._state: str | None = None

    def embed(self, previous: str) -> str:
        """`E[prev]` `[R, r]`."""
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
            self._state = b.op("Mul", feature, b.number(0.0))
        joint = self._joint("joint_proj", [self._state, feature, state])
        gate, candidate, out = b.ops("Split", joint, outputs=3, axis=1, num_outputs=3)
        gate = b.op("Sigmoid", gate)
        kept = b.op("Mul", gate, self._state)
        one = b.number(1.0)
        taken = b.op("Mul", b.op("Sub", one, gate), b.op("Tanh", candidate))
        self._state = b.op("Add", kept, taken)
        return out

    def _joint(self, name: str, parts: Sequence[str]) -> str:
        b = self._b
        product = self._project(name, b.op("Concat", *parts, axis=1))
        bias = self._tensor(f"markov_head.{name}.bias")
        dtype = DTYPES[b.data_type]
        return b.op("Add", product, b.weight(f"markov_head.{name}.bias", bias, dtype))

    def _project(self, name: str, x: str) -> str:
        matrix = self._tensor(f"markov_head.{name}.weight").T
        activation = self._linears.activation(x, self._anchors)
        return self._linears.linear(f"markov_head.{name}", activation, matrix)
