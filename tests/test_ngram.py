"""The draft without weights: the lookup against its specification, and losslessness with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tiny import VOCAB, export_pair, target_config, write_target

from dspark_batch.cli import main
from dspark_batch.decode.algorithm import calibration
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Completion, Prompt, SamplingParams
from dspark_batch.decode.types import RunningRow as Row
from dspark_batch.drafters.lookup import (
    Lookup,
    LookupInfo,
    Round,
    learnt,
    replay,
    replayed,
    rounds,
)
from dspark_batch.drafters.ngram import continuation, longest_match, text_from_tokens
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.reference import forward
from dspark_batch.models.weights import open_weights

GAMMA, NEW_TOKENS = 4, 30
NGRAM = f'drafter = "ngram"\nblock_size = {GAMMA}\nlongest_match = 3'
few_tokens = st.lists(st.integers(0, 3) | st.just(70_000), min_size=1, max_size=30)


def lookup_info(
    table: Sequence[Sequence[float]] = ((0.2,) * GAMMA, (0.5,) * GAMMA, (0.9,) * GAMMA),
    *,
    sampled: Sequence[Sequence[float]] | None = None,
    shortest: int = 1,
) -> LookupInfo:
    settings = {"shortest_match": shortest, "longest_match": shortest + len(table) - 1}
    tables = {"acceptance": table, "sampled_acceptance": sampled or table}
    return LookupInfo.model_validate({"drafter": "ngram", **settings, **tables})


def row(tokens: Sequence[int], *, slot: int = 0, temperature: float = 0.0) -> Row:
    prompt = Prompt(slot, tuple(tokens), SamplingParams(temperature=temperature))
    return Row(prompt=prompt, slot=slot, tokens=list(tokens), num_prompt_tokens=len(tokens))


def slow_match(tokens: Sequence[int], shortest: int, longest: int) -> tuple[int, int] | None:
    """By definition: longest first, then nearest to the end."""
    for size in range(longest, shortest - 1, -1):
        for follows in range(len(tokens) - 1, size - 1, -1):
            if list(tokens[follows - size : follows]) == list(tokens[len(tokens) - size :]):
                return follows, size
    return None


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    tokens=few_tokens | st.lists(st.integers(0, 1), min_size=1, max_size=60),
    shortest=st.integers(1, 3),
    more=st.integers(0, 7),
)
def test_the_match_is_the_longest_and_of_those_the_last(
    tokens: list[int], shortest: int, more: int
) -> None:
    found = longest_match(text_from_tokens(tokens), shortest=shortest, longest=shortest + more)
    assert found == slow_match(tokens, shortest, shortest + more)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=few_tokens, block_size=st.integers(1, 9), data=st.data())
def test_a_proposal_copies_token_by_token_and_goes_on_into_itself(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    follows = data.draw(st.integers(0, len(tokens) - 1))
    copied = list(tokens)
    for k in range(block_size):
        copied.append(copied[follows + k])
    assert continuation(tokens, follows, block_size) == copied[len(tokens) :]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(few_tokens, min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 2), few_tokens, st.booleans()), max_size=6),
)
def test_what_is_kept_of_a_row_changes_no_proposal(
    rows: list[list[int]], steps: list[tuple[int, list[int], bool]]
) -> None:
    """Rows grow, rest for a while and make room for others; the lookup starts at nothing again."""
    kept, running = Lookup(lookup_info()), [row(r, slot=i) for i, r in enumerate(rows)]
    for which, tokens, is_new in steps:
        slot = which % len(running)
        if is_new:
            kept.release(slot)
            running[slot] = row(tokens, slot=slot)
        else:
            running[slot].tokens += tokens
        part = running[: which + 1]
        found, expected = kept.draft(part), Lookup(lookup_info()).draft(part)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.confidence, expected.confidence)
        np.testing.assert_array_equal(found.lengths, expected.lengths)


def test_trust_is_the_table_s_and_nothing_is_proposed_without_a_match() -> None:
    table, sampled = ((0.2, 0.3, 0.4), (0.6, 0.7, 0.8)), ((0.1, 0.2, 0.3), (0.3, 0.4, 0.5))
    drafter = Lookup(lookup_info(table, sampled=sampled, shortest=2))
    texts = ([5, 6, 7], [1, 2, 9, 1, 2], [1, 2, 3, 8] * 2, [1, 2, 3, 8] * 2)
    rows = [row(t, slot=i, temperature=0.5 * (i == 3)) for i, t in enumerate(texts)]
    block = drafter.draft(rows)
    assert block.lengths.tolist() == [0, 3, 3, 3]
    assert block.tokens[1:].tolist() == [[9, 1, 2], [1, 2, 3], [1, 2, 3]]
    with np.errstate(over="ignore"):
        confidence = 1.0 / (1.0 + np.exp(-block.confidence.astype(np.float64)))
    np.testing.assert_allclose(confidence, [[0.0] * 3, *table, sampled[1]], atol=1e-6)


ROW = ([1, 2, 3], [9, 1, 2, 3, 9, 1, 2, 5])
"""Rounds worked out by hand; the first begins after the first anchor, 9."""


def test_a_row_is_replayed_as_it_would_have_been_drafted() -> None:
    assert list(replay(lookup_info(((0.5,) * 3,) * 3), *ROW)) == [
        Round(level=0, num_accepted=0, num_known=3),  # 9 is new
        Round(level=1, num_accepted=3, num_known=3),  # 1 -> 2 3 9
        Round(level=3, num_accepted=1, num_known=2),  # 3 9 1 -> 2, then 3 where the row says 5
    ]


def test_acceptance_by_match_is_learnt_from_finished_rows() -> None:
    before = lookup_info(((0.5,) * 3,) * 3)
    of_rows = replayed(before, [ROW, ROW])
    after = learnt(before, greedy=of_rows, sampled=[])
    seen = (2 * 0.5 + 2) / (2 + 2)
    two_of, none_of = (2 * seen + 2) / (2 + 2), 2 * seen / (2 + 2)
    # A match of two tokens was not seen: it is worth what one token is, and so to begin with is
    # one of three.
    np.testing.assert_allclose(after.acceptance, [[seen] * 3, [seen] * 3, [two_of, none_of, seen]])
    assert after.sampled_acceptance == ((0.5,) * 3,) * 3
    assert before.model_copy(update={"acceptance": after.acceptance}) == after
    other = learnt(before, greedy=[], sampled=of_rows)
    assert other.sampled_acceptance == after.acceptance


def test_calibration_gets_the_rounds_of_whole_blocks() -> None:
    tables = [((x,) * 3, (0.6,) * 3, (0.7,) * 3) for x in (0.5, 0.4)]
    draft, texts = lookup_info(tables[0], sampled=tables[1]), [ROW, ([4], [4, 4, 4, 4, 4, 4])]
    found = rounds(draft, texts, sampled=False)
    assert found.accepted.tolist() == [0, 3, 3]
    assert found.rows.tolist() == [0, 0, 1]
    confidence = calibration.apply(found.logits, np.ones(3))
    np.testing.assert_allclose(confidence, [[0.0] * 3, [0.5] * 3, [0.5] * 3], atol=1e-6)
    sampled = calibration.apply(rounds(draft, texts, sampled=True).logits, np.ones(3))
    np.testing.assert_allclose(sampled, [[0.0] * 3, [0.4] * 3, [0.4] * 3], atol=1e-6)
    np.testing.assert_allclose(found.acceptance, [3 / 5, 3 / 4, 3 / 4])


class Exported:
    """An engine whose draft is a lookup, and the target that it was built from."""

    def __init__(self, folder: Path, vocab: int, *, max_rows: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "VOCAB", vocab)
            self.target = write_target(
                folder / "target", target_config("llama", vocab_size=vocab, eos_token_id=None)
            )
        self.folder = export_pair(folder, self.target, NGRAM)
        self.engine = open_engine(self.folder, max_rows=max_rows)

    def logits(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        with open_weights(self.target) as weights:
            spec = decoder_spec(weights.config)
            return np.array([f.logits for f in forward(spec, weights.tensor, texts)], np.float64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    found = Exported(tmp_path_factory.mktemp("ngram"), VOCAB, max_rows=4)
    yield found
    found.engine.close()


@pytest.fixture(scope="module")
def six_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    found = Exported(tmp_path_factory.mktemp("six"), 6, max_rows=400)
    yield found
    found.engine.close()


def run(engine: Engine, prompts: Sequence[Prompt], spec: str) -> dict[int, Completion]:
    found = {c.row: c for c in decode(prompts, engine, spec=spec, stats=DecodeStats())}
    assert len(found) == len(prompts)
    return found


def make_prompts(new_tokens: int = NEW_TOKENS, **params: Any) -> list[Prompt]:
    """Rows that repeat themselves, one that repeats nothing, one of one token."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCAB, n).tolist() * 3 for n in (3, 9, 20, 5, 1, 12)]
    texts += [rng.permutation(VOCAB)[:25].tolist(), [7]]
    return [Prompt(i, tuple(t), SamplingParams(new_tokens, **params)) for i, t in enumerate(texts)]


