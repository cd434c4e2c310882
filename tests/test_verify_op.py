"""The ONNX body of the verification op against its specification in NumPy, decision by decision.

Greedy decisions must be equal. A sampled decision may differ only where its uniform lies on a
boundary of float32: `on_boundary` recomputes the row in float64 and proves it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from scipy import stats
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.algorithm import acceptance, sampling
from dspark_batch.models.graph import IR_VERSION, OPSET
from dspark_batch.plugin import onnx_body

BOUNDARY = 1e-4  # distance of a uniform from an acceptance or CDF boundary
MASS_ROUNDING = 2e-6  # what float32 does to a residual; more of it, the less mass is left
FILTER_BOUNDARY = 1e-5  # distance of a sorted mass from top_p
Result = tuple[NDArray[np.int64], NDArray[np.int64]]


def one_node_model() -> onnx.ModelProto:
    integer = {"logit_rows", "draft_tokens", "lengths", "draft_vocab", "top_k"}
    shapes: dict[str, list[str]] = {
        "logits": ["N", "V"],
        "logit_rows": ["R", "K1"],
        "draft_tokens": ["R", "K"],
        "draft_logits": ["R", "G", "D"],
        "draft_vocab": ["D"],
        "uniforms": ["R", "G1"],
    }
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT64 if name in integer else TensorProto.FLOAT,
            shapes.get(name, ["R"]),
        )
        for name in onnx_body.INPUTS
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["R"]) for name in onnx_body.OUTPUTS
    ]
    node = helper.make_node(
        onnx_body.OP_TYPE,
        onnx_body.INPUTS,
        onnx_body.OUTPUTS,
        domain=onnx_body.DOMAIN,
        plugin_namespace=onnx_body.DOMAIN,
        plugin_version=onnx_body.PLUGIN_VERSION,
    )
    return helper.make_model(
        helper.make_graph([node], "verify", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(onnx_body.DOMAIN, 1)],
        functions=[onnx_body.verify_function()],
        ir_version=IR_VERSION,
    )


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(
        one_node_model().SerializeToString(), providers=["CPUExecutionProvider"]
    )


@dataclass(frozen=True)
class Call:
    """The operands of one call, by the contract's names."""

    logits: NDArray[np.float32]
    logit_rows: NDArray[np.int64]
    draft_tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    draft_logits: NDArray[np.float32]
    draft_vocab: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    uniforms: NDArray[np.float32]

    @property
    def feeds(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in onnx_body.INPUTS}

    def run(self, session: ort.InferenceSession) -> Result:
        accepted, bonus = session.run(None, self.feeds)
        return accepted, bonus

    def specified(self) -> Result:
        num_drafts = self.draft_tokens.shape[1]
        found = acceptance.verify(
            self.logits,
            self.logit_rows,
            self.draft_tokens,
            self.lengths,
            self.draft_logits[:, :num_drafts],
            self.draft_vocab,
            self.temperature,
            self.top_k,
            self.top_p,
            np.concatenate([self.uniforms[:, :num_drafts], self.uniforms[:, -1:]], axis=1),
        )
        return found.num_accepted, found.bonus


