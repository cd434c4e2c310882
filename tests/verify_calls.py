"""Calls of the verification op, its specification's answer, and what rounding may change of it.

Every body of the op is compared with `specification.verify` on these, decision by decision.
Greedy decisions must be equal. A sampled decision may differ only where its uniform lies on a
boundary of float32: `on_boundary` recomputes the row in float64 and proves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from dspark_batch.decode.algorithm import sampling
from dspark_batch.models.graph.builder import IR_VERSION, OPSET
from dspark_batch.models.plugin import contract, onnx_body, specification

BOUNDARY = 1e-4  # distance of a uniform from an acceptance or CDF boundary
MASS_ROUNDING = 2e-6  # what float32 does to a residual; more of it, the less mass is left
FILTER_BOUNDARY = 1e-5  # distance of a sorted mass from top_p
Result = tuple[NDArray[np.int64], NDArray[np.int64]]
Body = Callable[["Call"], Result]


@dataclass(frozen=True)
class Call:
    """The operands of one call, by the contract's names."""

    logits: NDArray[np.float32]
    logit_rows: NDArray[np.int64]
    draft_tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    certain: NDArray[np.int64]
    draft_logits: NDArray[np.float32]
    draft_vocab: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    uniforms: NDArray[np.float32]

    @property
    def feeds(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in contract.INPUT_NAMES}

    def specified(self) -> Result:
        found = specification.verify(**self.feeds)
        return found.num_accepted, found.bonus


def one_node_model(*, vocab: int | str = "V", draft_vocab: int | str = "D") -> onnx.ModelProto:
    """A graph of nothing but the op, with its function body and plugin attributes."""
    sizes: dict[str, int | str] = {"V": vocab, "D": draft_vocab}
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                operand.name,
                helper.np_dtype_to_tensor_dtype(np.dtype(operand.dtype)),
                [sizes.get(size, size) for size in operand.shape],
            )
            for operand in operands
        ]
        for operands in (contract.INPUTS, contract.OUTPUTS)
    )
    node = helper.make_node(
        contract.OP_TYPE,
        contract.INPUT_NAMES,
        contract.OUTPUT_NAMES,
        domain=contract.DOMAIN,
        **contract.ATTRIBUTES,
    )
    return helper.make_model(
        helper.make_graph([node], "verify", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(contract.DOMAIN, 1)],
        functions=[onnx_body.verify_function()],
        ir_version=IR_VERSION,
    )


def make_call(
    *,
    seed: int,
    rows: int = 400,
    vocab: int = 37,
    gamma: int = 4,
    drafts: int | None = None,
    draft_vocab: int | None = None,
    certain: Any = 0,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    spread: float = 2.0,
    noise: float = 0.7,
) -> Call:
    """Rows whose drafts come from a distorted target, so that all outcomes are common.

    Sequence-valued settings are drawn from per row.
    """
    rng = np.random.default_rng(seed)
    num_drafts = gamma if drafts is None else drafts
    cells = rows * (num_drafts + 1)
    logits = (rng.standard_normal((cells + 9, vocab)) * spread).astype(np.float32)
    logit_rows = rng.permutation(len(logits))[:cells].reshape(rows, num_drafts + 1)
    kept = np.sort(rng.permutation(vocab)[: draft_vocab or vocab])
    distortion = rng.standard_normal((rows, gamma, len(kept))) * noise
    draft_logits = distortion.astype(np.float32)
    draft_logits[:, :num_drafts] += logits[logit_rows[:, :-1]][..., kept]

    def per_row(value: Any, dtype: type) -> NDArray[Any]:
        return rng.choice(np.atleast_1d(value), rows).astype(dtype)

    warmth = per_row(temperature, np.float32)
    proposed = draft_logits[:, :num_drafts]
    drawn = proposed.argmax(-1)
    for r in np.flatnonzero(warmth):
        probs = sampling.softmax(proposed[r], np.full(num_drafts, warmth[r]))
        drawn[r] = sampling.sample(probs, rng.random(num_drafts))
    lengths = rng.integers(0, num_drafts + 1, rows)
    tokens = kept[drawn]
    sure = per_row(certain, np.int64)
    # A lookup knows nothing of the draft's vocabulary, nor of what its logits last were.
    likely = logits[logit_rows[:, :-1]].argsort(-1)[..., -4:]
    picked = np.take_along_axis(likely, rng.integers(0, 4, (rows, num_drafts, 1)), 2)[..., 0]
    tokens = np.where(sure[:, None] > 0, picked, tokens)
    draft_logits[sure > 0] = rng.choice([np.nan, np.inf, 0.0], (int((sure > 0).sum()), 1, 1))
    padding = np.arange(num_drafts) >= lengths[:, None]
    tokens[padding] = rng.integers(0, vocab, int(padding.sum()))
    beyond = np.arange(num_drafts + 1) > lengths[:, None]
    logit_rows[beyond] = rng.integers(0, len(logits), int(beyond.sum()))
    return Call(
        logits,
        logit_rows,
        tokens,
        lengths,
        sure,
        draft_logits,
        kept,
        warmth,
        per_row(top_k, np.int64),
        per_row(top_p, np.float32),
        rng.random((rows, gamma + 1), dtype=np.float32),
    )


