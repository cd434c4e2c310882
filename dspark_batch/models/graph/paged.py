"""Blocks for ONNX Runtime's CUDA provider: attention over pages, norms that add, no arithmetic of
shapes.

A step can be captured as a CUDA graph only if every node has a CUDA kernel and none asks for a
shape. So rows are told by lengths: `PagedAttention` rotates queries and keys, writes keys and
values into pages of `PAGE` tokens at each row's position, and attends to what the lengths cover. It
has no CPU kernel: `with_twins` writes the same formulas as standard ops, to check a graph and to
run it where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser

from dspark_batch.models.graph.blocks import Matrix
from dspark_batch.models.graph.builder import DTYPES, INT32, GraphBuilder

PAGE = 256  # tokens; the kernels want a multiple of it
MOST_HEAD_SIZE = 256  # that they take
_CONTRIB = "com.microsoft"
_TWIN_DOMAIN = "dspark.twin"


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Graph inputs that say which tokens are whose, and where a row's pages are. All int32."""

    cumulative: str
    """[R + 1] tokens of all rows before each row, and of all."""
    past: str
    """[R] tokens that a row's pages hold already."""
    pages: str
    """[R, W] a row's pages; what lies beyond its length may be any."""
    bounds: str
    """[2] in host memory: the most new tokens of a row, and the most tokens of a row in all."""

    @classmethod
    def declared(cls, b: GraphBuilder, prefix: str = "", *, pages: str | None = None) -> PagedRows:
        """Declare them as inputs, named with a prefix; `pages` is an input already there."""
        return cls(
            b.input(f"{prefix}cumulative", INT32, [f"{prefix}R1"]),
            b.input(f"{prefix}past", INT32, ["R"]),
            pages or b.input("pages", INT32, ["R", "W"]),
            b.input(f"{prefix}bounds", INT32, [2]),
        )


@dataclass(frozen=True, slots=True)
class PagedHeads:
    """What a layer's attention is, beside its tensors."""

    num_heads: int
    num_kv_heads: int
    scale: float
    causal: bool = True
    """False: the new tokens of a row see each other."""
    window: int | None = None
    """Newest keys that a query sees, its own counted."""
    epsilon: float = 1e-6
    """Of the norms of queries and keys."""


def paged_attention(
    b: GraphBuilder,
    projected: tuple[str, str, str],
    caches: tuple[str, str],
    rows: PagedRows,
    rope: tuple[str, str],
    heads: PagedHeads,
    *,
    norms: tuple[str, str] | None = None,
) -> tuple[str, str, str]:
    """Mixed values `[T, heads * d]`, and both caches with the new keys and values.

    `projected`: query, key, value `[T, n * d]`, neither normed nor rotated; ("qkv", "", "") where
    they are side by side. `caches` `[P, PAGE, kv, d]` are updated in place: bind past and present
    to one buffer. `norms`: the weights of RMSNorm over each query and key head.
    """
    mixed, keys, values = b.ops(
        "PagedAttention",
        *projected,
        *caches,
        *(rows.cumulative, rows.past, rows.pages, *rope, "", ""),
        *(norms or ("", "")),
        *("", "", rows.bounds),
        outputs=3,
        domain=_CONTRIB,
        num_heads=heads.num_heads,
        kv_num_heads=heads.num_kv_heads,
        scale=heads.scale,
        do_rotary=1,
        rotary_interleaved=0,
        is_causal=int(heads.causal),
        local_window_size=-1 if heads.window is None else heads.window,
        qk_norm_epsilon=heads.epsilon,
    )
    return mixed, keys, values


def half_weight(b: GraphBuilder, name: str, values: Matrix) -> str:
    """A vector of weights in the type of the graph."""
    return b.weight(name, values.astype(np.float32), DTYPES[b.data_type])


def half_norm(b: GraphBuilder, x: str, name: str, weight: Matrix, epsilon: float) -> str:
    """RMSNorm over the last axis; the kernel sums in fp32."""
    return b.op("RMSNormalization", x, half_weight(b, name, weight), axis=-1, epsilon=epsilon)


