"""A lookup beside a network: who proposes for which row, and that no text depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreeing import write_agreeing_pair
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit
from tiny import VOCAB, export_pair

from dspark_batch.decode.algorithm import calibration
from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.schedule import open_schedule
from dspark_batch.decode.types import Completion, DraftBlock, Prompt, SamplingParams
from dspark_batch.decode.types import RunningRow as Row
from dspark_batch.drafters.ngram import longest_match, text_from_tokens
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.manifest import DraftInfo, read_manifest
from dspark_batch.export.probes import TargetProbe

NEW_TOKENS, GAMMA = 30, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of one target: both, and each draft alone."""
    folder = tmp_path_factory.mktemp("hybrid")
    target, draft = write_agreeing_pair(folder, stops=False)
    sections = {
        "both": f'weights = "{draft}"',
        "network": f'weights = "{draft}"\nlookup = "none"',
        "eager": f'weights = "{draft}"\nshortest_match = 1',
        "lookup": f'drafter = "ngram"\nblock_size = {GAMMA}\nshortest_match = 2',
    }
    return {name: export_pair(folder / name, target, lines) for name, lines in sections.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    found = {name: open_engine(folder) for name, folder in folders.items()}
    yield found
    for engine in found.values():
        engine.close()


def make_prompts(**params: Any) -> list[Prompt]:
    """Rows that repeat themselves and rows that do not, in turn."""
    rng = np.random.default_rng(0)
    texts = []
    for size in (3, 9, 5, 12):
        texts += [rng.integers(1, VOCAB, size).tolist() * 3, rng.permutation(VOCAB)[:20].tolist()]
    return [Prompt(i, tuple(t), SamplingParams(NEW_TOKENS, **params)) for i, t in enumerate(texts)]


def run(engine: Engine, prompts: Sequence[Prompt], spec: str, **options: Any) -> list[Completion]:
    done = decode(prompts, engine, spec=spec, stats=DecodeStats(), **options)
    return sorted(done, key=lambda c: c.row)


def texts(done: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in done]


@contextmanager
def standing(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
    """Prefilled rows. The anchor is what comes next in a row that repeats itself."""
    rows = [
        Row(p, slot=slot, tokens=list(p.token_ids), num_prompt_tokens=len(p.token_ids))
        for slot, p in enumerate(prompts)
    ]
    for sequence in rows:
        engine.admit(sequence)
    try:
        engine.prefill(rows)
        for sequence in rows:
            sequence.tokens.append(sequence.tokens[0])
        yield rows
    finally:
        for sequence in rows:
            engine.release(sequence)


def first_blocks(engine: Engine, prompts: Sequence[Prompt]) -> DraftBlock:
    with standing(engine, prompts) as rows:
        return engine.draft(rows)


def test_both_are_in_the_manifest_and_another_lookup_is_another_engine(
    folders: dict[str, Path],
) -> None:
    drafts = {name: read_manifest(folder).draft for name, folder in folders.items()}
    both, network, lookup = (drafts[name] for name in ("both", "network", "lookup"))
    assert both is not None
    assert network is not None
    assert lookup is not None
    assert (both.has_network, network.has_network, lookup.has_network) == (True, True, False)
    assert network.lookup is None
    assert both.lookup is not None
    levels = both.lookup.settings.levels
    assert (both.lookup.drafter, levels[0], levels[-1]) == (("ngram", 2, 8))
    assert np.shape(both.lookup.acceptance) == (7, GAMMA)
    assert len(set(np.ravel(both.lookup.acceptance))) > 3  # measured
    assert both.block_size == network.block_size == GAMMA


def test_each_row_is_proposed_what_its_match_or_the_network_says(
    engines: dict[str, Engine],
) -> None:
    """The lookup's own block where the row's last two tokens occurred before, else the network's.

    A row that repeats itself is proposed its own continuation.
    """
    pattern = [5, 9, 17, 3, 22]
    tokens = [pattern * 3, [7, 2, 30, 11, 4], [8, 6, 8, 6], [1, 2, 3, 4, 5, 6]]
    prompts = [Prompt(i, tuple(t), SamplingParams()) for i, t in enumerate(tokens)]
    with standing(engines["both"], prompts) as rows:
        block, networks = engines["both"].draft(rows), engines["both"].draft_pass(rows)
    assert block.evidence is not None
    expected = [longest_match(text_from_tokens(s.tokens), shortest=2, longest=8) for s in rows]
    assert block.evidence.tolist() == [match.size if match else 0 for match in expected]
    assert block.looked_up.tolist() == [True, False, True, False]
    assert block.tokens[0].tolist() == pattern[1:]
    assert block.tokens[2].tolist() == [6, 8, 6, 8]
    assert block.lengths.tolist() == [GAMMA] * 4
    assert block.tokens[0].tolist() != networks.tokens[0].tolist()


def test_a_row_without_a_match_gets_the_network_s_block(engines: dict[str, Engine]) -> None:
    prompts = make_prompts()[:4]
    both, alone = (first_blocks(engines[name], prompts) for name in ("both", "network"))
    for r in (1, 3):
        assert not both.looked_up[r]
        assert both.tokens[r].tolist() == alone.tokens[r].tolist()


def test_a_row_s_block_does_not_depend_on_its_neighbours(engines: dict[str, Engine]) -> None:
    prompts = make_prompts()[:4]
    together = first_blocks(engines["both"], prompts)
    assert together.evidence is not None
    assert 0 < together.looked_up.sum() < 4
    for r, prompt in enumerate(prompts):
        alone = first_blocks(engines["both"], [prompt])
        assert alone.evidence is not None
        assert alone.tokens[0].tolist() == together.tokens[r].tolist()
        assert alone.evidence[0] == together.evidence[r]
        np.testing.assert_allclose(alone.confidence[0], together.confidence[r], atol=1e-5)


def test_a_looked_up_block_has_the_table_s_confidence(engines: dict[str, Engine]) -> None:
    """Whatever temperatures the network's logits are given."""
    engine = engines["both"]
    draft = engine.manifest.draft
    assert draft is not None
    assert draft.lookup is not None
    block = first_blocks(engine, make_prompts()[:4])
    assert block.evidence is not None
    assert block.looked_up.tolist() == [True, False] * 2
    for r in np.flatnonzero(block.looked_up):
        table = draft.lookup.acceptance[block.evidence[r] - draft.lookup.settings.levels[0]]
        np.testing.assert_allclose(block.confidence[r], table, atol=1e-5)


@pytest.mark.parametrize("scheduler", [None, "early-stop", "async", "threshold", "whole"])
@pytest.mark.parametrize("spec", ["on", "auto"])
def test_greedy_text_is_plain_decoding_s(
    engines: dict[str, Engine], spec: str, scheduler: str | None
) -> None:
    plain = texts(run(engines["both"], make_prompts(), "off"))
    assert texts(run(engines["both"], make_prompts(), spec, scheduler=scheduler)) == plain


def test_both_together_take_fewer_rounds_than_either(engines: dict[str, Engine]) -> None:
    prompts = make_prompts()
    rounds = {
        name: sum(c.spec.num_rounds for c in run(engines[name], prompts, "on"))
        for name in ("both", "network", "lookup")
    }
    assert rounds["both"] < min(rounds["network"], rounds["lookup"])


def test_blocks_of_the_lookup_are_counted(engines: dict[str, Engine]) -> None:
    """Rows that repeat themselves have more of them than others; a draft alone has none."""
    counts = [c.spec for c in run(engines["both"], make_prompts(), "on")]
    assert all(s.num_looked_up_tokens % GAMMA == 0 for s in counts)
    assert 0 < sum(s.num_looked_up_tokens for s in counts) < sum(s.num_draft_tokens for s in counts)
    for name in ("network", "lookup"):
        alone = run(engines[name], make_prompts(), "on")
        assert not any(c.spec.num_looked_up_tokens for c in alone)


def test_a_draft_pass_is_made_for_the_network_s_rows_only(engines: dict[str, Engine]) -> None:
    """And what a row took in counts only where one was."""
    engine, passes = engines["both"], []
    runtime = engine._runtime
    draft = runtime.draft

    def noted(slots: list[int], *arguments: Any) -> DraftBlock:
        passes.append(len(slots))
        return draft(slots, *arguments)

    seen: list[tuple[int, int]] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def draft(self, sequences: list[Row], width: int | None = None) -> DraftBlock:
            for s in sequences:
                taken = runtime._rows[s.slot].num_taken  # type: ignore[attr-defined]
                assert taken == s.num_taken
            before = len(passes)
            block = engine.draft(sequences)
            seen.append((int((~block.looked_up).sum()), sum(passes[before:])))
            return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "draft", noted)
        list(decode(make_prompts(), Watched(), spec="on", stats=DecodeStats()))  # type: ignore[arg-type]
    assert all(own == drafted for own, drafted in seen)
    assert {own for own, _ in seen} >= {0, 1, 2}


@pytest.mark.slow
def test_sampled_rows_have_the_target_s_law(engines: dict[str, Engine]) -> None:
    """Three tokens against their exact law, some proposed by the network, some looked up.

    A match is of one token here, in a prompt that the target said itself: so it would often say
    again what is proposed.
    """
    number, params = 1800, SamplingParams(3, temperature=1.0, top_k=3)
    engine = engines["eager"]
    begin = (3, 4, 11)
    (said,) = run(engine, [Prompt(0, begin, SamplingParams(24))], "off")
    prompt = begin + said.token_ids
    done = run(engine, [Prompt(r, prompt, replace(params, seed=r)) for r in range(number)], "on")
    looked_up = [c.spec for c in done if c.spec.num_looked_up_tokens]
    assert 0.2 < len(looked_up) / number < 0.9
    assert sum(s.num_accepted_tokens for s in looked_up) > 50
    law = {(): 1.0}
    for _ in range(3):
        contexts = list(law)
        for context, probs in zip(contexts, next_token(engine, prompt, contexts), strict=True):
            so_far = law.pop(context)
            law |= {(*context, int(t)): so_far * probs[t] for t in np.flatnonzero(probs)}
    counts = Counter(texts(done))
    assert set(counts) <= set(law)
    assert min(law.values()) * number > 5
    found, expected = zip(*((counts[text], number * p) for text, p in law.items()), strict=True)
    assert stats.chisquare(found, expected).pvalue > 1e-3


def next_token(
    engine: Engine, prompt: tuple[int, ...], contexts: Sequence[tuple[int, ...]]
) -> list[NDArray[np.float64]]:
    """The law of what follows each, at temperature 1 among the three likeliest tokens."""
    target = engine.folder / "target.onnx"
    probe = TargetProbe(target, engine.manifest.target.cache, capacity=len(prompt) + 8)
    rows = [(*prompt, *context) for context in contexts]
    logits, _, _ = probe.run(rows, [0] * len(rows), probe.empty(len(rows)))
    found = []
    for row in logits:
        last = row[-1].astype(np.float64)
        weights = np.where(last >= np.sort(last)[-3], np.exp(last - last.max()), 0.0)
        found.append(weights / weights.sum())
    return found


def test_a_looked_up_block_of_a_sampled_row_has_the_sampled_table_s_confidence(
    engines: dict[str, Engine],
) -> None:
    draft = engines["both"].manifest.draft
    assert draft is not None
    assert draft.lookup is not None
    assert draft.lookup.acceptance != draft.lookup.sampled_acceptance
    block = first_blocks(engines["both"], make_prompts(temperature=1.0)[:4])
    assert block.evidence is not None
    assert block.looked_up.tolist() == [True, False] * 2
    for r in np.flatnonzero(block.looked_up):
        table = draft.lookup.sampled_acceptance[block.evidence[r] - draft.lookup.settings.levels[0]]
        np.testing.assert_allclose(block.confidence[r], table, atol=1e-5)


# --- what it is worth, and what it costs ---------------------------------------------------------


def rounds_of(matches: Sequence[int], accepted: Sequence[int]) -> calibration.Rounds:
    logits = np.tile(np.linspace(2.0, -1.0, GAMMA, dtype=np.float32), (len(matches), 1))
    return calibration.Rounds(
        logits, np.array(accepted), np.arange(len(matches)), np.array(matches)
    )


def test_temperatures_are_of_the_network_s_rounds() -> None:
    """Looked up blocks are rated by their table, whatever the network's rounds say."""
    rng = np.random.default_rng(0)
    matches, accepted = rng.integers(0, 3, 4000), rng.integers(0, GAMMA + 1, 4000)
    found = rounds_of(matches.tolist(), accepted.tolist())
    own = found.evidence == 0
    report = calibration.calibrated(found, scaled=own)
    fitted = found.where(own & (found.rows % 2 == 0))
    np.testing.assert_array_equal(
        report.temperatures, calibration.fit(fitted.logits, fitted.accepted)
    )
    assert set(report.temperatures) != {1.0}
    held_out = found.where(found.rows % 2 == 1)
    by_round = np.where(held_out.evidence[:, None] == 0, report.temperatures, 1.0)
    np.testing.assert_allclose(report.error_after, held_out.errors(by_round))
    assert report.num_rounds == 4000
    np.testing.assert_allclose(report.acceptance, found.acceptance)


def test_the_schedule_pays_for_the_passes_that_were_made(engines: dict[str, Engine]) -> None:
    """Rows that were looked up cost no pass, and what is expected of the next rounds says so."""
    costs = CostTable.measured(
        [1, 4], [1, 2, 5], verify_seconds=[[1, 1.1, 1.5], [2, 2.6, 4]], draft_seconds=[0.5, 2.0]
    )

    class Priced:
        block_size = GAMMA
        acceptance = sampled_acceptance = np.full(GAMMA, 0.5)

        def __init__(self) -> None:
            self.costs = costs

    rows = [
        Row(Prompt(i, (1,) * 9, SamplingParams()), slot=i, tokens=[1] * 9, num_prompt_tokens=9)
        for i in range(4)
    ]
    spent = []
    for matches in (None, [0, 3, 0, 5], [2, 3, 4, 5]):
        schedule: Any = open_schedule(Priced(), "on", scheduler="early-stop")  # type: ignore[arg-type]
        block = DraftBlock(
            np.ones((4, GAMMA), np.int64),
            np.full((4, GAMMA), 0.8, np.float32),
            np.full(4, GAMMA),
            None if matches is None else np.array(matches),
        )
        schedule.plan(schedule.drafts(rows), block)
        spent.append((schedule._draft_seconds, schedule._outlook.share_passing))
    seconds, shares = zip(*spent, strict=True)
    np.testing.assert_allclose(seconds, [2.0, 1.0, 0.0])
    assert shares == (1.0, 0.5, 0.0)
    assert costs.draft(0) == 0.0
    assert costs.draft(0.5) == pytest.approx(0.25)


def test_a_calibrated_table_is_what_the_rounds_show(folders: dict[str, Path]) -> None:
    from dspark_batch.drafters import lookup

    draft = read_manifest(folders["both"]).draft
    assert isinstance(draft, DraftInfo)
    assert draft.lookup is not None
    found = rounds_of([0, 2, 2, 2, 2], [4, 4, 4, 0, 1])
    learnt = lookup.learnt(draft.lookup, greedy=lookup.observed(found), sampled=[])
    first = learnt.acceptance[0]
    # Two rounds of a half each, and of four seen 3, of three 2, then all.
    np.testing.assert_allclose(first, [4 / 6, 3 / 5, 3 / 4, 3 / 4])
    rated = lookup.rated(learnt, found, sampled=False)
    np.testing.assert_array_equal(rated.logits[0], found.logits[0])
    np.testing.assert_allclose(expit(rated.logits[1:]), [first] * 4, atol=1e-6)
