"""A round as the runtime gets it: the engine's step, without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from host import BLOCK, InstantRuntime, instant_engine

from dspark_batch.decode.algorithm.sampling import uniforms
from dspark_batch.decode.types import (
    DraftBlock,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.network import SlotDraws, standing
from dspark_batch.engine.runtimes import Draws, Ints, PaddedShapes, Runtime, Span, Step

ROWS = 4


class Noting(InstantRuntime):
    """Keeps the last step."""

    steps: list[Step]

    def step(self, step: Step) -> VerifyResult:
        self.steps = [step]
        return super().step(step)


class Packing(Noting, Runtime):
    """A runtime that knows spans only."""

    step = Runtime.step  # type: ignore[assignment]

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        self.spans, self.lengths, self.draws = spans, lengths, draws
        return super().verify(spans, lengths, draws)


def engine_on(runtime: Runtime) -> Engine:
    return instant_engine("drafted", runtime, max_rows=ROWS, max_tokens=99)


def rows_of(*texts: Sequence[int], temperature: float = 0.0) -> list[RunningRow]:
    """In slots that count down."""
    return [
        RunningRow(
            prompt=Prompt(r, tuple(text), SamplingParams(temperature=temperature, seed=r)),
            slot=ROWS - 1 - r,
            tokens=list(text),
            num_prompt_tokens=len(text),
        )
        for r, text in enumerate(texts)
    ]


def block_for(num_rows: int, *, certain: Sequence[bool] | None = None) -> DraftBlock:
    tokens = np.arange(num_rows * BLOCK).reshape(num_rows, BLOCK) + 100
    return DraftBlock(
        tokens,
        np.ones(tokens.shape, np.float32),
        np.full(num_rows, BLOCK),
        certain=None if certain is None else np.array(certain),
    )


def test_a_step_has_each_row_s_anchor_and_its_planned_drafts() -> None:
    runtime = Noting(ROWS, 9)
    engine = engine_on(runtime)
    rows = rows_of([5, 6, 7], [8], [9, 1])
    for row in rows:
        engine.admit(row)
    lengths = np.array([2, 0, BLOCK])
    engine.verify(rows, block_for(3, certain=[True, False, False]), VerifyPlan(lengths))
    (step,) = runtime.steps
    assert step.slots == [3, 2, 1]
    assert (step.starts.tolist(), step.anchors.tolist()) == ([2, 0, 1], [7, 8, 1])
    assert step.starts.dtype == step.anchors.dtype == np.int64
    assert step.lengths.tolist() == lengths.tolist()
    assert step.draws.uniforms.shape == (3, BLOCK + 1)
    spans = step.spans()
    assert [(s.slot, s.start, s.certain) for s in spans] == [
        (3, 2, True),
        (2, 0, False),
        (1, 1, False),
    ]
    assert [s.tokens.tolist() for s in spans] == [[7, 100, 101], [8], [1, *range(114, 121)]]


@pytest.mark.parametrize("drafted", [False, True])
def test_a_step_without_drafts_to_verify_is_a_plain_one(drafted: bool) -> None:
    runtime = Noting(ROWS, 9)
    engine = engine_on(runtime)
    rows = rows_of([5, 6], [8])
    for row in rows:
        engine.admit(row)
    block = block_for(2) if drafted else None
    engine.verify(rows, block, VerifyPlan(np.zeros(2, np.int64)))
    (step,) = runtime.steps
    assert step.drafts is None
    assert not step.certain.any()
    assert [s.tokens.tolist() for s in step.spans()] == [[6], [8]]


def test_a_runtime_that_packs_rows_gets_a_step_as_spans() -> None:
    runtime = Packing(ROWS, 9)
    engine = engine_on(runtime)
    rows = rows_of([5, 6, 7], [8])
    for row in rows:
        engine.admit(row)
    result = engine.verify(rows, block_for(2), VerifyPlan(np.array([1, 3])))
    assert len(result.bonus) == 2
    assert [s.tokens.tolist() for s in runtime.spans] == [[7, 100], [8, 107, 108, 109]]
    assert runtime.lengths.tolist() == [1, 3]
    assert runtime.draws.temperature.tolist() == [0.0, 0.0]


def test_draws_are_those_of_each_row_s_seed_and_position_whatever_is_kept() -> None:
    """Rows move on, sit out drafts, and make room in their slots for rows that sample otherwise."""
    draws = SlotDraws(ROWS, BLOCK)
    rows = rows_of([5, 6, 7], [8], [9, 1], temperature=0.5)
    rows[1] = replace(rows[1], prompt=replace(rows[1].prompt, params=SamplingParams()))
    for row in rows:
        draws.admit(row)

    def check(chosen: list[RunningRow], *, drafted: int) -> None:
        slots, positions, anchors = standing(chosen)
        assert anchors.tolist() == [row.tokens[-1] for row in chosen]
        params = [row.prompt.params for row in chosen]
        seeds = [p.seed for p in params]
        expected = uniforms(seeds, [len(row.tokens) - 1 for row in chosen], num=2 * BLOCK + 1)
        sampled = np.array([p.temperature > 0 for p in params])
        if drafted:
            found = draws.draft(slots[:drafted], positions[:drafted]).uniforms
            expected_draft = expected[:drafted][sampled[:drafted], :BLOCK]
            np.testing.assert_array_equal(found[sampled[:drafted]], expected_draft)
        verify = draws.verify(slots, positions)
        np.testing.assert_array_equal(verify.uniforms[sampled], expected[sampled, BLOCK:])
        assert verify.uniforms.shape == (len(chosen), BLOCK + 1)
        assert verify.temperature.tolist() == [p.temperature for p in params]
        assert verify.top_k.tolist() == [p.top_k for p in params]
        assert draws.samples(slots).tolist() == sampled.tolist()

    check(rows, drafted=0)
    check(rows, drafted=2)
    for row in rows:
        row.tokens += [3, 4]
    check(rows, drafted=3)
    other = SamplingParams(temperature=2.0, top_k=5, seed=-7)
    for r in (0, 1):  # as many tokens, in the same slots
        rows[r] = replace(rows[r], prompt=Prompt(9, (8,), other), tokens=list(rows[r].tokens))
        draws.admit(rows[r])
        check(rows, drafted=3)
    check(rows[:2], drafted=1)


def test_where_passes_are_padded_a_draft_s_price_has_the_lookup_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = InstantRuntime(ROWS, 9)
    engine = instant_engine("with lookup", runtime, max_rows=ROWS, max_tokens=99)
    rows = rows_of([1, 2, 1], [3, 4, 5])
    for row in rows:
        engine.admit(row)
    asked = []
    monkeypatch.setattr(engine, "draft", lambda rows: asked.append(len(rows)))
    engine.draft_pass(rows)
    assert not asked
    runtime.padded_shapes = PaddedShapes((1, ROWS), (1, 2, 4, BLOCK + 1))
    engine.draft_pass(rows)
    assert asked == [2]