def added_norm(
    b: GraphBuilder, x: str, y: str, name: str, weight: Matrix, epsilon: float
) -> tuple[str, str]:
    """RMSNorm of x + y, and x + y, by one kernel."""
    found = b.ops(
        "SkipSimplifiedLayerNormalization",
        *(x, y, half_weight(b, name, weight)),
        outputs=4,
        unused=(1, 2),  # mean and variance, which are for training
        domain=_CONTRIB,
        epsilon=epsilon,
    )
    return found[0], found[3]


def gated(b: GraphBuilder, gate: str, up: str, kind: str) -> str:
    """activation(gate) * up; `silu` is one kernel as QuickGelu of slope 1."""
    if kind == "silu":
        return b.op("Mul", b.op("QuickGelu", gate, domain=_CONTRIB, alpha=1.0), up)
    return b.op("Mul", b.op("Gelu", gate, approximate="tanh"), up)


def largest(b: GraphBuilder, logits: str) -> tuple[str, str]:
    """The largest of `[n, V]` and its index, `[n, 1]` each. (ArgMax has no CUDA kernel.)"""
    value, index = b.ops("TopK", logits, b.constant([1]), outputs=2, axis=1, largest=1, sorted=1)
    return value, index


# the twin ---------------------------------------------------------------------------------------

