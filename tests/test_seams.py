"""The borders between rooms: what stands on one side has what the other side asks for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decode import Fake
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.bench.forecast.replay import ReplayEngine
from dspark_batch.decode import (
    DecodeEngine,
    DecodeStats,
    DraftBlock,
    EngineWrapper,
    Prompt,
    RunningRow,
    SamplingParams,
    decode,
)
from dspark_batch.drafters import (
    DRAFTERS,
    LOOKUPS,
    FirstOf,
    Lookup,
    LookupInfo,
    draft_graph,
    lookup_source,
)
from dspark_batch.drafters.lookup import LookupSettings, Proposal, Source
from dspark_batch.drafters.table import DraftGraph
from dspark_batch.engine import Engine, open_engine, read_manifest
from dspark_batch.engine.runtimes import Placement, runtime_module
from dspark_batch.engine.runtimes.table import RUNTIMES, RuntimeModule

ASKED = sorted(name for name in vars(DecodeEngine) if not name.startswith("_"))


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("kind", [Engine, ReplayEngine, EngineWrapper, Fake])
def test_every_engine_has_what_the_loop_asks_for(kind: type) -> None:
    source = inspect.getsource(kind)
    for name in ASKED:
        assert hasattr(kind, name) or f"self.{name}" in source, name
        member = getattr(kind, name, None)
        if inspect.isfunction(member):
            assert len(parameters(member)) == len(parameters(getattr(DecodeEngine, name))), name


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_has_what_the_protocol_says(name: str) -> None:
    module = runtime_module(name)
    for asked in (name for name in vars(RuntimeModule) if not name.startswith("_")):
        wanted = parameters(getattr(RuntimeModule, asked))[1:]
        found = parameters(getattr(module, asked))
        assert [p.name for p in found] == [p.name for p in wanted], asked


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_network_writes_a_graph(name: str) -> None:
    kind = draft_graph(name)
    wanted = [p.name for p in parameters(DraftGraph.build)]
    assert [p.name for p in parameters(kind.build)] == wanted


@pytest.mark.parametrize("name", LOOKUPS)
def test_every_lookup_is_a_source_with_settings_that_have_defaults(name: str) -> None:
    kind = lookup_source(name)
    for beside_network in (False, True):
        settings = kind.Settings().settled(beside_network=beside_network)
        info = LookupInfo.untrained(name, settings, block_size=4)
        assert info.settings == settings
        assert LookupInfo.model_validate_json(info.model_dump_json()) == info
        assert np.shape(info.acceptance) == (len(settings.levels), 4)


def texts(folder: Path, prompts: list[Prompt], spec: str) -> dict[int, tuple[int, ...]]:
    engine = open_engine(folder, placement=Placement(device="cpu"))
    found = {c.row: c.token_ids for c in decode(prompts, engine, spec=spec, stats=DecodeStats())}
    engine.close()
    return found


def repeating_prompts() -> list[Prompt]:
    """Rows in which much is said again, greedy and sampled."""
    rng = np.random.default_rng(0)
    begins = [rng.integers(1, 4, n).tolist() * 3 for n in (1, 2, 5, 9)]
    begins += [[7] * 6, rng.integers(1, VOCAB, 12).tolist()]
    return [Prompt(i, tuple(ids), SamplingParams(16)) for i, ids in enumerate(begins)]


@pytest.mark.slow
@pytest.mark.parametrize("beside_network", [False, True])
@pytest.mark.parametrize("name", LOOKUPS)
def test_text_with_any_lookup_is_plain_decoding_s(
    name: str, beside_network: bool, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", target_config("llama", eos_token_id=None))
    section = f'drafter = "{name}"\nblock_size = 3'
    if beside_network:
        draft = write_draft(tmp_path / "draft", draft_config())
        section = f'weights = "{draft}"\nlookup = "{name}"'
    folder = export_pair(tmp_path, target, section)
    prompts = repeating_prompts()
    plain = texts(folder, prompts, "off")
    assert texts(folder, prompts, "on") == texts(folder, prompts, "auto") == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_text_on_any_runtime_is_that_of_onnx_runtime(name: str, tmp_path: Path) -> None:
    if RUNTIMES[name].library:
        pytest.skip("its plan files need a GPU: test_trt_gpu")
    target = write_target(tmp_path / "target", target_config("llama", eos_token_id=None))
    draft = write_draft(tmp_path / "draft", draft_config())
    found = []
    for runtime in ("onnxruntime", name):
        place = tmp_path / runtime
        precision, line = RUNTIMES[runtime].precisions[0], f'runtime = "{runtime}"\n'
        folder = export_pair(place, target, draft, precision=precision, engine=line)
        assert read_manifest(folder).runtime == runtime
        found += [texts(folder, repeating_prompts(), spec) for spec in ("off", "on")]
    assert all(other == found[0] for other in found)


# --- a drafter composed of others -----------------------------------------------------------------


class Constant:
    """Proposes its own token for the rows whose last token it knows."""

    def __init__(self, token: int, knows: set[int]) -> None:
        self.token, self.knows = token, knows
        self.asked: list[list[int]] = []
        self.released: list[int] = []

    def draft(self, rows: list[RunningRow], width: int | None = None) -> DraftBlock:
        self.asked.append([row.slot for row in rows])
        known = np.array([row.tokens[-1] in self.knows for row in rows], int)
        block = DraftBlock.empty(len(rows), 2)
        return DraftBlock(
            block.tokens + self.token,
            block.confidence + self.token,
            2 * known,
            7 * known,
            known > 0,
        )

    def release(self, slot: int) -> None:
        self.released.append(slot)


def rows_of(*last: int) -> list[RunningRow]:
    return [
        RunningRow(Prompt(slot, (token,), SamplingParams()), slot, [token], 1)
        for slot, token in enumerate(last)
    ]


def test_each_drafter_is_asked_for_what_those_ahead_of_it_left() -> None:
    first, second, last = Constant(1, {1}), Constant(2, {1, 2}), Constant(3, {1, 2, 3})
    block = FirstOf(first, second, last).draft(rows_of(3, 1, 2, 9, 1))
    assert block.tokens[:, 0].tolist() == [3, 1, 2, 3, 1]
    assert block.lengths.tolist() == [2, 2, 2, 0, 2]
    assert block.evidence is not None
    assert block.evidence.tolist() == [0, 7, 7, 0, 7]
    assert block.looked_up.tolist() == [False, True, True, False, True]
    assert [drafter.asked for drafter in (first, second, last)] == [
        [[0, 1, 2, 3, 4]],
        [[0, 2, 3]],
        [[0, 3]],
    ]


def test_a_drafter_alone_has_nothing_ahead_of_it() -> None:
    block = FirstOf(Constant(1, {1})).draft(rows_of(1, 2))
    assert block.evidence is None
    assert not block.looked_up.any()
    assert block.certain is not None
    assert block.certain.tolist() == [True, False]


def test_nobody_is_asked_for_no_rows_and_all_are_told_of_an_end() -> None:
    first, last = Constant(1, {1}), Constant(3, {3})
    drafter = FirstOf(first, last)
    drafter.draft(rows_of(1, 1))
    drafter.release(5)
    assert last.asked == []
    assert first.released == last.released == [5]
    assert drafter.last is last


# --- a new kind of lookup is a class and a line ---------------------------------------------------


class Counting(Source):
    """Proposes the numbers that follow the row's last token."""

    Settings = LookupSettings

    def __init__(self, settings: LookupSettings, *, block_size: int) -> None:
        self._block_size = block_size

    def propose(self, row: RunningRow) -> Proposal | None:
        after = [(row.tokens[-1] + 1 + k) % VOCAB for k in range(self._block_size)]
        return Proposal(after, level=1) if row.tokens[-1] % 2 else None


