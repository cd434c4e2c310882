"""The loop alone: a target that is a function of its prefix, a draft of chosen quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tiny import VOCAB as VOCAB_SIZE
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.algorithm.sampling import sample, uniforms
from dspark_batch.decode.loop import DecodeStats, Slots, decode
from dspark_batch.decode.types import (
    Completion,
    DraftBlock,
    ErrorCode,
    FinishReason,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.models.plugin.specification import verify

VOCAB, STOP, BROKEN = 26, 0, 77
CHEAP_DRAFT = CostTable.measured(
    [1, 8], [1, 4], verify_seconds=[[1.0, 1.1], [1.0, 1.1]], draft_seconds=[0.01, 0.01]
)
DEAR_DRAFT = CostTable.measured(
    [1, 8], [1, 4], verify_seconds=[[1.0, 4.0], [1.0, 4.0]], draft_seconds=[2.0, 2.0]
)
PADDED = CostTable.from_json(CHEAP_DRAFT.to_json() | {"padded": True})


def next_token(tokens: list[int]) -> int:
    """The target: any function of the prefix. A prompt with `BROKEN` breaks at length 12."""
    if BROKEN in tokens and len(tokens) >= 12:
        return -1
    return hash(tuple(tokens)) % 997 % VOCAB


class Letters:
    """Token t is the t-th letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


class Fake:
    """`Engine` without a model; it checks that slots are admitted and released in turn."""

    intake = 1

    def __init__(
        self,
        *,
        max_rows: int = 3,
        block_size: int = 3,
        accuracy: float = 0.6,
        costs: CostTable | None = None,
        stops: bool = True,
        text: bool = False,
    ) -> None:
        self.max_rows = max_rows
        self.block_size = block_size
        self.costs = costs
        self.stop_token_ids = frozenset({STOP} if stops else ())
        self.acceptance = self.sampled_acceptance = np.full(block_size, accuracy)
        self.tokenizer = Letters() if text else None
        self.plans: list[list[int]] = []
        self.occupied: set[int] = set()
        self.confidence = accuracy
        self._accuracy = accuracy
        self._rng = np.random.default_rng(0)

    def admit(self, sequence: RunningRow) -> None:
        assert sequence.slot not in self.occupied
        assert 0 <= sequence.slot < self.max_rows
        self.occupied.add(sequence.slot)

    def release(self, sequence: RunningRow) -> None:
        self.occupied.remove(sequence.slot)

    def prefill(self, sequences: list[RunningRow]) -> NDArray[np.int64]:
        return np.array([next_token(s.tokens) for s in sequences])

    def draft(self, sequences: list[RunningRow], width: int | None = None) -> DraftBlock:
        tokens = np.zeros((len(sequences), self.block_size), np.int64)
        for r, sequence in enumerate(sequences):
            text = list(sequence.tokens)
            for k in range(self.block_size):
                right = self._rng.random() < self._accuracy
                text.append(next_token(text) if right else int(self._rng.integers(VOCAB)))
                tokens[r, k] = text[-1]
        confidence = np.full(tokens.shape, self.confidence, np.float32)
        return DraftBlock(tokens, confidence, np.full(len(tokens), self.block_size))

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        assert {s.slot for s in sequences} == self.occupied
        self.plans.append(plan.lengths.tolist())
        accepted, bonus = [], []
        for r, sequence in enumerate(sequences):
            text, count = list(sequence.tokens), 0
            for _ in range(int(plan.lengths[r])):
                assert block is not None
                if next_token(text) != block.tokens[r, count]:
                    break
                text.append(int(block.tokens[r, count]))
                count += 1
            last = next_token(text)
            accepted.append(count if last >= 0 else 0)
            bonus.append(last)
        return VerifyResult(np.array(accepted, np.int64), np.array(bonus, np.int64))


def plain(prompt: Prompt, *, stops: bool = True) -> tuple[int, ...]:
    """What decoding token by token gives, by definition."""
    tokens = list(prompt.token_ids)
    for _ in range(prompt.params.max_new_tokens):
        tokens.append(next_token(tokens))
        if stops and tokens[-1] == STOP:
            break
    return tuple(tokens[len(prompt.token_ids) :])


def make_prompts(number: int, *, new_tokens: int | None = None, **params: Any) -> list[Prompt]:
    return [
        Prompt(row, (row + 1, 5), SamplingParams(new_tokens or 1 + row * 7 % 23, **params))
        for row in range(number)
    ]