def make_call(
    *,
    seed: int,
    rows: int = 400,
    vocab: int = 37,
    gamma: int = 4,
    drafts: int | None = None,
    draft_vocab: int | None = None,
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
    padding = np.arange(num_drafts) >= lengths[:, None]
    tokens[padding] = rng.integers(0, vocab, int(padding.sum()))
    beyond = np.arange(num_drafts + 1) > lengths[:, None]
    logit_rows[beyond] = rng.integers(0, len(logits), int(beyond.sum()))
    return Call(
        logits,
        logit_rows,
        tokens,
        lengths,
        draft_logits,
        kept,
        warmth,
        per_row(top_k, np.int64),
        per_row(top_p, np.float32),
        rng.random((rows, gamma + 1), dtype=np.float32),
    )


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
    ids = {int(token): i for i, token in enumerate(call.draft_vocab)}
    cell = min(one[0], other[0])
    target, near = exact_target(call, r, cell)
    if near:
        return True
    draft = np.zeros_like(target)
    if cell < call.lengths[r]:
        temperature = float(call.temperature[r])
        draft[call.draft_vocab] = exact_softmax(call.draft_logits[r, cell], temperature)
    if one[0] != other[0]:
        token = int(call.draft_tokens[r, cell])
        assert token in ids
        return bool(abs(call.uniforms[r, cell] - target[token] / draft[token]) < BOUNDARY)
    residual = np.maximum(target - draft, 0)
    mass = residual.sum()
    if mass < MASS_ROUNDING:
        return True
    between = np.cumsum(residual)[min(one[1], other[1]) : max(one[1], other[1])] / mass
    tolerance = BOUNDARY + MASS_ROUNDING / mass
    return bool((np.abs(between - call.uniforms[r, -1]) < tolerance).all())


def assert_same(call: Call, session: ort.InferenceSession) -> Counter[str]:
    """Compare both bodies; returns how often each outcome occurred."""
    found = [tuple(map(int, pair)) for pair in zip(*call.run(session), strict=True)]
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


@pytest.mark.parametrize("name", SETTINGS)
def test_onnx_body_decides_as_the_specification(name: str, session: ort.InferenceSession) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(3):
        outcomes += assert_same(make_call(seed=seed, **SETTINGS[name]), session)
    assert len(outcomes) == (1 if SETTINGS[name].get("drafts") == 0 else 2)


def test_a_round_without_drafts_is_plain_decoding(session: ort.InferenceSession) -> None:
    for temperature in (0.0, [0.0, 1.0]):
        call = make_call(seed=3, drafts=1, temperature=temperature, top_k=[0, 4], top_p=[0.7, 1.0])
        call = replace(call, lengths=np.zeros_like(call.lengths))
        assert_same(call, session)
        assert not call.run(session)[0].any()


def test_padding_may_hold_anything(session: ort.InferenceSession) -> None:
    call = make_call(seed=4, temperature=[0.0, 1.0], top_p=[0.8, 1.0])
    clean = call.run(session)
    beyond = np.arange(call.logit_rows.shape[1]) > call.lengths[:, None]
    broken = np.vstack([call.logits, np.full((1, call.logits.shape[1]), np.nan, np.float32)])
    rows = np.where(beyond, len(call.logits), call.logit_rows)
    draft_logits = np.where(beyond[:, 1:, None], np.float32(np.nan), call.draft_logits)
    for garbage in (-1, 10**9):
        tokens = np.where(beyond[:, 1:], garbage, call.draft_tokens)
        dirty = replace(
            call,
            logits=broken,
            logit_rows=rows,
            draft_tokens=tokens,
            draft_logits=draft_logits.astype(np.float32),
        )
        for a, b in zip(dirty.run(session), clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_first_token_and_filters_keep_all_of_them(
    session: ort.InferenceSession,
) -> None:
    call = make_call(seed=5, temperature=[0.0, 1.0], top_k=[0, 1, 2, 5], vocab=24)
    tied = np.round(call.logits)  # about a dozen values over 24 tokens
    assert_same(replace(call, logits=tied), session)
    flat = replace(call, logits=np.zeros_like(call.logits))
    assert_same(flat, session)
    greedy = (call.temperature == 0) & (call.lengths == 0)
    assert greedy.any()
    assert not flat.run(session)[1][greedy].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_marks_its_row_and_no_other(
    value: float, temperature: float, session: ort.InferenceSession
) -> None:
    call = make_call(seed=6, temperature=temperature, top_p=[0.9, 1.0])
    clean = call.run(session)
    needed = np.arange(call.logit_rows.shape[1]) <= call.lengths[:, None]
    victims = np.arange(0, len(call.lengths), 7)
    logits = call.logits.copy()
    logits[call.logit_rows[victims, call.lengths[victims]], 5] = value
    hit = (np.isin(call.logit_rows, call.logit_rows[victims, call.lengths[victims]]) & needed).any(
        axis=1
    )
    broken = replace(call, logits=logits)
    accepted, bonus = broken.run(session)
    assert (bonus[hit] == -1).all()
    assert not accepted[hit].any()
    np.testing.assert_array_equal(accepted[~hit], clean[0][~hit])
    np.testing.assert_array_equal(bonus[~hit], clean[1][~hit])
    wanted = broken.specified()
    np.testing.assert_array_equal(wanted[1] == -1, hit)


def test_a_row_does_not_depend_on_its_company(session: ort.InferenceSession) -> None:
    call = make_call(seed=7, rows=40, temperature=[0.0, 0.9], top_k=[0, 3], top_p=[0.8, 1.0])
    together = call.run(session)
    for r in range(40):
        one = slice(r, r + 1)
        own = {name: getattr(call, name)[one] for name in onnx_body.INPUTS}
        own |= {"logits": call.logits, "draft_vocab": call.draft_vocab}
        alone = Call(**own).run(session)
        assert (alone[0][0], alone[1][0]) == (together[0][r], together[1][r])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_emitted_tokens_have_the_target_s_law(
    reduced: bool, top_k: int, top_p: float, session: ort.InferenceSession
) -> None:
    """The first two tokens jointly; logits of the second depend on the first."""
    rows, vocab, gamma = 40_000, 6, 2
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal((1 + vocab, vocab)) * 1.5).astype(np.float32)
    kept = np.array([0, 2, 3, 5]) if reduced else np.arange(vocab)
    draft_rows = (logits[:, kept] + rng.standard_normal((1 + vocab, len(kept)))).astype(np.float32)
    temperature = np.full(rows, 0.8, np.float32)
    draft_logits = np.zeros((rows, gamma, len(kept)), np.float32)
    tokens = np.zeros((rows, gamma), np.int64)
    state = np.zeros(rows, np.int64)
    for j in range(gamma):
        draft_logits[:, j] = draft_rows[state]
        probs = sampling.softmax(draft_logits[:, j], temperature)
        tokens[:, j] = kept[sampling.sample(probs, rng.random(rows))]
        state = 1 + tokens[:, j]
    call = Call(
        logits,
        np.concatenate([np.zeros((rows, 1), np.int64), 1 + tokens], axis=1),
        tokens,
        np.full(rows, gamma),
        draft_logits,
        kept,
        temperature,
        np.full(rows, top_k),
        np.full(rows, top_p, np.float32),
        rng.random((rows, gamma + 1), dtype=np.float32),
    )
    accepted, bonus = call.run(session)
    every = np.full(1 + vocab, np.float32(0.8))
    law = sampling.filtered_probs(
        logits, every, np.full(1 + vocab, top_k), np.full(1 + vocab, top_p)
    )
    first = np.where(accepted > 0, tokens[:, 0], bonus)
    second = np.where(accepted > 1, tokens[:, 1], bonus)
    rest = sampling.sample(law[1 + first], rng.random(rows))  # where the round gave one token
    second = np.where(accepted > 0, second, rest)
    wanted = (law[0][:, None] * law[1:]).astype(np.float64).ravel()
    counts = np.bincount(first * vocab + second, minlength=vocab * vocab)
    possible = wanted > 0
    assert not counts[~possible].any()
    assert 0.2 < accepted.mean() < 1.9
    expected = wanted[possible] / wanted.sum() * rows
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_reference_evaluator_agrees(session: ort.InferenceSession) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(one_node_model())
    for settings in ({}, {"temperature": [0.0, 1.0], "top_k": [0, 4], "top_p": [0.7, 1.0]}):
        call = make_call(seed=9, rows=12, **settings)  # type: ignore[arg-type]
        for a, b in zip(evaluator.run(None, call.feeds), call.run(session), strict=True):
            np.testing.assert_array_equal(a, b)


def test_graphs_pass_the_checker_and_use_standard_ops_only(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("qwen3"))
    draft = write_draft(tmp_path / "draft", draft_config())
    folder = export_pair(tmp_path, target, draft)
    for name in ("target.onnx", "draft.onnx"):
        onnx.checker.check_model(str(folder / name), full_check=True)
        model = onnx.load(folder / name, load_external_data=False)
        assert {(o.domain, o.version) for o in model.opset_import} == {("", OPSET), ("dspark", 1)}
        assert {node.domain for node in model.graph.node} == {"", "dspark"}
        assert {(f.domain, f.name) for f in model.functions} == {
            ("dspark", "Draw" if name == "draft.onnx" else onnx_body.OP_TYPE)
        }
        for function in model.functions:
            assert {node.domain for node in function.node} == {""}
    model = onnx.load(folder / "target.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == onnx_body.OP_TYPE]
    assert len(nodes) == 1
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes == {"plugin_namespace": b"dspark", "plugin_version": b"1"}
    assert len(nodes[0].input) == len(onnx_body.INPUTS)
    vocab = next(i for i in model.graph.initializer if i.name == "draft_vocab")
    assert list(vocab.dims) == [VOCAB]
