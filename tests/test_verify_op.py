"""The ONNX body of the verification op against its specification in NumPy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from onnx import helper
from scipy import stats
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target
from verify_calls import (
    SETTINGS,
    Body,
    Call,
    Result,
    assert_same,
    broken_logits,
    dirty_padding,
    make_call,
    one_node_model,
)

from dspark_batch.decode.algorithm import sampling
from dspark_batch.models.graph.builder import OPSET
from dspark_batch.models.plugin import contract


@pytest.fixture(scope="module")
def body() -> Body:
    session = ort.InferenceSession(
        one_node_model().SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(call: Call) -> Result:
        accepted, bonus = session.run(None, call.feeds)
        return accepted, bonus

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_onnx_body_decides_as_the_specification(name: str, body: Body) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(3):
        outcomes += assert_same(make_call(seed=seed, **SETTINGS[name]), body)
    assert len(outcomes) == (1 if SETTINGS[name].get("drafts") == 0 else 2)


def test_a_round_without_drafts_is_plain_decoding(body: Body) -> None:
    for temperature in (0.0, [0.0, 1.0]):
        call = make_call(seed=3, drafts=1, temperature=temperature, top_k=[0, 4], top_p=[0.7, 1.0])
        call = replace(call, lengths=np.zeros_like(call.lengths))
        assert_same(call, body)
        assert not body(call)[0].any()


def test_padding_may_hold_anything(body: Body) -> None:
    call = make_call(seed=4, temperature=[0.0, 1.0], top_p=[0.8, 1.0])
    clean = body(call)
    for garbage in (-1, 10**9):
        for a, b in zip(body(dirty_padding(call, garbage)), clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_first_token_and_filters_keep_all_of_them(
    body: Body,
) -> None:
    call = make_call(seed=5, temperature=[0.0, 1.0], top_k=[0, 1, 2, 5], vocab=24)
    tied = np.round(call.logits)  # about a dozen values over 24 tokens
    assert_same(replace(call, logits=tied), body)
    flat = replace(call, logits=np.zeros_like(call.logits))
    assert_same(flat, body)
    greedy = (call.temperature == 0) & (call.lengths == 0)
    assert greedy.any()
    assert not body(flat)[1][greedy].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_marks_its_row_and_no_other(
    value: float, temperature: float, body: Body
) -> None:
    call = make_call(seed=6, temperature=temperature, top_p=[0.9, 1.0])
    clean = body(call)
    broken, hit = broken_logits(call, value)
    accepted, bonus = body(broken)
    assert (bonus[hit] == -1).all()
    assert not accepted[hit].any()
    np.testing.assert_array_equal(accepted[~hit], clean[0][~hit])
    np.testing.assert_array_equal(bonus[~hit], clean[1][~hit])
    wanted = broken.specified()
    np.testing.assert_array_equal(wanted[1] == -1, hit)


def test_a_row_does_not_depend_on_its_company(body: Body) -> None:
    call = make_call(seed=7, rows=40, temperature=[0.0, 0.9], top_k=[0, 3], top_p=[0.8, 1.0])
    together = body(call)
    for r in range(40):
        one = slice(r, r + 1)
        own = {name: getattr(call, name)[one] for name in contract.INPUT_NAMES}
        own |= {"logits": call.logits, "draft_vocab": call.draft_vocab}
        alone = body(Call(**own))
        assert (alone[0][0], alone[1][0]) == (together[0][r], together[1][r])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_emitted_tokens_have_the_target_s_law(
    reduced: bool, top_k: int, top_p: float, body: Body
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
        np.zeros(rows, np.int64),
        draft_logits,
        kept,
        temperature,
        np.full(rows, top_k),
        np.full(rows, top_p, np.float32),
        rng.random((rows, gamma + 1), dtype=np.float32),
    )
    accepted, bonus = body(call)
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


def test_the_reference_evaluator_agrees(body: Body) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(one_node_model())
    for settings in ({}, {"temperature": [0.0, 1.0], "top_k": [0, 4], "top_p": [0.7, 1.0]}):
        call = make_call(seed=9, rows=12, **settings)  # type: ignore[arg-type]
        for a, b in zip(evaluator.run(None, call.feeds), body(call), strict=True):
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
            ("dspark", "Draw" if name == "draft.onnx" else contract.OP_TYPE)
        }
        for function in model.functions:
            assert {node.domain for node in function.node} == {""}
    model = onnx.load(folder / "target.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == contract.OP_TYPE]
    assert len(nodes) == 1
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes == {"plugin_namespace": b"dspark", "plugin_version": b"1"}
    assert len(nodes[0].input) == len(contract.INPUT_NAMES)
    vocab = next(i for i in model.graph.initializer if i.name == "draft_vocab")
    assert list(vocab.dims) == [VOCAB]