def run(
    prompts: list[Prompt],
    fake: Any,
    spec: str,
    stats: DecodeStats | None = None,
    *,
    scheduler: str | None = None,
) -> dict[int, Completion]:
    stats = stats or DecodeStats()
    every = list(decode(prompts, fake, spec=spec, scheduler=scheduler, stats=stats))
    found = {completion.row: completion for completion in every}
    assert len(found) == len(every) == len(prompts)
    assert not fake.occupied
    return found


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    number=st.integers(0, 11),
    max_rows=st.integers(1, 5),
    block_size=st.integers(0, 4),
    accuracy=st.sampled_from([0.01, 0.5, 0.9, 0.99]),
    spec=st.sampled_from(["off", "on", "auto"]),
    scheduler=st.sampled_from([None, "early-stop", "async", "threshold", "whole"]),
    costs=st.sampled_from([None, CHEAP_DRAFT, DEAR_DRAFT, PADDED]),
    stops=st.booleans(),
)
def test_text_is_that_of_plain_decoding_and_rows_in_are_rows_out(
    number: int,
    max_rows: int,
    block_size: int,
    accuracy: float,
    spec: str,
    scheduler: str | None,
    costs: CostTable | None,
    stops: bool,
) -> None:
    fake = Fake(
        max_rows=max_rows, block_size=block_size, accuracy=accuracy, costs=costs, stops=stops
    )
    prompts, stats = make_prompts(number), DecodeStats()
    found = run(prompts, fake, spec, stats, scheduler=scheduler)
    for prompt in prompts:
        completion = found[prompt.row]
        assert completion.token_ids == plain(prompt, stops=stops)
        assert completion.num_prompt_tokens == 2
        ended = stops and completion.token_ids[-1] == STOP
        assert completion.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
        counts = completion.spec
        assert sum(counts.accepted_histogram) == counts.num_rounds
        assert len(counts.accepted_histogram) == block_size + 1
        weighed = sum(a * n for a, n in enumerate(counts.accepted_histogram))
        assert weighed == counts.num_accepted_tokens <= counts.num_verified_tokens
        assert counts.num_verified_tokens <= counts.num_draft_tokens
        assert counts.num_draft_tokens <= counts.num_drafted_rounds * block_size
        assert counts.num_drafted_rounds <= counts.num_rounds
        if not ended:
            total = 1 + counts.num_rounds + counts.num_accepted_tokens
            assert len(completion.token_ids) == total == prompt.params.max_new_tokens
    assert stats.num_new_tokens == sum(len(c.token_ids) for c in found.values())
    assert stats.num_prompt_tokens == 2 * number
    assert stats.spec.num_rounds == sum(c.spec.num_rounds for c in found.values())
    assert stats.num_rounds == len(fake.plans)


