"""Rooflines, the clock, the figures and what 100 queries become, by numbers done by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark_batch.bench.forecast.catalogue import DTYPE_BYTES, GPUS, PAIRS
from dspark_batch.bench.forecast.figures import draw_figures, frontier, queries, throughput
from dspark_batch.bench.forecast.machines import measured_machine, roofline_machine
from dspark_batch.bench.forecast.replay import (
    ReplayEngine,
    Simulated,
    Strategy,
    simulate,
    strategies,
)
from dspark_batch.bench.forecast.roofline import Roofline
from dspark_batch.bench.forecast.rounds import Block, Rounds, num_matching
from dspark_batch.bench.forecast.simulation import Simulation, run_simulation
from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import RunningRow as Row
from dspark_batch.decode.types import VerifyPlan
from dspark_batch.errors import UsageError

BLOCK = 3
# A row a millisecond dearer than none, a token half of one; drafts cost 1 ms and 0.2 ms a row.
COSTS = CostTable.measured(
    [1, 8],
    [1, 2, 4],
    verify_seconds=[[(r + 0.5 * r * t) * 1e-3 for t in (1, 2, 4)] for r in (1, 8)],
    draft_seconds=[(1 + 0.2 * r) * 1e-3 for r in (1, 8)],
)


def made_up(
    accepted: list[int], *, confidence: float = 0.9, num_rows: int = 5, num_prompt_tokens: int = 6
) -> Rounds:
    """Rows of which position i accepts `accepted[i]`; 13 new tokens for 12 positions."""
    length = len(accepted) + 1
    logits = np.full((num_rows * (length - 1), BLOCK), np.log(confidence / (1 - confidence)))
    return Rounds(
        num_prompt_tokens=np.full(num_rows, num_prompt_tokens),
        max_new_tokens=np.full(num_rows, length),
        num_new_tokens=np.full(num_rows, length),
        stopped=np.zeros(num_rows, np.bool_),
        num_drafted=np.full(len(logits), BLOCK),
        num_accepted=np.tile(accepted, num_rows),
        matches=np.zeros(len(logits), np.int64),
        confidence_logits=logits.astype(np.float32),
        temperatures=(1.0,) * BLOCK,
        acceptance=(confidence,) * BLOCK,
        origin=dict.fromkeys(("engine", "target", "draft", "precision", "hardware"), "made up"),
    )


def the(name: str) -> Strategy:
    return next(s for s in strategies(BLOCK) if s.name == name)


def test_strategies_are_plain_fixed_and_auto() -> None:
    names = ["plain", "fixed 7", "fixed 4", "fixed 2", "early-stop", "auto"]
    assert [s.name for s in strategies(7)] == names
    assert [s.name for s in strategies(2)] == ["plain", "fixed 2", "early-stop", "auto"]
    assert [(s.spec, s.block_size) for s in strategies(7)[:3]] == [("off", 7), ("on", 7), ("on", 4)]


def test_plain_time_is_a_prefill_and_a_pass_per_token() -> None:
    found = simulate(made_up([0] * 12), COSTS, the("plain"), num_rows=1)
    # 12 passes of one token, and a pass over the prompt's six: 1.5 ms each, and 4 ms.
    assert found.tokens_per_second == pytest.approx(13 / (12 * 1.5e-3 + 4e-3))
    assert found.prefill_share == pytest.approx(4 / 22)
    assert (found.accepted_length, found.num_verified, found.drafted) == (1.0, 0.0, 0.0)
    assert found.draft_share == 0.0


def test_fixed_time_is_a_draft_and_a_pass_per_round() -> None:
    # Rounds begin at positions 0, 4 and 8, and verify three tokens each.
    rounds = made_up([3, 0, 0, 0] * 3)
    found = simulate(rounds, COSTS, the("fixed 3"), num_rows=1)
    seconds = 3 * (1.2e-3 + 3e-3) + 4e-3
    assert found.tokens_per_second == pytest.approx(13 / seconds)
    assert found.accepted_length == 4.0
    assert found.num_verified == pytest.approx(3.0)
    assert found.draft_share == pytest.approx(3 * 1.2e-3 / seconds)


def test_a_full_batch_shares_its_passes() -> None:
    rounds = made_up([0] * 12)
    found = simulate(rounds, COSTS, the("plain"), num_rows=8)
    # Rows of equal length end together: eight prompts of six tokens in one pass.
    seconds = 12 * (8 + 0.5 * 8) * 1e-3 + (8 + 0.5 * 48) * 1e-3
    assert found.tokens_per_second == pytest.approx(8 * 13 / seconds)
    assert found.row_tokens_per_second == pytest.approx(13 / seconds)


def test_only_full_rounds_and_later_admissions_are_steady() -> None:
    rounds = replace(
        made_up([0] * 12, num_rows=2),
        num_new_tokens=np.array([13, 2]),
        num_accepted=np.zeros(13, np.int64),
        num_drafted=np.full(13, BLOCK),
        confidence_logits=np.zeros((13, BLOCK), np.float32),
        stopped=np.array([False, True]),
    )
    engine = ReplayEngine(rounds, COSTS, order=np.array([0, 1, 1, 0]), max_rows=2)
    done = decode(engine.prompts(), engine, spec="off", stats=DecodeStats())  # type: ignore[arg-type]
    assert [len(c.token_ids) for c in done] == [2, 2, 13, 13]
    # The long rows overlap for 10 rounds, each short one takes one, and two are left at the end.
    assert engine.steady.num_row_rounds == engine.steady.num_committed == 2 * 12
    assert engine.steady.verify_seconds == pytest.approx(12 * (2 + 0.5 * 2) * 1e-3)
    assert engine.refills.num_rows == 2
    assert engine.refills.seconds == pytest.approx(2 * (1 + 0.5 * 6) * 1e-3)


def test_a_text_that_ends_inside_a_block_commits_no_bonus() -> None:
    rounds = made_up([0] * 10 + [2, 1], num_rows=1)
    rounds = replace(rounds, stopped=np.array([True]), max_new_tokens=np.array([99]))
    engine = ReplayEngine(rounds, COSTS, max_rows=1)
    (done,) = decode(engine.prompts(), engine, spec="on", stats=DecodeStats())  # type: ignore[arg-type]
    assert (len(done.token_ids), done.finish_reason, done.spec.num_rounds) == (13, "stop", 11)
    assert engine.steady.num_committed == 12
    assert engine.steady.num_row_rounds == 11


def test_a_round_without_a_draft_pays_for_none() -> None:
    engine = ReplayEngine(made_up([0] * 12), COSTS, max_rows=1)
    prompt = next(engine.prompts())
    row = Row(prompt, 0, tokens=[0, 0], num_prompt_tokens=1)
    block = engine.draft([row])
    engine.verify([row], block, VerifyPlan(np.array([2])))
    engine.verify([row], None, VerifyPlan(np.array([0])))
    assert engine.steady.draft_seconds == pytest.approx(1.2e-3)
    assert (engine.steady.num_drafted, engine.steady.num_row_rounds) == (1, 2)


def test_a_block_agrees_as_far_as_it_was_proposed() -> None:
    logits = np.zeros(3, np.float32)
    blocks = [
        Block(np.array([5, 6, 7]), logits, 3),  # the text goes on 5, 6, 8
        Block(np.array([6, 8, 9]), logits, 1),
        Block(np.array([9, 9, 9]), logits, 3),
        Block(np.array([9, 9, 9]), logits, 3),  # the text ends after one more
    ]
    assert num_matching(blocks, [4, 5, 6, 8, 9]).tolist() == [2, 1, 0, 1]


def test_auto_is_as_good_as_the_better_of_plain_and_fixed() -> None:
    for accepted, confidence in (([3, 3, 3, 3] * 3, 0.98), ([0] * 12, 0.02)):
        rounds = made_up(accepted, confidence=confidence)
        plain, fixed, auto = (
            simulate(rounds, COSTS, the(name), num_rows=4).tokens_per_second
            for name in ("plain", "fixed 3", "auto")
        )
        assert abs(fixed / plain - 1) > 0.2
        assert auto == pytest.approx(max(plain, fixed), rel=0.05)


def test_pairs_have_the_parameters_of_the_published_models() -> None:
    """The drafts without embedding and head, as counted on the published checkpoints' configs."""
    counted = {
        "qwen3-4b": (4_022_468_096, 615_221_249),
        "qwen3-8b": (8_190_735_360, 1_126_422_017),
        "qwen3-14b": (14_768_307_200, 1_860_438_529),
        "smollm2-135m": (134_515_008, None),
    }
    assert counted.keys() == PAIRS.keys()
    for name, (target, draft) in counted.items():
        assert PAIRS[name].target_params == pytest.approx(target, rel=5e-4)
        if draft is not None:
            assert PAIRS[name].draft_params == pytest.approx(draft, rel=1e-4)