@pytest.mark.slow
@pytest.mark.parametrize("beside_network", [False, True])
def test_a_new_kind_of_lookup_is_exported_and_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside_network: bool
) -> None:
    monkeypatch.setitem(LOOKUPS, "counting", f"{__name__}:Counting")
    target = write_target(tmp_path / "target", target_config("llama", eos_token_id=None))
    section = 'drafter = "counting"\nblock_size = 3'
    if beside_network:
        draft = write_draft(tmp_path / "draft", draft_config())
        section = f'weights = "{draft}"\nlookup = "counting"'
    folder = export_pair(tmp_path, target, section)
    prompts = [Prompt(i, (3 + 2 * i, 5 + i), SamplingParams(12)) for i in range(4)]
    found = {}
    for spec in ("off", "on"):
        engine = open_engine(folder)
        found[spec] = {c.row: c for c in decode(prompts, engine, spec=spec, stats=DecodeStats())}
        engine.close()
    texts = [{row: c.token_ids for row, c in done.items()} for done in found.values()]
    assert texts[0] == texts[1]
    counts = [c.spec for c in found["on"].values()]
    assert sum(c.num_draft_tokens for c in counts) > 0
    assert bool(sum(c.num_looked_up_tokens for c in counts)) == beside_network
    info = open_engine(folder).manifest.draft
    assert info is not None
    assert info.lookup is not None
    assert isinstance(Lookup(info.lookup)._source, Counting)
