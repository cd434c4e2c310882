"""Simulated decoding takes the rounds of real decoding, and its clock adds up the cost table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from agreeing import write_agreeing_pair
from tiny import VOCAB, export_pair

from dspark_batch.bench.forecast.replay import ReplayEngine
from dspark_batch.bench.forecast.rounds import Rounds, read_rounds, record, write_rounds
from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Completion, DraftBlock, Prompt, SamplingParams
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.errors import InputError

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
CHEAP = CostTable.measured(
    [1, 4], [1, 2, 5], verify_seconds=[[1, 1.1, 1.5], [2, 2.6, 4]], draft_seconds=[0.1, 0.3]
)
DEAR = CostTable.measured(
    [1, 4], [1, 2, 5], verify_seconds=[[1, 1.1, 1.5], [2, 2.6, 4]], draft_seconds=[0.3, 0.8]
)
PADDED = CostTable.from_json(CHEAP.to_json() | {"padded": True})

KINDS = ["stops", "endless", "lookup", "both"]
LOOKUP = 'drafter = "ngram"\nblock_size = 4'


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pair whose rows may stop, one whose rows never do, a draft of varying length, and both."""
    folder = tmp_path_factory.mktemp("pair")
    target, draft = write_agreeing_pair(folder, stops=request.param != "endless")
    proposes = {"lookup": LOOKUP, "both": f'weights = "{draft}"'}.get(request.param, draft)
    engine = open_engine(export_pair(folder, target, proposes))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(row, tuple(rng.integers(1, VOCAB, 3 + row).tolist()), SamplingParams(NEW_TOKENS))
        for row in range(14)
    ]


@pytest.fixture(scope="module")
def rounds(engine: Engine, prompts: list[Prompt]) -> Rounds:
    return record(engine, prompts)


def decoded(engine: Any, prompts: Any, spec: str, scheduler: str | None = None) -> list[Completion]:
    done = decode(prompts, engine, spec=spec, scheduler=scheduler, stats=DecodeStats())
    return sorted(done, key=lambda c: c.row)


def replayed(
    rounds: Rounds, costs: CostTable, spec: str, scheduler: str | None = None, **options: int
) -> list[Completion]:
    """Every recorded row once, in its order, on as many slots as the tiny engine has."""
    engine = ReplayEngine(rounds, costs, max_rows=4, **options)
    return decoded(engine, engine.prompts(), spec, scheduler)


def test_a_record_holds_the_plain_text_s_lengths(
    engine: Engine, prompts: list[Prompt], rounds: Rounds
) -> None:
    plain = decoded(engine, prompts, "off")
    assert min(len(c.token_ids) for c in plain) > 1  # no row is left out
    assert rounds.num_new_tokens.tolist() == [len(c.token_ids) for c in plain]
    assert rounds.num_prompt_tokens.tolist() == [c.num_prompt_tokens for c in plain]
    assert rounds.stopped.tolist() == [c.finish_reason == "stop" for c in plain]
    assert rounds.stopped.any() == bool(engine.stop_token_ids)
    num_anchors = int((rounds.num_new_tokens - 1).sum())
    assert rounds.num_accepted.shape == (num_anchors,)
    assert rounds.confidence.shape == (num_anchors, engine.block_size)
    assert set(rounds.num_accepted.tolist()) == set(range(engine.block_size + 1))
    varies = engine.manifest.draft is not None and engine.manifest.draft.drafter == "ngram"
    assert rounds.num_drafted.min() == (0 if varies else engine.block_size)
    lookup = engine.manifest.draft is not None and engine.manifest.draft.lookup is not None
    assert rounds.matches.any() == (lookup and not varies)


def test_a_recorded_block_is_the_one_drafted_from_that_prefix(
    engine: Engine, prompts: list[Prompt], rounds: Rounds
) -> None:
    """The first round of `on`, begun at any place of a text, accepts what the record says."""
    text = decoded(engine, prompts[2:3], "off")[0].token_ids
    first = rounds.first_anchors[2]
    for position in (0, 1, 5, 17, 30):
        # With all tokens up to the anchor's as the prompt, the prefill gives the anchor.
        prefix = (*prompts[2].token_ids, *text[:position])
        allowed = len(text) - position
        prompt = Prompt(0, prefix, SamplingParams(allowed))
        seen = Seen(engine)
        decoded(seen, [prompt], "on")
        most = min(engine.block_size, allowed - 2)
        assert seen.first_accepted == min(rounds.num_accepted[first + position], most)
        np.testing.assert_allclose(
            seen.first_confidence, rounds.confidence[first + position], atol=1e-5
        )


