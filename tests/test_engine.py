"""The engine on ONNX Runtime: whatever it batches, moves or speculates, the text is the target's.

The oracle is one full forward pass of `models.reference` over the finished text, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from scipy import stats
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import (
    Completion,
    DraftBlock,
    FinishReason,
    Prompt,
    SamplingParams,
    VerifyPlan,
)
from dspark_batch.decode.types import (
    RunningRow as Row,
)
from dspark_batch.drafters.dspark import NARROW_BLOCK
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.runtimes import ort
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.reference import forward
from dspark_batch.models.weights import open_weights

TIE = 1e-3  # logits closer than this may swap between two correct forward passes
LENGTHS = (300, 1, 513, 17, 505, 64, 65, 690, 255, 3, 256, 257)
NEW_TOKENS = 24
NO_STOP = {"eos_token_id": None}


@dataclass(frozen=True)
class Pair:
    """An exported pair: the engine and the target that it was built from."""

    engine: Engine
    target: Path

    def logits(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        with open_weights(self.target) as weights:
            spec = decoder_spec(weights.config)
            return [f.logits for f in forward(spec, weights.tensor, texts)]


def export_tiny(
    folder: Path, family: str, *, precision: str = "fp32", max_rows: int = 4, max_tokens: int = 760
) -> Pair:
    target = write_target(folder / "target", target_config(family, **NO_STOP))
    draft = write_draft(folder / "draft", draft_config())
    engine = export_pair(
        folder, target, draft, precision=precision, max_rows=max_rows, max_tokens=max_tokens
    )
    return Pair(open_engine(engine), target)


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    exported = export_tiny(tmp_path_factory.mktemp(request.param), request.param)
    yield exported
    exported.engine.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    exported = export_tiny(tmp_path_factory.mktemp("llama"), "llama", max_tokens=96)
    yield exported
    exported.engine.close()


class Narrow:
    """An engine that drafts narrow blocks only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: list[Row], width: int | None = None) -> DraftBlock:
        block = self._engine.draft(sequences, NARROW_BLOCK)
        assert block.lengths.tolist() == [NARROW_BLOCK] * len(sequences)
        return block


class Guided:
    """An engine whose drafts are right with probability 0.7: replaced by the known text's."""

    def __init__(self, engine: Engine, texts: dict[int, tuple[int, ...]], *, seed: int = 0) -> None:
        self._engine = engine
        self._texts = texts
        self._rng = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: list[Row], width: int | None = None) -> DraftBlock:
        block = self._engine.draft(sequences)
        for r, sequence in enumerate(sequences):
            known = self._texts[sequence.prompt.row][sequence.num_new_tokens :]
            for k, token in enumerate(known[: block.tokens.shape[1]]):
                if self._rng.random() < 0.7:
                    block.tokens[r, k] = token
        return block


def make_prompts(
    lengths: Sequence[int] = LENGTHS, *, vocab: int = tiny.VOCAB, **params: Any
) -> list[Prompt]:
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, **params}
    return [
        Prompt(row, tuple(rng.integers(1, vocab, n).tolist()), SamplingParams(**settings))
        for row, n in enumerate(lengths)
    ]


def run(engine: Any, prompts: Sequence[Prompt], spec: str) -> dict[int, Completion]:
    found = {c.row: c for c in decode(prompts, engine, spec=spec, stats=DecodeStats())}
    assert len(found) == len(prompts)
    return found


