"""What is measured is what passes cost, and each row gets the calibration of its temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.decode.algorithm import CostTable, calibration
from dspark_batch.decode.types import (
    DraftBlock,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)
from dspark_batch.engine import costs as measure
from dspark_batch.engine.costs import ensure_costs, measure_costs, read_costs
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.runtimes.session import PaddedShapes


@dataclass
class Timed:
    """An engine whose passes take the time of a formula; `disturbed` passes take ten times that."""

    max_rows: int = 12
    max_tokens: int = 4096
    block_size: int = 5
    vocab_size: int = 50
    padded_shapes: PaddedShapes | None = None
    narrow_block: int | None = None
    disturbed: int = 0
    """One pass in so many; 0 is none."""
    compiles: bool = False
    """Whether the first pass of a size waits for its kernels, and the second for their graph."""
    now: float = 0.0
    num_passes: int = 0
    met: Counter[tuple[str, int, int, int]] = field(default_factory=Counter)
    cached: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)

    def verify_seconds(self, rows: int, tokens: int, longest: int, context: float) -> float:
        reading = rows * context * (0.001 + 0.0005 * (longest - 1))
        return 3.0 + 0.5 * tokens + 0.2 * rows * longest + reading

    def draft_seconds(self, rows: int, taken: float, pending: int) -> float:
        return 1.0 + 0.1 * rows + 0.0002 * rows * taken + 0.003 * pending

    def clock(self) -> float:
        return self.now

    def _pass(self, seconds: float, *size: Any) -> None:
        self.num_passes += 1
        if self.compiles:
            self.now += (100.0, 0.01, 0.0)[min(self.met[size], 2)]
            self.met[size] += 1
            seconds /= 1000  # short enough for a third sweep
        slow = self.disturbed and self.num_passes % self.disturbed == 0
        self.now += seconds * (10.0 if slow else 1.0)

    def admit(self, sequence: RunningRow) -> None:
        assert sequence.slot not in self.cached
        self.cached[sequence.slot] = self.taken[sequence.slot] = 0

    def release(self, sequence: RunningRow) -> None:
        del self.cached[sequence.slot], self.taken[sequence.slot]

    def prefill(self, sequences: list[RunningRow]) -> NDArray[np.int64]:
        self.now += 77.0
        for sequence in sequences:
            self.cached[sequence.slot] = len(sequence.tokens)
        return np.zeros(len(sequences), np.int64)

    def draft_pass(self, sequences: list[RunningRow], width: int | None = None) -> DraftBlock:
        slots = [s.slot for s in sequences]
        pending = sum(self.cached[slot] - self.taken[slot] for slot in slots)
        taken = np.mean([self.taken[slot] for slot in slots])
        seconds = self.draft_seconds(len(slots), float(taken), pending)
        if width is not None:
            assert width == self.narrow_block
            seconds -= 0.04 * len(slots)  # for the slots that it has less
        self._pass(seconds, "draft", len(slots), max(pending, len(slots)))
        for slot in slots:
            self.taken[slot] = self.cached[slot]
        none = np.zeros((len(slots), self.block_size))
        return DraftBlock(
            none.astype(np.int64), none.astype(np.float32), none.sum(axis=1, dtype=int)
        )

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        context = np.mean([s.anchor_position for s in sequences])
        size = len(sequences), plan.num_tokens, plan.longest
        self._pass(self.verify_seconds(*size, float(context)), "target", *size)
        for sequence in sequences:
            self.cached[sequence.slot] += 1
        return VerifyResult(np.zeros(len(sequences), np.int64), np.zeros(len(sequences), np.int64))


def measured(engine: Timed) -> Any:
    table = measure_costs(engine, clock=engine.clock)  # type: ignore[arg-type]
    assert not engine.cached
    return table


@pytest.mark.parametrize("disturbed", [0, 13])
def test_the_table_holds_what_passes_cost(disturbed: int) -> None:
    """Also where it was not measured, and with something else running now and then."""
    engine = Timed(disturbed=disturbed)
    table = measured(engine)
    assert table.rows == (1, 2, 4, 8, 12)
    assert table.tokens_per_row == (1, 2, 4, 6)
    for rows, tokens, longest, context in (
        (1, 1, 1, 128),
        (1, 4, 4, 500),
        (5, 9, 3, 128),
        (8, 13, 6, 700),
        (12, 72, 6, 2000),
        (16, 16, 1, 300),
    ):
        expected = engine.verify_seconds(rows, tokens, longest, context)
        assert table.verify(rows, tokens, longest, context) == pytest.approx(expected)
    assert table.plain(7, 300) == pytest.approx(engine.verify_seconds(7, 7, 1, 300))
    # A pass takes in one token of each row at the least: that is in its price.
    for rows, context in ((1, 128), (6, 128), (12, 900)):
        expected = engine.draft_seconds(rows, context, rows)
        assert table.draft(rows, context=context) == pytest.approx(expected, rel=0.01)
    assert table.intake_seconds == pytest.approx(0.003, rel=0.05)


def test_a_narrow_block_has_a_price_of_its_own() -> None:
    engine = Timed(narrow_block=2)
    table = measured(engine)
    assert table.narrow_block == 2
    for rows, context in ((1, 128), (6, 128), (12, 900)):
        whole = engine.draft_seconds(rows, context, rows)
        assert table.draft(rows, context=context) == pytest.approx(whole, rel=0.01)
        narrow = table.draft(rows, context=context, width=2)
        assert narrow == pytest.approx(whole - 0.04 * rows, rel=0.01)
    assert CostTable.from_json(table.to_json()) == table
    assert measured(Timed()).narrow_block is None


def test_kernels_that_are_compiled_for_a_size_are_not_in_its_price() -> None:
    """They take longer than all sweeps; that must not end the sweeps."""
    found, expected = measured(Timed(compiles=True)), measured(Timed())
    for rows, tokens, longest, context in ((1, 1, 1, 128), (5, 9, 3, 128), (12, 72, 6, 2000)):
        seconds = expected.verify(rows, tokens, longest, context) / 1000
        assert found.verify(rows, tokens, longest, context) == pytest.approx(seconds)
    for rows in (1, 6, 12):
        seconds = expected.draft(rows, context=128) / 1000
        assert found.draft(rows, context=128) == pytest.approx(seconds, rel=0.01)
    assert found.intake_seconds == pytest.approx(expected.intake_seconds / 1000, rel=0.01)


def test_rows_that_cannot_be_long_are_measured_short() -> None:
    table = measured(Timed(max_rows=2, max_tokens=40))
    assert table.context_tokens == 20
    assert table.context_seconds == ()


BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Captured(Timed):
    """Passes are padded to shapes. The first one of a shape takes another time: `capture` more."""

    max_rows: int = 256
    block_size: int = 7
    padded_shapes: PaddedShapes | None = field(
        default_factory=lambda: PaddedShapes(BUCKETS, (1, 2, 4, 8))
    )
    capture: float = 0.06
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def _padded_to(self, rows: int, width: int | None = None) -> float:
        """Seconds of a shape, of its graph and its reading of the caches left out."""
        assert self.padded_shapes is not None
        bucket = next(n for n in self.padded_shapes.rows if n >= rows)
        if width is None:
            shape: tuple[int, ...] = (bucket,)
        else:
            shape = (bucket, next(n for n in self.padded_shapes.tokens_per_row if n >= width))
        if shape not in self.shapes:
            self.shapes.add(shape)
            self.now += self.capture
        cells = bucket * (shape[1] if width else 1)
        return 0.0013 + 2e-6 * cells if width else 0.0004 + 1e-6 * bucket

    def verify_seconds(self, rows: int, tokens: int, longest: int, context: float) -> float:
        return self._padded_to(rows, longest) + 1e-9 * rows * context * longest

    def draft_seconds(self, rows: int, taken: float, pending: int) -> float:
        return self._padded_to(rows) + 1e-8 * pending

    def verify(
        self, sequences: list[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        assert len(set(plan.lengths.tolist())) == 1  # a lone long row costs as all of them do
        return super().verify(sequences, block, plan)


@pytest.mark.parametrize("capture", [0.06, -0.0002])
@pytest.mark.parametrize(
    ("max_rows", "rows"),
    [(256, BUCKETS), (20, (1, 2, 4, 8, 16, 20)), (1, (1,))],
    ids=["256", "20", "1"],
)
def test_of_padded_passes_each_shape_is_measured_once_captured(
    max_rows: int, rows: tuple[int, ...], capture: float
) -> None:
    engine = Captured(max_rows=max_rows, capture=capture)
    table = measured(engine)
    assert table.padded
    assert table.rows == rows
    assert table.tokens_per_row == (1, 2, 4, 8)
    assert table.lone_seconds == table.verify_seconds
    for num_rows in {1, 3, max_rows // 2 + 1, max_rows} & set(range(1, max_rows + 1)):
        bucket = next(n for n in BUCKETS if n >= num_rows)
        assert table.draft(num_rows) == pytest.approx(0.0004 + 1e-6 * bucket, rel=0.02)
        for longest, width in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8)):
            expected = 0.0013 + 2e-6 * bucket * width
            found = table.verify(num_rows, num_rows + longest - 1, longest)
            assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("max_rows", "buckets"), [(256, 9), (20, 6)])
def test_measuring_padded_passes_is_quick(max_rows: int, buckets: int) -> None:
    """Only shapes that a run of so many rows uses are captured, and few passes made of each."""
    engine = Captured(max_rows=max_rows)
    measured(engine)
    assert len(engine.shapes) == 4 * buckets + buckets
    assert max(shape[0] for shape in engine.shapes) == BUCKETS[buckets - 1]
    assert engine.num_passes <= 4 * 4 * buckets + 8 * buckets + 50
    assert engine.now - 77.0 * 5 < 5.0  # `Timed` takes 77 seconds for each of five prefills


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    target = write_target(folder / "target", target_config("llama"))
    return export_pair(folder, target, write_draft(folder / "draft", draft_config()))


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with closing(open_engine(folder)) as engine:
        yield engine


def test_costs_are_measured_once_for_a_machine_and_a_number_of_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with closing(open_engine(folder, max_rows=6)) as engine:
        assert engine.costs is not None
        assert engine.costs.rows[-1] == 4  # the recipe's
        ensure_costs(engine, progress=said.append)
        assert engine.costs.rows == (1, 2, 4, 6)
        assert len(said) == 1
        assert read_costs(folder, engine.hardware_key) == engine.costs
        engine.hardware_key, engine.costs = "another machine", None
        ensure_costs(engine, progress=said.append)
        assert len(said) == 2
    monkeypatch.setattr(measure, "measure_costs", None)  # fails if it is called
    for rows in (2, 6):
        with closing(open_engine(folder, max_rows=rows)) as engine:
            ensure_costs(engine, progress=said.append)
    assert len(said) == 2


def test_an_export_calibrates_greedy_and_sampled_rows(engine: Engine) -> None:
    draft = engine.manifest.draft
    assert draft is not None
    assert [found.rows for found in draft.calibration] == ["greedy", "sampled"]
    for found in draft.calibration:
        assert found.num_rounds > 200
        assert len(found.error_before) == len(found.error_after) == engine.block_size
        assert 0 < max(found.error_before) < 1
    assert draft.sampled_temperatures != draft.confidence_temperatures
    assert engine.sampled_acceptance.tolist() == list(draft.sampled_acceptance)
    assert engine.acceptance.tolist() == list(draft.acceptance)
    assert ((engine.sampled_acceptance > 0) & (engine.sampled_acceptance < 1)).all()


def test_each_row_s_confidence_is_scaled_for_its_temperature(engine: Engine) -> None:
    draft = engine.manifest.draft
    assert draft is not None
    greedy, sampled = (1.0, 2.0, 3.0, 4.0), (0.5, 0.25, 5.0, 6.0)
    rows = []
    for slot, temperature in enumerate((0.0, 0.7, 0.0, 1.0)):
        tokens = np.random.default_rng(slot).integers(1, VOCAB, 9).tolist()
        prompt = Prompt(slot, tuple(tokens), SamplingParams(temperature=temperature, seed=slot))
        rows.append(RunningRow(prompt, slot, tokens, len(tokens)))
        engine.admit(rows[-1])
    engine.prefill(rows)
    raw = engine.draft_raw(rows).confidence
    for sampled_given in (sampled, ()):
        scaled = draft.model_copy(
            update={"confidence_temperatures": greedy, "sampled_temperatures": sampled_given}
        )
        engine.manifest = engine.manifest.model_copy(update={"draft": scaled})
        found = engine.draft(rows).confidence
        for r, own in enumerate((greedy, sampled_given or greedy) * 2):
            np.testing.assert_allclose(found[r], calibration.apply(raw[r], own), rtol=1e-5)
    for row in rows:
        engine.release(row)