class Seen:
    """An engine of which the first round is kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.first_confidence: Any = None
        self.first_accepted: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: Any, width: int | None = None) -> Any:
        block = self._engine.draft(sequences)
        if self.first_confidence is None:
            self.first_confidence = block.confidence[0]
        return block

    def verify(self, sequences: Any, block: Any, plan: Any) -> Any:
        result = self._engine.verify(sequences, block, plan)
        if self.first_accepted is None:
            self.first_accepted = int(result.num_accepted[0])
        return result


@pytest.mark.parametrize("costs", [CHEAP, DEAR, PADDED], ids=["cheap", "dear", "padded"])
@pytest.mark.parametrize(
    ("spec", "scheduler"),
    [
        ("off", None),
        ("on", None),
        ("on", "early-stop"),
        ("on", "async"),
        ("on", "threshold"),
        ("auto", None),
        ("auto", "async"),
    ],
)
def test_a_simulated_row_takes_the_real_row_s_rounds(
    engine: Engine,
    prompts: list[Prompt],
    rounds: Rounds,
    spec: str,
    scheduler: str | None,
    costs: CostTable,
) -> None:
    """Row by row: rounds, drafts, verified and accepted tokens, under the same cost table."""
    engine.costs = costs
    real = decoded(engine, prompts, spec, scheduler)
    found = replayed(rounds, costs, spec, scheduler)
    assert [len(c.token_ids) for c in found] == [len(c.token_ids) for c in real]
    assert [c.spec for c in found] == [c.spec for c in real]


def test_the_compared_schedules_are_of_every_kind(rounds: Rounds) -> None:
    """Else the comparison above would prove little."""
    whole = [c.spec for c in replayed(rounds, CHEAP, "on")]
    cheap = [c.spec for c in replayed(rounds, CHEAP, "on", "early-stop")]
    dear = [c.spec for c in replayed(rounds, DEAR, "auto")]
    verified = [sum(s.num_verified_tokens for s in run) for run in (whole, cheap, dear)]
    assert verified[0] > max(verified[1:]) > 0  # shorter plans
    if rounds.matches.any():
        return  # most is looked up, which costs nothing: dear drafts are hardly dearer
    assert verified[1] > verified[2]
    drafted = sum(s.num_draft_tokens for s in dear)
    assert 0 < drafted < 4 * sum(s.num_rounds for s in dear)  # and rounds without a draft


def test_a_shorter_block_takes_the_rounds_of_a_draft_that_proposes_less(
    engine: Engine, prompts: list[Prompt], rounds: Rounds
) -> None:
    found = replayed(rounds, CHEAP, "on", block_size=2)
    real = decoded(Shortened(engine, 2), prompts, "on")
    assert [c.spec for c in found] == [c.spec for c in real]
    assert sum(c.spec.num_rounds for c in found) > sum(
        c.spec.num_rounds for c in replayed(rounds, CHEAP, "on")
    )


class Shortened:
    """An engine that drafts whole blocks and proposes their first tokens only."""

    def __init__(self, engine: Engine, block_size: int) -> None:
        self._engine = engine
        self.block_size = block_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: Any, width: int | None = None) -> DraftBlock:
        block, size = self._engine.draft(sequences), self.block_size
        return replace(
            block,
            tokens=block.tokens[:, :size],
            confidence=block.confidence[:, :size],
            lengths=np.minimum(block.lengths, size),
        )


def test_a_record_survives_its_file(rounds: Rounds, tmp_path: Path) -> None:
    write_rounds(tmp_path / "rounds.parquet", rounds)
    again = read_rounds(tmp_path / "rounds.parquet")
    for name in Rounds.__slots__:
        ours, theirs = getattr(rounds, name), getattr(again, name)
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(theirs, ours, strict=True)
        else:
            assert theirs == ours


def test_another_file_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(InputError, match=r"(?s)holds no recorded rounds.*bench --simulate"):
        read_rounds(path)
    with pytest.raises(InputError, match="cannot read"):
        read_rounds(tmp_path / "absent.parquet")


def test_rows_of_one_token_are_left_out(engine: Engine, prompts: list[Prompt]) -> None:
    short = [replace(prompt, params=SamplingParams(1)) for prompt in prompts[:2]]
    mixed = [*short, *prompts[2:4]]
    assert len(record(engine, mixed).num_new_tokens) == 2
    with pytest.raises(InputError, match="nothing to record"):
        record(engine, short)