@pytest.mark.parametrize("number", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("new_tokens", [1, 2, 6])
def test_batches_that_end_together_lose_no_row(number: int, new_tokens: int) -> None:
    for spec in ("off", "on"):
        fake = Fake(stops=False)
        found = run(make_prompts(number, new_tokens=new_tokens), fake, spec)
        assert all(len(c.token_ids) == new_tokens for c in found.values())
    assert new_tokens > 1 or not fake.plans


def test_prompts_are_pulled_as_slots_get_free() -> None:
    pulled, fake = 0, Fake(max_rows=3)

    def source() -> Iterator[Prompt]:
        nonlocal pulled
        for prompt in make_prompts(20, new_tokens=5):
            pulled += 1
            yield prompt

    done = 0
    stream = decode(source(), fake, spec="on", stats=DecodeStats())  # type: ignore[arg-type]
    assert pulled == 0
    for _ in stream:
        done += 1
        assert pulled <= done + fake.max_rows + 2  # rows that ended in the same round
    assert done == pulled == 20


def test_a_broken_row_is_an_error_and_the_others_go_on() -> None:
    prompts = make_prompts(6, new_tokens=20)
    prompts[2] = Prompt(2, (BROKEN, 3), SamplingParams(40))
    for spec in ("off", "on"):
        found = run(prompts, Fake(accuracy=0.9, stops=False, text=True), spec)
        broken = found.pop(2)
        assert broken.finish_reason is FinishReason.ERROR
        assert broken.error is not None
        assert (broken.error.code, broken.error.stage) == (ErrorCode.NUMERICAL, "decode")
        assert broken.text is None
        assert len(broken.token_ids) <= 10
        for row, completion in found.items():
            assert completion.token_ids == plain(prompts[row], stops=False)


def test_prompts_wait_for_the_slots_that_an_engine_wants_free() -> None:
    """While rows run; the first intake and the last prompts wait for nothing."""
    sizes = []

    class Patient(Fake):
        intake = 2

        def prefill(self, sequences: list[RunningRow]) -> NDArray[np.int64]:
            sizes.append((len(self.occupied) - len(sequences), len(sequences)))
            return super().prefill(sequences)

    engine = Patient(max_rows=4, stops=False)
    prompts = [Prompt(i, (1, i % 5), SamplingParams(2 + i % 4)) for i in range(15)]
    done = list(decode(prompts, engine, spec="off", stats=DecodeStats()))
    assert sorted(c.row for c in done) == list(range(15))
    assert sizes[0] == (0, 4)
    assert all(number >= 2 for running, number in sizes[:-1] if running)
    assert any(running for running, _ in sizes)


def test_a_row_that_breaks_in_prefill_is_an_error() -> None:
    prompts = [Prompt(0, (BROKEN,) * 12, SamplingParams(4)), *make_prompts(3)[1:]]
    found = run(prompts, Fake(), "on")
    assert found[0].finish_reason is FinishReason.ERROR
    assert found[0].token_ids == ()
    assert found[1].token_ids == plain(prompts[1])


@pytest.mark.parametrize("spec", ["off", "on"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_text_ends_before_the_first_stop_string(spec: str, width: int) -> None:
    """Stop strings of one to three letters cut from the text that plain decoding gives."""
    letters = Letters()
    for prompt in make_prompts(12, new_tokens=20):
        whole = letters.decode(list(plain(prompt, stops=False)))
        for begin in (0, 1, 7, 12):
            stop = whole[begin : begin + width]
            first = whole.find(stop)
            params = SamplingParams(20, stop=("ZZ", stop))
            fake = Fake(accuracy=0.95, stops=False, text=True)
            found = run([Prompt(0, prompt.token_ids, params)], fake, spec)[0]
            assert found.finish_reason is FinishReason.STOP
            assert found.text == whole[:first]
            assert len(found.token_ids) == first + width


def test_nothing_follows_a_stop_token_inside_an_accepted_block() -> None:
    inside = 0
    for row in range(60):
        prompt = Prompt(0, (row, 2), SamplingParams(40))
        found = run([prompt], Fake(accuracy=0.999, block_size=4), "on")[0]
        assert found.token_ids == plain(prompt)
        assert STOP not in found.token_ids[:-1]
        planned = 1 + found.spec.num_rounds + found.spec.num_accepted_tokens
        inside += len(found.token_ids) < planned
    assert inside > 5


def test_text_is_the_decoded_tokens_or_none_without_a_tokenizer() -> None:
    prompt = make_prompts(1, new_tokens=8)[0]
    expected = plain(prompt, stops=False)
    spoken = run([prompt], Fake(stops=False, text=True), "on")[0]
    assert spoken.text == Letters().decode(list(expected))
    assert run([prompt], Fake(stops=False), "on")[0].text is None


def test_on_verifies_whole_blocks_up_to_what_a_row_still_needs() -> None:
    fake = Fake(max_rows=1, accuracy=0.001, stops=False)
    run([Prompt(0, (4,), SamplingParams(7))], fake, "on")
    assert [plan[0] for plan in fake.plans] == [3, 3, 3, 2, 1, 0]


def test_auto_drafts_where_it_pays_and_not_where_it_loses() -> None:
    prompts = make_prompts(8, new_tokens=40)
    paying, losing = DecodeStats(), DecodeStats()
    run(prompts, Fake(accuracy=0.8, costs=CHEAP_DRAFT, stops=False), "auto", paying)
    assert paying.num_drafted_rounds == paying.num_rounds
    assert paying.spec.num_verified_tokens > 0
    fake = Fake(accuracy=0.8, costs=DEAR_DRAFT, stops=False)
    run(prompts, fake, "auto", losing)
    assert losing.num_drafted_rounds <= 2


class Timed(Fake):
    """A draft takes a second, a plain step two, a verification three and a prefill ten."""

    now = 0.0

    def prefill(self, sequences: list[RunningRow]) -> NDArray[np.int64]:
        self.now += 10.0
        return super().prefill(sequences)

    def draft(self, sequences: list[RunningRow], width: int | None = None) -> DraftBlock:
        self.now += 1.0
        return super().draft(sequences)

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        self.now += 2.0 if block is None else 3.0
        return super().verify(sequences, block, plan)


def test_what_drafting_saved_is_measured_by_the_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of two rows, every second one with drafts that are all right."""
    fake, stats = Timed(max_rows=2, accuracy=1.0, stops=False), DecodeStats()
    monkeypatch.setattr("dspark_batch.decode.loop.time.perf_counter", lambda: fake.now)
    slots = Slots(fake, stats)  # type: ignore[arg-type]
    slots.fill(iter(make_prompts(2, new_tokens=60)))
    for drafts in (True, False) * 3:
        block = slots.draft(slots.running if drafts else [])
        plan = VerifyPlan(np.zeros(2, np.int64) if block is None else block.lengths)
        slots.commit(block, plan, slots.verify(block, plan))
    assert stats.saved_seconds == pytest.approx(3 * (4 * 2.0 - 4.0))


def test_a_run_that_always_drafts_has_plain_rounds_to_compare_with() -> None:
    fake, stats = Fake(max_rows=1, accuracy=0.8, costs=CHEAP_DRAFT, stops=False), DecodeStats()
    run(make_prompts(12, new_tokens=200), fake, "auto", stats)
    assert stats.num_rounds > 600
    num_plain = stats.num_rounds - stats.num_drafted_rounds
    assert stats.num_rounds // 256 <= num_plain <= stats.num_rounds // 256 + 1


@pytest.mark.parametrize("boast", [False, True])
def test_auto_gives_up_a_draft_that_turns_out_bad(boast: bool) -> None:
    """The export promised 0.8. The draft's own confidence says as much, or the truth."""
    costs = CostTable.measured(
        [1, 8], [1, 4], verify_seconds=[[1.0, 1.6], [1.0, 1.6]], draft_seconds=[0.3, 0.3]
    )
    fake = Fake(max_rows=2, accuracy=0.05, costs=costs, stops=False)
    fake.acceptance = np.full(3, 0.8)
    fake.confidence = 0.8 if boast else 0.05
    stats = DecodeStats()
    run(make_prompts(6, new_tokens=300), fake, "auto", stats)
    assert 5 < stats.num_drafted_rounds < stats.num_rounds / 20
    assert bool(stats.spec.num_verified_tokens) == boast


def test_a_block_reaches_the_rows_that_it_was_drafted_for() -> None:
    """A schedule may name rows in any order, and some of them only."""
    fake = Fake(max_rows=5, accuracy=0.999)
    slots = Slots(fake, DecodeStats())  # type: ignore[arg-type]
    slots.fill(iter(make_prompts(5, new_tokens=30)))
    chosen = [slots.running[r] for r in (3, 1, 4)]
    block = slots.draft(chosen)
    assert block is not None
    assert block.lengths.tolist() == [0, 3, 0, 3, 3]
    plan = VerifyPlan(block.lengths)
    result = slots.verify(block, plan)
    assert result.num_accepted.tolist() == [0, 3, 0, 3, 3]
    slots.commit(block, plan, result)
    waiting = [s.num_pending for s in slots.running]
    assert waiting == [3, 4, 3, 4, 4]
    counts = [slots.counts.of(s.slot) for s in slots.running]
    assert [c.num_draft_tokens for c in counts] == [0, 3, 0, 3, 3]
    assert [c.num_drafted_rounds for c in counts] == [0, 1, 0, 1, 1]
    assert slots.draft([]) is None


# --- sampled rows: the law of the text -----------------------------------------------------------


class Sampled:
    """`Engine` over three tokens whose next token depends on the last one: its law is known.

    Confidence is of the worst kind: a token decides how sure the draft is of the next one.
    """

    block_size = 3
    tokenizer = None
    stop_token_ids: frozenset[int] = frozenset()
    target = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    proposed = np.array([[0.3, 0.4, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])
    sureness = np.array([0.95, 0.0, 0.7])
    # For one row, the steps on which a plan that anticipates goes wrong (Appendix A). For three,
    # many plans.
    costs = CostTable.measured(
        [1, 2, 3],
        [1, 2, 3, 4],
        verify_seconds=[[1.0, 2.0, 2.2, 2.3], [1.1, 2.0, 2.2, 2.3], [1.2, 2.0, 2.2, 2.6]],
        draft_seconds=[0.1, 0.1, 0.1],
    )
    acceptance = sampled_acceptance = np.full(3, 0.6)

    intake = 1

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.plans: set[tuple[int, ...]] = set()
        self.occupied: set[int] = set()

    def admit(self, sequence: RunningRow) -> None:
        self.occupied.add(sequence.slot)

    def release(self, sequence: RunningRow) -> None:
        self.occupied.remove(sequence.slot)

    def prefill(self, sequences: list[RunningRow]) -> NDArray[np.int64]:
        return np.zeros(len(sequences), np.int64)

    def _uniforms(self, sequences: list[RunningRow]) -> NDArray[np.float32]:
        seeds = [s.prompt.params.seed for s in sequences]
        return uniforms(seeds, [s.anchor_position for s in sequences], num=7)

    def draft(self, sequences: list[RunningRow], width: int | None = None) -> DraftBlock:
        draws, last = self._uniforms(sequences), np.array([s.tokens[-1] for s in sequences])
        tokens, confidence = [], []
        for k in range(3):
            confidence.append(self.sureness[last])
            last = sample(self.proposed[last], draws[:, k])
            tokens.append(last)
        sure = np.stack(confidence, axis=1).astype(np.float32)
        return DraftBlock(np.stack(tokens, axis=1), sure, np.full(len(sequences), 3))

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        self.plans.add(tuple(plan.lengths.tolist()))
        num_rows = len(sequences)
        tokens = np.zeros((num_rows, 3), np.int64) if block is None else block.tokens
        last = np.array([[s.tokens[-1]] for s in sequences])
        before = np.concatenate([last, tokens], axis=1)
        ones = np.ones(num_rows)
        return verify(
            np.log(self.target[before.ravel()]),
            np.arange(4 * num_rows).reshape(num_rows, 4),
            tokens,
            plan.lengths,
            np.zeros(num_rows, np.int64),
            np.log(self.proposed[before[:, :3]]).astype(np.float32),
            np.arange(3),
            ones,
            np.zeros(num_rows, np.int64),
            ones,
            self._uniforms(sequences)[:, 3:],
        )


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "rows"), [("on", 1), ("auto", 3)])
@pytest.mark.parametrize("scheduler", ["early-stop", "async", "threshold", "whole", "one width"])
def test_sampled_text_has_the_target_s_law_under_every_scheduler(
    scheduler: str, spec: str, rows: int
) -> None:
    """Four tokens after the first one, against their exact law by enumeration."""
    number = 2000
    engine = Sampled(rows)
    if scheduler == "one width":  # what it becomes where passes are padded
        scheduler = "early-stop"
        engine.costs = CostTable.from_json(Sampled.costs.to_json() | {"padded": True})
    prompts = [
        Prompt(row, (1,), SamplingParams(5, temperature=1.0, seed=row)) for row in range(number)
    ]
    done = run(prompts, engine, spec, scheduler=scheduler)
    texts = np.array([done[row].token_ids for row in range(number)])
    assert len(engine.plans) > rows
    found = np.bincount(texts[:, 1:] @ [27, 9, 3, 1], minlength=81)
    law = np.zeros(81)
    for text in product(range(3), repeat=4):
        steps = zip((0, *text), text, strict=False)
        law[np.dot(text, [27, 9, 3, 1])] = np.prod([Sampled.target[a, b] for a, b in steps])
    common = law * number > 5
    counts = [*found[common], found[~common].sum()]
    expected = [*law[common], law[~common].sum()]
    assert stats.chisquare(counts, np.array(expected) * number).pvalue > 1e-3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    target = write_target(folder / "target", target_config("llama"))
    return export_pair(folder, target, write_draft(folder / "draft", draft_config()))


@pytest.mark.parametrize("scheduler", ["early-stop", "async", "threshold", "whole"])
def test_real_graphs_give_plain_decoding_s_text_under_every_scheduler(
    pair: Path, scheduler: str
) -> None:
    """A draft that knows nothing, for a machine on which it would cost nothing."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(row, tuple(rng.integers(1, VOCAB_SIZE, 3 + row).tolist()), SamplingParams(20))
        for row in range(9)
    ]
    with closing(open_engine(pair)) as engine:
        engine.costs = CHEAP_DRAFT
        plain = [c.token_ids for _, c in sorted(run_engine(prompts, engine, "off", None))]
        for spec in ("on", "auto"):
            found = sorted(run_engine(prompts, engine, spec, scheduler))
            assert [c.token_ids for _, c in found] == plain
            assert sum(c.spec.num_verified_tokens for _, c in found) > 0


def run_engine(
    prompts: list[Prompt], engine: Engine, spec: str, scheduler: str | None
) -> list[tuple[int, Completion]]:
    stream = decode(
        prompts,
        engine,
        spec=spec,
        scheduler=scheduler,
        confidence_threshold=0.1,
        stats=DecodeStats(),
    )
    return [(completion.row, completion) for completion in stream]


def test_an_unwatched_stats_object_adds_up_over_calls() -> None:
    stats = DecodeStats()
    for _ in range(2):
        run(make_prompts(4), Fake(), "on", stats)
    once = DecodeStats()
    run(make_prompts(4), Fake(), "on", once)
    assert stats.num_new_tokens == 2 * once.num_new_tokens
    assert stats.spec.num_rounds == 2 * once.spec.num_rounds
    assert min(stats.host_seconds, stats.prefill_seconds, stats.verify_seconds) > 0