def texts(found: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    return {row: completion.token_ids for row, completion in found.items()}


def start(engine: Engine, lengths: Sequence[int], **params: Any) -> list[Row]:
    """Admitted and prefilled rows."""
    rows = [
        Row(prompt=p, slot=p.row, tokens=list(p.token_ids), num_prompt_tokens=len(p.token_ids))
        for p in make_prompts(lengths, **params)
    ]
    for row in rows:
        engine.admit(row)
    for row, token in zip(rows, engine.prefill(rows).tolist(), strict=True):
        row.tokens.append(token)
    return rows


def step(engine: Engine, rows: list[Row]) -> list[int]:
    """One plain round."""
    result = engine.verify(rows, None, VerifyPlan(np.zeros(len(rows), np.int64)))
    for row, token in zip(rows, result.bonus.tolist(), strict=True):
        row.tokens.append(token)
    return result.bonus.tolist()


def stop(engine: Engine, rows: list[Row]) -> None:
    for row in rows:
        engine.release(row)


def test_greedy_text_is_that_of_full_forwards(pair: Pair) -> None:
    """Prompts of 1 to 690 tokens over 4 slots: chunks, buckets and moves between them."""
    prompts = make_prompts()
    plain = texts(run(pair.engine, prompts, "off"))
    every = pair.logits([p.token_ids + plain[p.row] for p in prompts])
    for prompt, logits in zip(prompts, every, strict=True):
        assert len(plain[prompt.row]) == NEW_TOKENS
        chosen = logits[len(prompt.token_ids) - 1 : -1]
        taken = chosen[np.arange(NEW_TOKENS), list(plain[prompt.row])]
        assert (taken > chosen.max(axis=1) - TIE).all()
    assert texts(run(pair.engine, prompts, "on")) == plain
    assert texts(run(pair.engine, prompts, "auto")) == plain
    guided = run(Guided(pair.engine, plain), prompts, "on")
    assert texts(guided) == plain
    accepted = sum(c.spec.num_accepted_tokens for c in guided.values())
    assert accepted > 100


def test_order_and_company_do_not_change_the_text(pair: Pair) -> None:
    prompts = make_prompts()
    expected = texts(run(pair.engine, prompts, "on"))
    assert texts(run(pair.engine, prompts[::-1], "off")) == expected
    for prompt in prompts[2:5]:
        assert texts(run(pair.engine, [prompt], "on")) == {prompt.row: expected[prompt.row]}


def test_a_part_of_the_running_rows_may_take_a_step(llama: Pair) -> None:
    engine = llama.engine
    rows = start(engine, (5, 30, 12, 8))
    together = [step(engine, rows) for _ in range(3)]
    stop(engine, rows)
    rows = start(engine, (5, 30, 12, 8))
    for expected in together:
        assert step(engine, [rows[3], rows[0]]) == [expected[3], expected[0]]
        assert step(engine, [rows[1]]) == [expected[1]]
        assert step(engine, [rows[2]]) == [expected[2]]
    stop(engine, rows)


def test_sampled_text_is_reproducible_and_depends_on_no_neighbour(llama: Pair) -> None:
    lengths = (4, 30, 11, 2, 60, 9, 25)
    warm = [
        Prompt(p.row, p.token_ids, SamplingParams(12, temperature=1.2, top_p=0.95, seed=p.row))
        for p in make_prompts(lengths)
    ]
    expected = texts(run(llama.engine, warm, "off"))
    assert texts(run(llama.engine, warm, "off")) == expected
    assert texts(run(llama.engine, warm[::-1], "off")) == expected
    for prompt in warm[:3]:
        assert texts(run(llama.engine, [prompt], "off"))[prompt.row] == expected[prompt.row]
    reseeded = [
        Prompt(p.row, p.token_ids, SamplingParams(12, temperature=1.2, top_p=0.95, seed=100))
        for p in warm
    ]
    assert texts(run(llama.engine, reseeded, "off")) != expected
    drafted = texts(run(llama.engine, warm, "on"))
    assert texts(run(llama.engine, warm, "on")) == drafted


@pytest.fixture(scope="module")
def eight_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair over a vocabulary of 8, opened for many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "VOCAB", 8)
        exported = export_tiny(tmp_path_factory.mktemp("eight"), "llama", max_tokens=96)
    folder = exported.engine.folder
    exported.engine.close()
    engine = open_engine(folder, max_rows=500)
    yield Pair(engine, exported.target)
    engine.close()