def test_a_recipe_without_weights_makes_an_engine_without_a_draft_graph(exported: Exported) -> None:
    manifest = read_manifest(exported.folder)
    draft = manifest.draft
    assert draft is not None
    assert (draft.drafter, draft.source, draft.files, draft.cache) == ("ngram", None, {}, None)
    assert draft.lookup is not None
    assert list(draft.lookup.settings.levels) == [1, 2, 3]
    assert np.shape(draft.lookup.acceptance) == (3, GAMMA)
    assert len({*draft.acceptance, *np.ravel(draft.lookup.acceptance)}) > 3  # measured
    assert [found.rows for found in draft.calibration] == ["greedy", "sampled"]
    assert draft.sampled_acceptance[0] < draft.acceptance[0]
    assert not [name for name in manifest.files if name.startswith("draft")]
    costs = exported.engine.costs
    assert costs is not None
    assert max(costs.draft_seconds) < min(map(min, costs.verify_seconds))


@pytest.mark.slow
def test_another_lookup_is_another_engine(exported: Exported) -> None:
    folder, before = exported.folder.parents[1], read_manifest(exported.folder)
    assert read_manifest(export_pair(folder, exported.target, NGRAM)) == before
    wider = NGRAM.replace("longest_match = 3", "longest_match = 4")
    other = read_manifest(export_pair(folder, exported.target, wider))
    assert other.draft is not None
    assert other.draft.lookup is not None
    assert len(other.draft.lookup.acceptance) == 4
    export_pair(folder, exported.target, NGRAM)