_TWIN = """
<domain: "{domain}", opset_import: ["" : 24]>
{name} ({inputs}) => (output, keys, values)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    minus_ones = Constant <value_ints = [-1]> ()
    to_end = Constant <value_ints = [9223372036854775807]> ()
    page = Constant <value_int = {page}> ()
    masked = Constant <value_float = -1.0e30> ()
    fzero = Constant <value_float = 0.0> ()
    cumulative64 = Cast <to = 7> (cumulative)
    past64 = Cast <to = 7> (past)
    pages64 = Cast <to = 7> (pages)
    begins = Slice (cumulative64, first, minus_ones, axis0)
    ends = Slice (cumulative64, second, to_end, axis0)
    counts = Sub (ends, begins)
    most = ReduceMax <keepdims = 0> (counts)
    offsets0 = Range (zero, most, one)
    offsets = Unsqueeze (offsets0, axis0)
    counts1 = Unsqueeze (counts, axis1)
    begins1 = Unsqueeze (begins, axis1)
    past1 = Unsqueeze (past64, axis1)
    inside = Less (offsets, counts1)
    cells0 = Add (begins1, offsets)
    num_tokens = Shape <start = 0, end = 1> (query)
    last_token = Sub (num_tokens, second)
    cells = Min (cells0, last_token)
    positions = Add (past1, offsets)

    {split}
    q_cells = Gather (q_flat, cells)
    k_cells = Gather (k_flat, cells)
    v_cells = Gather (v_flat, cells)
    q_shape = Constant <value_ints = [0, 0, {heads}, -1]> ()
    kv_shape = Constant <value_ints = [0, 0, {kv}, -1]> ()
    q_half = Reshape (q_cells, q_shape)
    k_half = Reshape (k_cells, kv_shape)
    v_new = Reshape (v_cells, kv_shape)
    q_wide = Cast <to = 1> (q_half)
    k_wide = Cast <to = 1> (k_half)
    {norms}
    q_rows = Transpose <perm = [0, 2, 1, 3]> (q_normed)
    k_rows = Transpose <perm = [0, 2, 1, 3]> (k_normed)
    cos_wide = Cast <to = 1> (cos)
    sin_wide = Cast <to = 1> (sin)
    num_positions = Shape <start = 0, end = 1> (cos)
    last_position = Sub (num_positions, second)
    safe_positions = Min (positions, last_position)
    q_turned = RotaryEmbedding <interleaved = 0> (q_rows, cos_wide, sin_wide, safe_positions)
    k_turned = RotaryEmbedding <interleaved = 0> (k_rows, cos_wide, sin_wide, safe_positions)
    k_back = Transpose <perm = [0, 2, 1, 3]> (k_turned)
    k_new = Cast <to = {dtype}> (k_back)

    page_index0 = Div (positions, page)
    width = Shape <start = 1, end = 2> (pages64)
    last_page = Sub (width, second)
    page_index = Min (page_index0, last_page)
    page_found = GatherElements <axis = 1> (pages64, page_index)
    page_number = Where (inside, page_found, zero)
    place = Mod (positions, page)
    page_column = Unsqueeze (page_number, axis2)
    place_column = Unsqueeze (place, axis2)
    target = Concat <axis = 2> (page_column, place_column)
    keys = ScatterND (past_keys, target, k_new)
    values = ScatterND (past_values, target, v_new)

    reach = Slice (bounds, second, to_end, axis0)
    reach64 = Cast <to = 7> (reach)
    wanted0 = Add (reach64, page)
    wanted1 = Sub (wanted0, second)
    wanted2 = Div (wanted1, page)
    wanted = Min (wanted2, width)
    used = Slice (pages64, first, wanted, axis1)
    k_pages = Gather (keys, used)
    v_pages = Gather (values, used)
    k_pages1 = Cast <to = 1> (k_pages)
    v_pages1 = Cast <to = 1> (v_pages)
    used_size = Mul (wanted, page)
    rows_size = Shape <start = 0, end = 1> (pages64)
    kv_dims = Constant <value_ints = [{kv}, {size}]> ()
    all_dims = Concat <axis = 0> (rows_size, used_size, kv_dims)
    k_all0 = Reshape (k_pages1, all_dims)
    v_all0 = Reshape (v_pages1, all_dims)
    k_all = Transpose <perm = [0, 2, 3, 1]> (k_all0)
    v_all1 = Transpose <perm = [0, 2, 1, 3]> (v_all0)
    group_dims = Constant <value_ints = [0, {kv}, -1, {size}]> ()
    q_grouped = Reshape (q_turned, group_dims)
    scores0 = MatMul (q_grouped, k_all)
    scale = Constant <value_float = {scale}> ()
    scores1 = Mul (scores0, scale)
    used_scalar = Squeeze (used_size)
    key_positions0 = Range (zero, used_scalar, one)
    key_axes = Constant <value_ints = [0, 1]> ()
    key_positions = Unsqueeze (key_positions0, key_axes)
    query_positions = Unsqueeze (positions, axis2)
    total = Add (past1, counts1)
    last_key1 = Sub (total, one)
    last_key = Unsqueeze (last_key1, axis2)
    {seen}
    repeated = Concat <axis = 1> ({copies})
    repeated1 = Unsqueeze (repeated, axis1)
    scores = Where (repeated1, scores1, masked)
    probs = Softmax <axis = -1> (scores)
    known0 = LessOrEqual (key_positions0, last_key1)
    inner_axes = Constant <value_ints = [1, 3]> ()
    known = Unsqueeze (known0, inner_axes)
    v_known = Where (known, v_all1, fzero)
    mixed0 = MatMul (probs, v_known)
    out_dims = Constant <value_ints = [0, {heads}, -1, {size}]> ()
    mixed1 = Reshape (mixed0, out_dims)
    mixed2 = Transpose <perm = [0, 2, 1, 3]> (mixed1)
    flat_dims = Constant <value_ints = [-1, {width}]> ()
    mixed3 = Reshape (mixed2, flat_dims)
    num_tokens_scalar = Squeeze (num_tokens)
    token0 = Range (zero, num_tokens_scalar, one)
    token = Unsqueeze (token0, axis1)
    ends_row = Unsqueeze (ends, axis0)
    beyond = GreaterOrEqual (token, ends_row)
    beyond64 = Cast <to = 7> (beyond)
    row0 = ReduceSum <keepdims = 0> (beyond64, axis1)
    last_row = Sub (rows_size, second)
    row = Min (row0, last_row)
    row_begin = Gather (begins, row)
    within = Sub (token0, row_begin)
    row_cells = Mul (row, most)
    cell = Add (row_cells, within)
    mixed = Gather (mixed3, cell)
    output = Cast <to = {dtype}> (mixed)
}}
"""