@pytest.mark.parametrize("spec", ["off", "on", "auto", "narrow"])
def test_sampled_tokens_have_the_target_s_law(spec: str, eight_tokens: Pair) -> None:
    exported, vocab, num_rows, temperature = eight_tokens, 8, 3000, 1.0
    prompt = (3, 1, 4, 1, 5)
    prompts = [
        Prompt(row, prompt, SamplingParams(3, temperature=temperature, seed=row))
        for row in range(num_rows)
    ]
    if spec == "narrow":
        found = run(Narrow(exported.engine), prompts, "on")
    else:
        found = run(exported.engine, prompts, spec)
    if spec in ("on", "narrow"):
        accepted = sum(c.spec.num_accepted_tokens for c in found.values())
        verified = sum(c.spec.num_verified_tokens for c in found.values())
        assert 0.05 < accepted / verified < 0.95
    tokens = np.array([found[row].token_ids for row in range(num_rows)])
    every = [(*prompt, a, b) for a in range(vocab) for b in range(vocab)]
    logits = np.array(exported.logits(every))[:, len(prompt) - 1 :].astype(np.float64)
    law = np.exp(logits / temperature)
    law /= law.sum(axis=-1, keepdims=True)
    law = law.reshape(vocab, vocab, 3, vocab)
    first, second, third = law[0, 0, 0], law[:, 0, 1], law[:, :, 2]
    both = first[:, None] * second
    last = np.einsum("ab,abc->bc", both, third)
    for wanted, columns in ((both, (0, 1)), (last, (1, 2))):
        pairs = tokens[:, columns[0]] * vocab + tokens[:, columns[1]]
        counts = np.bincount(pairs, minlength=vocab * vocab)
        expected = wanted.ravel() * num_rows
        rare = expected < 5
        observed = [*counts[~rare], counts[rare].sum()]
        pooled = [*expected[~rare], expected[rare].sum()]
        if not pooled[-1]:
            observed, pooled = observed[:-1], pooled[:-1]
        assert len(pooled) > 15
        assert stats.chisquare(observed, pooled).pvalue > 1e-3


def test_int8_text_is_the_same_with_and_without_drafts(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "llama", precision="int8", max_tokens=96)
    prompts = make_prompts((70, 1, 17, 64, 5, 33))
    plain = texts(run(exported.engine, prompts, "off"))
    assert texts(run(exported.engine, prompts[::-1], "on")) == plain
    narrow = run(Narrow(exported.engine), prompts, "on")
    assert texts(narrow) == plain
    for counts in (completion.spec for completion in narrow.values()):
        assert counts.num_drafted_rounds == counts.num_rounds
        assert counts.num_draft_tokens == NARROW_BLOCK * counts.num_rounds
    guided = run(Guided(exported.engine, plain), prompts, "on")
    assert texts(guided) == plain
    assert sum(c.spec.num_accepted_tokens for c in guided.values()) > 50
    exported.engine.close()