def dirty_padding(call: Call, garbage: int) -> Call:
    """The same call with `garbage` for padded tokens and NaN for what padded cells point to."""
    beyond = np.arange(call.logit_rows.shape[1]) > call.lengths[:, None]
    padded = beyond[:, 1:]
    bad_row = np.full((1, call.logits.shape[1]), np.nan, np.float32)
    draft_logits = call.draft_logits.copy()
    draft_logits[:, : padded.shape[1]][padded] = np.nan
    return replace(
        call,
        logits=np.vstack([bad_row, call.logits]),
        logit_rows=np.where(beyond, 0, call.logit_rows + 1),
        draft_tokens=np.where(padded, garbage, call.draft_tokens),
        draft_logits=draft_logits,
    )


def broken_logits(call: Call, value: float) -> tuple[Call, NDArray[np.bool_]]:
    """The same call with `value` in the last cell of every seventh row, and whom that hits."""
    needed = np.arange(call.logit_rows.shape[1]) <= call.lengths[:, None]
    victims = np.arange(0, len(call.lengths), 7)
    cells = call.logit_rows[victims, call.lengths[victims]]
    logits = call.logits.copy()
    logits[cells, 5] = value
    hit = (np.isin(call.logit_rows, cells) & needed).any(axis=1)
    return replace(call, logits=logits), hit