def roofline(**changes: float) -> Roofline:
    found = Roofline.for_gpu("h100", "qwen3-4b", dtype="bf16", block_size=7, context=500.0)
    return replace(found, **changes)  # type: ignore[arg-type]


def test_a_lone_row_waits_for_the_weights() -> None:
    ideal = roofline(bandwidth_efficiency=1.0, compute_efficiency=1.0, kernel_us=1e-9, host_us=1e-9)
    weights = (36 * PAIRS["qwen3-4b"].layer_params + 151936 * 2560) * 2
    cache = 500 * 144 * 1024  # the KiB per token that Qwen3-4B's cache takes
    assert ideal.verify_seconds(1, 1) == pytest.approx((weights + cache) / 3350e9)
    assert ideal.verify_seconds(1, 8) == ideal.verify_seconds(1, 1)
    # At batch 1 a round of the published draft reads 0.29 of a target step.
    assert ideal.draft_gb / ideal.target_gb == pytest.approx(0.3, abs=0.01)


def test_many_tokens_wait_for_the_arithmetic() -> None:
    busy = roofline(kernel_us=1e-9, host_us=1e-9)
    flop = 8.045e9 + 500 * 4 * 36 * 32 * 128
    expected = 2048 * flop / (989.5e12 * 0.6)
    assert busy.verify_seconds(256, 2048) == pytest.approx(expected, rel=1e-3)