_PACKED = """
    sizes = Constant <value_ints = [{q}, {k}, {k}]> ()
    q_flat, k_flat, v_flat = Split <axis = 1> (query, sizes)
"""
_APART = """
    q_flat = Identity (query)
    k_flat = Identity (key)
    v_flat = Identity (value)
"""
_NORMED = """
    q_weight = Cast <to = 1> (query_norm)
    k_weight = Cast <to = 1> (key_norm)
    q_normed = RMSNormalization <axis = -1, epsilon = {epsilon}> (q_wide, q_weight)
    k_normed = RMSNormalization <axis = -1, epsilon = {epsilon}> (k_wide, k_weight)
"""
_PLAIN = """
    q_normed = Identity (q_wide)
    k_normed = Identity (k_wide)
"""
_CAUSAL = "seen0 = LessOrEqual (key_positions, query_positions)"
_BOTH_WAYS = """
    seen1 = LessOrEqual (key_positions, last_key)
    nothing = Mul (query_positions, zero)
    everything = Equal (nothing, zero)
    seen0 = And (seen1, everything)
"""
_WINDOW = """
    window = Constant <value_int = {window}> ()
    oldest = Sub (query_positions, window)
    recent = Greater (key_positions, oldest)
    seen = And (seen0, recent)
"""


_INPUTS = (
    *("query", "key", "value", "past_keys", "past_values", "cumulative", "past", "pages"),
    *("cos", "sin", "", "", "query_norm", "key_norm", "", "", "bounds"),
)


def with_twins(model: onnx.ModelProto) -> None:
    """Replace every PagedAttention by the same formulas in standard ops, in fp32 inside."""
    types = {v.name: v.type.tensor_type for v in model.graph.input}
    functions: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.op_type != "PagedAttention":
            continue
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        cache = _cache_type(model, types, node.input[3])
        size = cache.shape.dim[3].dim_value
        used = [(n, v) for n, v in zip(_INPUTS, node.input, strict=True) if v]
        text = _twin_text(given, [n for n, _ in used], size=size, dtype=cache.elem_type)
        name = f"PagedAttention{len(functions)}"
        known = [n for n, f in functions.items() if f.doc_string == text]
        if not known:
            function = onnx.parser.parse_function(text.replace("{name}", name))
            function.doc_string = text
            functions[name] = function
        node.op_type, node.domain = known[0] if known else name, _TWIN_DOMAIN
        del node.input[:], node.attribute[:]
        node.input.extend(v for _, v in used)
    for function in functions.values():
        function.doc_string = ""
        model.functions.append(function)
    if functions:
        model.opset_import.append(onnx.helper.make_opsetid(_TWIN_DOMAIN, 1))


def _cache_type(
    model: onnx.ModelProto, types: dict[str, onnx.TypeProto.Tensor], name: str
) -> onnx.TypeProto.Tensor:
    """The type of a cache: an input, or what another attention made of one."""
    outputs = {value.name: value.type.tensor_type for value in model.graph.output}
    found: onnx.TypeProto.Tensor = (types | outputs)[name]
    return found


def _twin_text(given: dict[str, object], inputs: list[str], *, size: int, dtype: int) -> str:
    heads, kv = int(str(given["num_heads"])), int(str(given["kv_num_heads"]))
    window, epsilon = int(str(given["local_window_size"])), float(str(given["qk_norm_epsilon"]))
    split = _APART if "key" in inputs else _PACKED.format(q=heads * size, k=kv * size)
    seen = _CAUSAL if given["is_causal"] else _BOTH_WAYS
    seen += _WINDOW.format(window=window) if window >= 0 else "\n    seen = Identity (seen0)"
    return _TWIN.format(
        domain=_TWIN_DOMAIN,
        name="{name}",
        inputs=", ".join(inputs),
        page=PAGE,
        split=split,
        norms=_NORMED.format(epsilon=f"{epsilon:.12f}") if "query_norm" in inputs else _PLAIN,
        heads=heads,
        kv=kv,
        size=size,
        width=heads * size,
        scale=f"{float(str(given['scale'])):.12f}",
        seen=seen,
        copies=", ".join(["seen"] * (heads // kv)),
        dtype=dtype,
    )