def exact_softmax(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return np.asarray(weights / weights.sum())


def tied(probs: NDArray[np.float64], floor: float) -> bool:
    """Whether a token other than those at `floor` is within float32 rounding of it."""
    distance = np.abs(probs / floor - 1)
    return bool(((distance > 1e-12) & (distance < 1e-6)).any())


def exact_target(call: Call, r: int, cell: int) -> tuple[NDArray[np.float64], bool]:
    """Filtered target distribution of a cell, and whether its cut is on a boundary of float32:
    the mass at `top_p`, or two tokens that are all but equally probable on its two sides."""
    probs = exact_softmax(call.logits[call.logit_rows[r, cell]], float(call.temperature[r]))
    near = False
    if 0 < call.top_k[r] < len(probs):
        floor = np.sort(probs)[::-1][call.top_k[r] - 1]
        near = tied(probs, floor)
        probs = np.where(probs >= floor * (1 - 1e-12), probs, 0.0)
        probs /= probs.sum()
    if call.top_p[r] < 1:
        ranked = np.sort(probs)[::-1]
        mass = np.cumsum(ranked)
        top_p = float(call.top_p[r])
        floor = ranked[min(int((mass < top_p).sum()), len(probs) - 1)]
        near |= bool(np.abs(mass - top_p).min() < FILTER_BOUNDARY) or tied(probs, floor)
        probs = np.where(probs >= floor * (1 - 1e-12), probs, 0.0)
        probs /= probs.sum()
    return probs, near


def on_boundary(call: Call, r: int, one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the two decisions of row `r` differ by rounding only, computed in float64."""
    if call.temperature[r] == 0:
        return False
    cell = min(one[0], other[0])
    target, near = exact_target(call, r, cell)
    if near:
        return True
    draft = np.zeros_like(target)
    if cell < call.lengths[r]:
        temperature = float(call.temperature[r])
        if call.certain[r]:
            draft[call.draft_tokens[r, cell]] = 1.0
        else:
            draft[call.draft_vocab] = exact_softmax(call.draft_logits[r, cell], temperature)
    if one[0] != other[0]:
        token = int(call.draft_tokens[r, cell])
        assert draft[token]
        return bool(abs(call.uniforms[r, cell] - target[token] / draft[token]) < BOUNDARY)
    residual = np.maximum(target - draft, 0)
    mass = residual.sum()
    if mass < MASS_ROUNDING:
        return True
    between = np.cumsum(residual)[min(one[1], other[1]) : max(one[1], other[1])] / mass
    tolerance = BOUNDARY + MASS_ROUNDING / mass
    return bool((np.abs(between - call.uniforms[r, -1]) < tolerance).all())


def assert_same(call: Call, body: Body) -> Counter[str]:
    """Compare a body with the specification; returns how often each outcome occurred."""
    found = [tuple(map(int, pair)) for pair in zip(*body(call), strict=True)]
    wanted = [tuple(map(int, pair)) for pair in zip(*call.specified(), strict=True)]
    excused = 0
    outcomes: Counter[str] = Counter()
    for r, (a, b) in enumerate(zip(found, wanted, strict=True)):
        length = int(call.lengths[r])
        outcomes["whole" if b[0] == length else "rejected"] += 1
        if a != b:
            assert on_boundary(call, r, (a[0], a[1]), (b[0], b[1])), (r, a, b)
            excused += 1
    assert excused <= max(2, len(found) // 200)
    return outcomes


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-short": {"drafts": 2},
    "greedy-filters-ignored": {"top_k": [0, 1, 5], "top_p": [0.2, 1.0]},
    "sampled": {"temperature": 1.0},
    "sampled-short": {"temperature": 0.8, "drafts": 2},
    "sampled-one-draft": {"temperature": 0.8, "gamma": 1},
    "mixed": {"temperature": [0.0, 0.7, 1.3]},
    "top-k": {"temperature": 0.9, "top_k": [0, 1, 2, 5, 36, 37, 1000]},
    "top-p": {"temperature": 0.9, "top_p": [0.05, 0.3, 0.9, 0.999, 1.0]},
    "both": {"temperature": [0.0, 0.9], "top_k": [0, 1, 4, 30], "top_p": [0.1, 0.6, 0.95, 1.0]},
    "tiny-temperature": {
        "temperature": [1e-40, 1e-20, 1e-6, 1e-3, 0.01, 0.05],
        "spread": 20.0,
        "noise": 0.1,
    },
    "large-temperature": {"temperature": [5.0, 100.0, 1e4], "top_p": [0.5, 1.0]},
    "reduced": {"temperature": [0.0, 1.0], "draft_vocab": 11},
    "reduced-filters": {
        "temperature": 1.0,
        "draft_vocab": 11,
        "top_k": [0, 6],
        "top_p": [0.8, 1.0],
    },
    "certain": {"temperature": [0.0, 1.0], "certain": [0, 1]},
    "certain-reduced-filters": {
        "temperature": [0.3, 1.0],
        "certain": [0, 1, 1],
        "draft_vocab": 11,
        "top_k": [0, 2, 6],
        "top_p": [0.8, 1.0],
    },
    "no-columns": {"temperature": [0.0, 1.0], "drafts": 0, "top_p": [0.8, 1.0]},
    "no-columns-greedy": {"drafts": 0},
    "close-draft": {"temperature": 1.0, "noise": 0.1},
    "hopeless-draft": {"temperature": 1.0, "noise": 9.0},
    "few-candidates": {
        "rows": 60,
        "vocab": 700,
        "temperature": 0.5,
        "spread": 4.0,
        "top_k": [0, 3, 256],
        "top_p": [0.5, 0.9],
    },
    "beyond-the-candidates": {
        "rows": 60,
        "vocab": 700,
        "temperature": [0.0, 1.0, 3.0],
        "top_k": [0, 255, 256, 257, 600],
        "top_p": [0.3, 0.98, 1.0],
    },
}