def test_context_that_the_draft_takes_in_early_changes_no_draft(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, blocks = llama.engine, []
    for limit in (10_000, 6):
        monkeypatch.setattr(ort, "_MAX_PENDING", limit)
        rows = start(engine, (20, 3, 9))
        for _ in range(4):
            step(engine, rows)
        taken = [engine._runtime._rows[row.slot].num_taken for row in rows]
        assert all(taken) == (limit == 6)
        blocks.append(engine.draft_raw(rows))
        stop(engine, rows)
    np.testing.assert_array_equal(blocks[0].tokens, blocks[1].tokens)
    np.testing.assert_allclose(blocks[0].confidence, blocks[1].confidence, atol=1e-4)


def test_narrow_and_whole_blocks_take_turns(llama: Pair) -> None:
    """They share caches and context: a whole block is the same after narrow ones."""
    engine, blocks = llama.engine, []
    for width in (None, NARROW_BLOCK):
        rows = start(engine, (20, 3, 9))
        for _ in range(3):
            engine.draft_raw(rows, width)
            step(engine, rows)
        blocks.append(engine.draft_raw(rows))
        stop(engine, rows)
    np.testing.assert_array_equal(blocks[0].tokens, blocks[1].tokens)
    np.testing.assert_allclose(blocks[0].confidence, blocks[1].confidence, atol=1e-4)


def test_sampled_rows_of_narrow_blocks_and_of_none_are_verified_together(llama: Pair) -> None:
    """As when a lookup has proposed for some."""
    engine = llama.engine
    rows = start(engine, (20, 3, 9), temperature=1.0)
    drafted = engine.draft(rows[:2], NARROW_BLOCK)
    block = DraftBlock.empty(3, engine.block_size).updated([0, 1], drafted)
    result = engine.verify(rows, block, VerifyPlan(block.lengths))
    assert (result.num_accepted <= block.lengths).all()
    assert (result.bonus >= 0).all()
    stop(engine, rows)


def test_rows_may_draft_again_before_they_have_new_context(llama: Pair) -> None:
    """As after a prefill that made the draft take in what was there."""
    engine = llama.engine
    rows = start(engine, (20, 3, 9))
    first, again = engine.draft_raw(rows), engine.draft_raw(rows)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_allclose(first.confidence, again.confidence, atol=1e-5)
    stop(engine, rows)


def target_cache(engine: Engine, bucket: int = 0) -> Any:
    runtime: Any = engine._runtime
    return runtime._buckets[bucket].target


def test_caches_are_written_in_place(llama: Pair) -> None:
    engine = llama.engine
    rows = start(engine, (10, 4))
    cache = target_cache(engine)
    before = [buffer.copy() for buffer in cache.buffers]
    addresses = [buffer.ctypes.data for buffer in cache.buffers]
    step(engine, rows)
    assert [buffer.ctypes.data for buffer in target_cache(engine).buffers] == addresses
    for old, new in zip(before, cache.buffers, strict=True):
        for row, length in ((0, 10), (1, 4)):
            np.testing.assert_array_equal(old[row, :, :length], new[row, :, :length])
            assert (old[row, :, length] != new[row, :, length]).any()
    stop(engine, rows)


def test_buffers_grow_with_the_longest_row_and_shrink_after_it(llama: Pair) -> None:
    engine = llama.engine
    rows = start(engine, (5, 3))
    assert target_cache(engine).capacity == 64
    expected = [step(engine, rows) for _ in range(4)]
    stop(engine, rows)
    rows = start(engine, (5, 3))
    long = Row(
        prompt=Prompt(2, (7,) * 80, SamplingParams()),
        slot=2,
        tokens=[7] * 80,
        num_prompt_tokens=80,
    )
    found = [step(engine, rows)]
    engine.admit(long)
    long.tokens.append(int(engine.prefill([long])[0]))
    assert target_cache(engine).capacity == 128
    found.append(step(engine, [*rows, long])[:2])
    engine.release(long)
    found += [step(engine, rows), step(engine, rows)]
    assert target_cache(engine).capacity == 64
    assert found == expected
    stop(engine, rows)


def test_a_row_that_breaks_harms_neither_its_neighbours_nor_its_successor(llama: Pair) -> None:
    engine = llama.engine
    rows = start(engine, (12, 7, 5))
    expected = [step(engine, rows) for _ in range(3)]
    stop(engine, rows)
    rows = start(engine, (12, 7, 5))
    for buffer in target_cache(engine).buffers:
        buffer[1, :, 3] = np.nan
    assert step(engine, rows) == [expected[0][0], -1, expected[0][2]]
    engine.release(rows.pop(1))
    assert step(engine, rows) == [expected[1][0], expected[1][2]]
    stop(engine, rows)
    again = start(engine, (12, 7, 5))
    assert [step(engine, again) for _ in range(3)] == expected
    assert np.isfinite(engine.draft_raw(again).confidence).all()
    stop(engine, again)


def test_a_broken_row_is_an_error_row(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = llama.engine, make_prompts((6, 9, 4))
    expected = texts(run(engine, prompts, "off"))
    admit, broken = engine.admit, []

    def admit_then_break(sequence: Row) -> None:
        admit(sequence)
        if sequence.prompt.row == 1:
            broken.append(sequence.slot)

    prefill = engine.prefill

    def prefill_then_break(sequences: list[Row]) -> NDArray[np.int64]:
        first = prefill(sequences)
        bucket: Any = engine._runtime._buckets[0]
        for buffer in bucket.target.buffers:
            buffer[bucket.slots.index(broken[0]), :, 2] = np.inf
        return first

    monkeypatch.setattr(engine, "admit", admit_then_break)
    monkeypatch.setattr(engine, "prefill", prefill_then_break)
    found = run(engine, prompts, "on")
    assert found[1].finish_reason is FinishReason.ERROR
    assert found[1].error is not None
    assert "not finite" in found[1].error.message
    assert {row: c.token_ids for row, c in found.items() if row != 1} == {
        row: ids for row, ids in expected.items() if row != 1
    }
    monkeypatch.undo()
    assert texts(run(engine, prompts, "on")) == expected