@pytest.mark.parametrize("new_tokens", [1, 2, GAMMA, NEW_TOKENS])
def test_greedy_text_is_plain_decoding_s(exported: Exported, new_tokens: int) -> None:
    """Also where fewer tokens are left than a block has."""
    prompts = make_prompts(new_tokens)
    plain = {i: c.token_ids for i, c in run(exported.engine, prompts, "off").items()}
    for spec in ("on", "auto"):
        found = run(exported.engine, prompts, spec)
        assert {i: c.token_ids for i, c in found.items()} == plain
        assert all(len(c.token_ids) == new_tokens for c in found.values())
    whole = run(exported.engine, prompts, "on")
    if new_tokens == NEW_TOKENS:
        accepted = sum(c.spec.num_accepted_tokens for c in whole.values())
        assert accepted > 20
        assert any(c.spec.accepted_histogram[GAMMA] for c in whole.values())


def test_rounds_are_those_that_a_replay_predicts(exported: Exported) -> None:
    prompts, draft = make_prompts(), exported.engine.manifest.draft
    assert draft is not None
    for i, completion in run(exported.engine, prompts, "on").items():
        found = list(replay(draft.lookup, prompts[i].token_ids, completion.token_ids))
        spec = completion.spec
        assert spec.num_rounds == len(found)
        assert spec.num_draft_tokens == GAMMA * sum(r.level > 0 for r in found)
        # The last round takes its last token from the target, not from the draft.
        last = found[-1]
        found[-1] = last._replace(num_accepted=min(last.num_accepted, last.num_known - 1))
        counts = np.bincount([r.num_accepted for r in found], minlength=GAMMA + 1)
        assert spec.accepted_histogram == tuple(counts.tolist())


def test_rows_without_a_match_verify_nothing(exported: Exported) -> None:
    engine = exported.engine
    rows = [row([1, 2, 3, 4, 5]), row([4, 9, 4, 9, 4], slot=1)]
    for sequence in rows:
        engine.admit(sequence)
    block = engine.draft(rows)
    for sequence in rows:
        engine.release(sequence)
    assert block.lengths.tolist() == [0, GAMMA]
    assert not block.confidence[0].any()
    assert block.tokens[1].tolist() == [9, 4, 9, 4]
    new = Prompt(0, tuple(range(1, 30)), SamplingParams(2))
    counts = run(engine, [new], "on")[0].spec
    assert counts.num_verified_tokens <= 1