def test_kernels_and_the_host_cost_whatever_their_size() -> None:
    found = roofline()
    dearer = replace(found, kernel_us=3.0, host_us=70.0)
    added = dearer.verify_seconds(1, 1) - found.verify_seconds(1, 1)
    assert added == pytest.approx((370 * 1.0 + 20.0) * 1e-6)
    added = dearer.draft_seconds(1) - found.draft_seconds(1)
    assert added == pytest.approx((102 * 1.0 + 20.0) * 1e-6)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_makes_a_cost_table(gpu: str) -> None:
    for dtype in GPUS[gpu].tflops:
        found = Roofline.for_gpu(gpu, "qwen3-4b", dtype=dtype, block_size=7, context=300.0)
        costs = found.costs()
        for num_rows, num_tokens in ((1, 1), (3, 24), (256, 1024)):
            expected = found.verify_seconds(num_rows, num_tokens)
            assert costs.verify(num_rows, num_tokens) == pytest.approx(expected, rel=0.05)
        assert costs.draft(16) == pytest.approx(found.draft_seconds(16))
        assert found.target_gb == pytest.approx(4.02 * DTYPE_BYTES[dtype], rel=1e-2)
        assert found.gpu_source


def test_assumptions_can_be_replaced_one_by_one() -> None:
    found = roofline()
    changed = found.assume(["bandwidth_gbs=1675", "host_us=1"])
    assert (changed.bandwidth_gbs, changed.host_us, changed.tflops) == (1675.0, 1.0, found.tflops)
    origins = {name: origin for name, _, _, origin in changed.assumptions()}
    assert origins["bandwidth_gbs"] == origins["host_us"] == "given"
    assert (origins["tflops"], origins["kernel_us"]) == ("datasheet", "guess")
    with pytest.raises(UsageError, match="did you mean bandwidth_gbs"):
        found.assume(["bandwith_gbs=1"])
    for text in ("host_us=fast", "host_us", "host_us=0", "host_us=-1", "host_us=nan", "gpu=h100"):
        with pytest.raises(UsageError):
            found.assume([text])


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    options = {"dtype": None, "block_size": 7, "context": 1.0}
    with pytest.raises(
        UsageError, match=r"no GPU 'h1000'; did you mean h100\?\n\nhint: known: t4, "
    ):
        Roofline.for_gpu("h1000", "qwen3-4b", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no model 'llama'"):
        Roofline.for_gpu("h100", "llama", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="NVIDIA T4 has no tensor cores for it, but fp16, int8"):
        Roofline.for_gpu("t4", "qwen3-4b", dtype="bf16", block_size=7, context=1.0)


def test_rows_must_fit_into_memory() -> None:
    rounds = made_up([1] * 12)
    found = roofline(memory_gb=10.4)
    cache = (144 + 20) * 1024 * rounds.longest_row
    free = 10.4e9 * 0.9 - (4_022_272_000 + 615_186_432) * 2
    machine = roofline_machine(found, rounds)
    assert machine.most_rows == int(free / cache) > 0
    with pytest.raises(UsageError, match=r"9\.3 GB, too much for the 8 GB"):
        roofline_machine(replace(found, memory_gb=8.0), rounds)
    simulated = run_simulation(rounds, machine, rows=(1, 2, 4096))
    assert simulated.left_out == (4096,)
    assert {s.num_rows for s in simulated.results} == {1, 2}
    assert any("left out  4096 rows: memory holds" in line for line in simulated.lines())
    with pytest.raises(UsageError, match="--rows 4096 is too many: memory holds"):
        run_simulation(rounds, machine, rows=(4096,))


def test_a_measured_table_is_not_stretched() -> None:
    machine = measured_machine("here", COSTS)
    found = run_simulation(made_up([1] * 12), machine)
    assert sorted({s.num_rows for s in found.results}) == [1, 2, 4, 8]
    assert found.left_out == (16, 32, 64, 128, 256)


def curve(strategy: str, *row_speeds: float) -> list[Simulated]:
    return [
        Simulated(strategy, 2**i, speed * 2**i, 1.0, 0.0, 0.0, 0.0, 0.0)
        for i, speed in enumerate(row_speeds)
    ]


@pytest.fixture
def simulation() -> Simulation:
    """Plain: 100, 80, 40, 20 tokens/s per row at 1, 2, 4, 8 rows; auto: 160, 100, 60, 40."""
    results = (*curve("plain", 100, 80, 40, 20), *curve("auto", 160, 100, 60, 40))
    machine = measured_machine("here", COSTS)
    return Simulation(made_up([1] * 12), machine, (), results, floor=40.0)


def test_a_floor_carries_as_many_rows_as_get_it(simulation: Simulation) -> None:
    assert simulation.carried("plain", 80).num_rows == 2.0
    # Seconds per token are linear in rows: 1/60 lies a third of the way from 1/80 to 1/40.
    assert simulation.carried("plain", 60).num_rows == pytest.approx(2 + 2 / 3)
    assert simulation.carried("plain", 101) == simulation.carried("auto", 161)
    assert str(simulation.carried("plain", 101)) == "none"
    most = simulation.carried("auto", 40)
    assert (most.num_rows, most.at_least, str(most)) == (8.0, True, "≥ 8.0")


def test_a_hundred_queries_become_what_auto_carries(simulation: Simulation) -> None:
    assert simulation.queries("auto", 60) == (pytest.approx(100 * 4 / (2 + 2 / 3)), "150")
    assert simulation.queries("auto", 40) == (200.0, "≥ 200")
    assert simulation.queries("auto", 120) is None  # plain carries nobody
    assert simulation.queries("auto", 10) is None  # plain carries more than was simulated
    assert "at no less than 40.0 tokens/s per row, 100 queries become ≥ 200" in simulation.verdict()
    assert simulation.verdict().startswith("Simulated: ")


def test_a_speed_that_recovers_is_not_counted(simulation: Simulation) -> None:
    results = (*curve("plain", 100, 30, 50, 20), *curve("auto", 160, 100, 60, 40))
    found = replace(simulation, results=results)
    assert found.carried("plain", 40).num_rows < 2


def test_everything_says_that_it_is_a_simulation(simulation: Simulation, tmp_path: Path) -> None:
    lines = simulation.lines()
    assert lines[0].startswith("SIMULATION, not a measurement")
    captions = [line for line in lines if line.startswith("SIMULATED ")]
    assert len(captions) == 2
    assert any("| simulated tokens/s |" in line for line in lines)
    assert simulation.to_json()["simulation"] is True
    for draw in (frontier, throughput, queries):
        title = draw(simulation).get_suptitle()
        assert title.startswith("SIMULATION, not measured: ")
        assert title.endswith("\nhere\nacceptance recorded with the engine made up")


def test_figures_show_every_strategy_and_axis(simulation: Simulation, tmp_path: Path) -> None:
    (axes,) = frontier(simulation).axes
    assert [line.get_label() for line in axes.lines[:2]] == ["plain", "auto"]
    assert axes.lines[1].get_xydata().tolist() == [[160, 160], [100, 200], [60, 240], [40, 320]]
    assert axes.get_xlabel() == "tokens/s per row"
    assert {text.get_text() for text in axes.texts} >= {"8", "4"}
    ratios = throughput(simulation).axes[1].lines[1].get_ydata()
    assert ratios.tolist() == pytest.approx([1.6, 1.25, 1.5, 2.0])
    lines = queries(simulation).axes[0].lines
    assert set(np.round(lines[0].get_ydata(), 6)) == {100.0}
    paths = draw_figures(simulation, tmp_path)
    assert [path.name for path in paths] == ["frontier.png", "throughput.png", "queries.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_every_strategy_has_a_line_of_its_own(simulation: Simulation) -> None:
    names = [strategy.name for strategy in strategies(7)]
    results = tuple(found for name in names for found in curve(name, 100, 80, 40))
    lines = frontier(replace(simulation, results=results)).axes[0].lines[: len(names)]
    assert [line.get_label() for line in lines] == names
    assert len({line.get_color() for line in lines}) == len(names)


def test_figures_take_what_says_nothing(simulation: Simulation) -> None:
    """One concurrency, equal strategies: nothing to scale an axis by. Warnings are errors."""
    for speeds in ((50.0,), (50.0, 50.0), (50.0, 50.0, 25.0)):
        results = (*curve("plain", *speeds), *curve("auto", *speeds))
        found = replace(simulation, results=results, floor=speeds[-1])
        for draw in (frontier, throughput, queries):
            draw(found).draw_without_rendering()


def test_without_matplotlib_the_message_names_the_extra(
    simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'dspark-batch\[plots\]'"):
        draw_figures(simulation, tmp_path)


def test_a_simulation_needs_neither_a_runtime_nor_matplotlib() -> None:
    code = (
        "import sys, dspark_batch.bench.forecast.simulation, dspark_batch.bench.forecast.figures\n"
        "heavy = {'onnxruntime', 'pyarrow', 'matplotlib', 'torch', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