def law_of(exported: Exported, prompt: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """Exact joint probabilities [V, V, V] of three new tokens."""
    vocab = exported.engine.vocab_size
    every = [(*prompt, a, b) for a in range(vocab) for b in range(vocab)]
    logits = exported.logits(every)[:, len(prompt) - 1 :] / temperature
    step = np.exp(logits - logits.max(axis=-1, keepdims=True))
    step = (step / step.sum(axis=-1, keepdims=True)).reshape(vocab, vocab, 3, vocab)
    return step[0, 0, 0][:, None, None] * step[:, 0, 1][..., None] * step[:, :, 2]


@pytest.mark.parametrize("spec", ["on", "auto"])
def test_sampled_tokens_have_the_target_s_law(six_tokens: Exported, spec: str) -> None:
    """Rows of two prompts in one batch, so that a round's draft vocabulary is of both."""
    texts, num_rows = ((0, 1, 2, 3, 4, 5, 1, 3, 0), (5, 3, 2, 4, 0, 1, 5, 2, 4)), 4000
    prompts = [
        Prompt(i, texts[i % 2], SamplingParams(3, temperature=1.3, seed=i)) for i in range(num_rows)
    ]
    found = run(six_tokens.engine, prompts, spec)
    if spec == "on":
        spent = [c.spec for c in found.values()]
        accepted = sum(s.num_accepted_tokens for s in spent)
        assert 0.05 < accepted / sum(s.num_verified_tokens for s in spent) < 0.95
    for which, text in enumerate(texts):
        law = law_of(six_tokens, text, 1.3).ravel()
        tokens = np.array([found[i].token_ids for i in range(which, num_rows, 2)])
        counts = np.bincount(tokens @ [36, 6, 1], minlength=216)
        expected = law * len(tokens)
        order = np.argsort(expected)
        bins = np.split(order, np.flatnonzero(np.diff(np.cumsum(expected[order]) // 12)) + 1)
        observed = [counts[b].sum() for b in bins]
        wanted = np.array([expected[b].sum() for b in bins])
        assert len(bins) > 20
        assert stats.chisquare(observed, wanted * len(tokens) / wanted.sum()).pvalue > 1e-3


def test_a_sampled_row_is_its_own_beside_greedy_ones(exported: Exported) -> None:
    """Filters, temperatures and greedy rows in one batch: greedy text does not move."""
    greedy = make_prompts()
    plain = {i: c.token_ids for i, c in run(exported.engine, greedy, "off").items()}
    mixed = [
        p if p.row % 2 else Prompt(p.row, p.token_ids, SamplingParams(NEW_TOKENS, 0.9, 0.8, 5, 3))
        for p in greedy
    ]
    found = run(exported.engine, mixed, "on")
    again = run(exported.engine, mixed, "on")
    assert [found[i].token_ids for i in found] == [again[i].token_ids for i in found]
    for prompt in mixed:
        if prompt.row % 2:
            assert found[prompt.row].token_ids == plain[prompt.row]
    # With top-k 1 a sampled row has no choice, so it must accept what a greedy one accepts.
    forced = [Prompt(p.row, p.token_ids, SamplingParams(NEW_TOKENS, 0.7, top_k=1)) for p in greedy]
    found = run(exported.engine, forced, "on")
    assert {i: c.token_ids for i, c in found.items()} == plain
    whole = run(exported.engine, greedy, "on")
    assert [found[i].spec for i in found] == [whole[i].spec for i in found]


def test_a_run_continues_with_the_same_text(exported: Exported, tmp_path: Path) -> None:
    prompts = [list(p.token_ids) for p in make_prompts()]
    pq.write_table(pa.table({"prompt_token_ids": prompts}), tmp_path / "in.parquet")
    arguments = ["run", str(tmp_path / "in.parquet"), "--engine", str(exported.folder)]
    arguments += ["-o", str(tmp_path / "out"), "--token-ids", "--spec", "on", "--part-rows", "3"]
    arguments += ["--max-new-tokens", "20", "--json", "--progress", "none"]
    whole = CliRunner().invoke(main, arguments)
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout)["spec"]["num_accepted_tokens"] > 0
    parts = sorted((tmp_path / "out/data").glob("*.parquet"))
    expected = [pq.read_table(part).to_pylist() for part in parts]
    parts[1].unlink()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["run"]["num_rows"] == 3
    assert [pq.read_table(part).to_pylist() for part in parts] == expected
