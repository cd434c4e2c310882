"""The TensorRT runtime on a device of host memory: its text is ONNX Runtime's.

`fake_trt` runs the plans' ONNX graphs on the addresses that the runtime binds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny
from agreeing import write_agreeing_pair
from fake_trt import VERSION, HostDevice, fake_gpus, fake_trt, write_plans
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Completion, DraftBlock, Prompt, SamplingParams, VerifyPlan
from dspark_batch.decode.types import RunningRow as Row
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.engine.files import replace_folder
from dspark_batch.engine.manifest import ENGINE_FILES, FILE_NAME, describe_file, read_manifest
from dspark_batch.engine.runtimes import trt, trt_runtime
from dspark_batch.engine.runtimes.buffers import host_type
from dspark_batch.engine.runtimes.steps import rounded
from dspark_batch.engine.runtimes.trt_runtime import TrtRuntime
from dspark_batch.errors import EngineError

pytestmark = pytest.mark.slow

LENGTHS = (385, 1, 300, 17, 310, 5, 64, 256, 9, 257, 2, 41)
MAX_TOKENS = 392
LIBRARIES = ("tensorrt", "tensorrt_rtx")


@dataclass
class Machine:
    """A fake GPU with a fake TensorRT."""

    device: HostDevice
    module: Any = None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(HostDevice())

    def device() -> HostDevice:
        found.device = HostDevice()
        found.module.__dict__["Runtime"].device = found.device
        return found.device

    monkeypatch.setattr(trt, "usable_gpus", lambda: fake_gpus(89))
    monkeypatch.setattr(trt, "CudaDevice", device)
    return found


@pytest.fixture
def open_on_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Opens a copy of an ONNX Runtime engine with plans beside its graphs."""
    opened: list[Engine] = []

    def open_copy(folder: Path, tmp_path: Path, **plans: Any) -> Engine:
        rows = plans.pop("max_rows", None)
        with_draft = plans.pop("with_draft", True)
        copy = tmp_path / "gpu"
        if not copy.exists():
            shutil.copytree(folder, copy)
            write_plans(copy, **plans)
        native = plans.get("library", "tensorrt_rtx") == "tensorrt_rtx"
        machine.module = fake_trt(machine.device, copy, native_graphs=native)
        monkeypatch.setattr(trt.trt_body, "import_library", lambda _: machine.module)
        opened.append(open_engine(copy, max_rows=rows, with_draft=with_draft))
        return opened[-1]

    yield open_copy
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    target = write_target(folder / "t", target_config(request.param, eos_token_id=None))
    return export_pair(
        folder, target, write_draft(folder / "d", draft_config()), max_tokens=MAX_TOKENS
    )


def make_prompts(lengths: Any = LENGTHS, *, sampled: bool = False) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            row,
            tuple(rng.integers(1, tiny.VOCAB, n).tolist()),
            SamplingParams(
                6 + row * 5 % 23,
                temperature=0.9 if sampled and row % 3 else 0.0,
                top_k=7 if row % 2 else 0,
                top_p=0.9 if row % 4 == 1 else 1.0,
                seed=row,
            ),
        )
        for row, n in enumerate(lengths)
    ]


def texts(engine: Any, prompts: list[Prompt], spec: str) -> dict[int, tuple[int, ...]]:
    found: list[Completion] = list(decode(prompts, engine, spec=spec, stats=DecodeStats()))
    assert len(found) == len(prompts)
    return {completion.row: completion.token_ids for completion in found}


def start(
    engine: Engine, lengths: Any, *, slots: Any = None, sampled: bool = False, unfiltered: Any = ()
) -> list[Row]:
    """Admitted and prefilled rows; the `unfiltered` ones sample with temperature 1 alone."""
    prompts = make_prompts(lengths, sampled=sampled)
    for r in unfiltered:
        prompts[r] = replace(prompts[r], params=SamplingParams(temperature=1.0, seed=r))
    rows = [
        Row(prompt=p, slot=slot, tokens=list(p.token_ids), num_prompt_tokens=len(p.token_ids))
        for p, slot in zip(prompts, slots or range(len(prompts)), strict=True)
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


def runtime_of(engine: Engine) -> Any:
    return engine._runtime


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("spec", ["off", "on", "auto"])
def test_text_is_onnx_runtime_s(
    exported: Path, tmp_path: Path, open_on_gpu: Any, library: str, spec: str
) -> None:
    """Ragged prompts over four places, some of them long; rows leave in the middle."""
    prompts = make_prompts(sampled=True)
    with closing(open_engine(exported)) as engine:
        expected, costs = texts(engine, prompts, spec), engine.costs
    engine = open_on_gpu(exported, tmp_path, library=library)
    engine.costs = costs  # `auto` goes by them, and a sampled row's text by what it drafted
    assert texts(engine, prompts, spec) == expected


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("seed", "coarse"), [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_any_rounds_give_what_onnx_runtime_gives(
    exported: Path,
    tmp_path: Path,
    open_on_gpu: Any,
    library: str,
    seed: int,
    coarse: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both in lockstep: any rows draft, in any order; any lengths; rows come and go.

    Few rows are hardly ever padded; rounded coarsely they are.
    """
    if coarse > 1:
        monkeypatch.setattr(trt_runtime, "rounded", lambda size: -(-size // coarse) * coarse)
    rng = np.random.default_rng(seed)
    most_rows = 4 if coarse == 1 else 7
    lengths = (3, 40, 1, 90, 7, 22, 64, 5, 130, 12, 2, 9, 4, 17, 6)
    with closing(open_engine(exported, max_rows=most_rows)) as cpu:
        gpu = open_on_gpu(
            exported, tmp_path, library=library, ring=310, rows=most_rows, max_rows=most_rows
        )
        pair = (cpu, gpu)
        waiting = [make_prompts(lengths, sampled=True) for _ in pair]
        running: list[list[Row]] = [[], []]
        num_drafted = 0
        for _ in range(40):
            free = [n for n in range(most_rows) if n not in {row.slot for row in running[0]}]
            num_new = int(rng.integers(len(free) + 1))
            found = []
            for engine, rows, prompts in zip(pair, running, waiting, strict=True):
                new = [
                    Row(prompt=p, slot=slot, tokens=list(p.token_ids), num_prompt_tokens=0)
                    for slot, p in zip(free[:num_new], prompts, strict=False)
                ]
                del prompts[: len(new)]
                for row in new:
                    engine.admit(row)
                if new:
                    found.append(engine.prefill(new).tolist())
                    for row, token in zip(new, found[-1], strict=True):
                        row.tokens.append(token)
                rows += new
            assert found[: len(found) // 2] == found[len(found) // 2 :]
            num_rows = len(running[0])
            if not num_rows:
                break
            order = rng.permutation(num_rows)
            chosen = order[: rng.integers(num_rows + 1)].tolist()
            planned = rng.integers(0, 5, num_rows) * np.isin(np.arange(num_rows), chosen)
            outcomes = []
            for engine, rows in zip(pair, running, strict=True):
                block = None
                if chosen:
                    drafted = engine.draft_raw([rows[i] for i in chosen])
                    block = DraftBlock.empty(num_rows, engine.block_size).updated(chosen, drafted)
                outcomes.append((block, engine.verify(rows, block, VerifyPlan(planned))))
            (block, result), (other, same) = outcomes
            if block is not None:
                num_drafted += len(chosen)
                np.testing.assert_array_equal(block.tokens, other.tokens)
                np.testing.assert_allclose(block.confidence, other.confidence, atol=1e-4)
            np.testing.assert_array_equal(result.num_accepted, same.num_accepted)
            np.testing.assert_array_equal(result.bonus, same.bonus)
            leaving = {i for i in range(num_rows) if rng.random() < 0.12}
            for engine, rows in zip(pair, running, strict=True):
                for i, (row, accepted) in enumerate(zip(rows, result.num_accepted, strict=True)):
                    drafts = block.tokens[i, :accepted].tolist() if block is not None else []
                    row.tokens += [*drafts, int(result.bonus[i])]
                for i in sorted(leaving, reverse=True):
                    engine.release(rows.pop(i))
        assert num_drafted > 20


def test_context_that_fills_the_ring_is_taken_in(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    """Rounds without drafts go around the ring; then a draft is what it would have been."""
    blocks = []
    with closing(open_engine(exported)) as cpu:
        for engine in (cpu, open_on_gpu(exported, tmp_path, ring=302)):
            rows = start(engine, (20, 3, 150))
            for _ in range(120):
                step(engine, rows)
            blocks.append((engine.draft_raw(rows), engine.draft_raw(rows)))
    runtime = runtime_of(engine)
    assert runtime._ring_size == 302 < 3 * 120 + 173
    assert [row.num_taken for row in runtime._rows.values()] == [140, 123, 270]
    for block, expected in zip(blocks[1], blocks[0], strict=True):
        np.testing.assert_array_equal(block.tokens, expected.tokens)
        np.testing.assert_allclose(block.confidence, expected.confidence, atol=1e-4)


def test_drafts_that_wait_for_verification_survive_a_full_ring(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    """The middle rows draft and sample; around the ring the outer ones are taken in."""
    planned, outcomes = VerifyPlan(np.array([0, 4, 4, 0])), []
    with closing(open_engine(exported)) as cpu:
        for engine in (cpu, open_on_gpu(exported, tmp_path, ring=302)):
            rows = start(engine, (3, 20, 5, 9), sampled=True, unfiltered=(1, 2))
            found = []
            for _ in range(60):
                drafted = engine.draft_raw(rows[1:3])
                block = DraftBlock.empty(4, engine.block_size).updated([1, 2], drafted)
                result = engine.verify(rows, block, planned)
                for r, row in enumerate(rows):
                    accepted = block.tokens[r, : result.num_accepted[r]].tolist()
                    row.tokens += [*accepted, int(result.bonus[r])]
                found.append((result.num_accepted.tolist(), result.bonus.tolist()))
            outcomes.append(found)
    assert runtime_of(engine)._rows[0].num_taken > 40
    assert outcomes[1] == outcomes[0]


def test_a_draft_that_is_often_right_is_verified(tmp_path: Path, open_on_gpu: Any) -> None:
    pair = write_agreeing_pair(tmp_path, stops=False)
    exported = export_pair(tmp_path, *pair, max_tokens=MAX_TOKENS)
    prompts, stats = make_prompts(), DecodeStats()
    with closing(open_engine(exported)) as engine:
        expected = texts(engine, prompts, "off")
    engine = open_on_gpu(exported, tmp_path)
    found = list(decode(prompts, engine, spec="on", stats=stats))
    assert {c.row: c.token_ids for c in found} == expected
    assert stats.spec.num_accepted_tokens > 30


@pytest.mark.parametrize("section", ['drafter = "none"', 'drafter = "ngram"'])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_target_without_a_draft_graph(
    tmp_path: Path, open_on_gpu: Any, section: str, sampled: bool
) -> None:
    target = write_target(tmp_path / "t", target_config("llama", eos_token_id=None))
    exported = export_pair(tmp_path, target, section, max_tokens=MAX_TOKENS)
    prompts = make_prompts(sampled=sampled)
    with closing(open_engine(exported)) as engine:
        expected = texts(engine, prompts, "on")
    assert texts(open_on_gpu(exported, tmp_path), prompts, "on") == expected


def test_a_pair_without_its_draft_decodes_plainly(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    prompts = make_prompts(sampled=True)
    with closing(open_engine(exported, with_draft=False)) as engine:
        expected = texts(engine, prompts, "off")
    engine = open_on_gpu(exported, tmp_path, with_draft=False)
    assert len(runtime_of(engine)._models()) == 1
    assert texts(engine, prompts, "off") == expected


def test_more_rows_than_a_profile_takes_share_a_round(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    prompts = make_prompts(sampled=True)
    with closing(open_engine(exported, max_rows=9)) as engine:
        expected = texts(engine, prompts, "on")
    assert texts(open_on_gpu(exported, tmp_path, rows=4, max_rows=9), prompts, "on") == expected


def test_the_context_of_a_training_is_onnx_runtime_s(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    rows = [prompt.token_ids for prompt in make_prompts()]
    with closing(open_engine(exported)) as engine:
        expected = list(engine.context(rows))
    for mine, theirs in zip(open_on_gpu(exported, tmp_path).context(rows), expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def halve_context(folder: Path) -> None:
    """Let the context be float16 between the graphs of a pair."""
    for name in ("target", "draft"):
        path = folder / f"{name}.onnx"
        model = onnx.load(path, load_external_data=False)
        graph, half = model.graph, onnx.TensorProto.FLOAT16
        values = graph.output if name == "target" else graph.input
        (value,) = (v for v in values if v.name == "context")
        value.type.tensor_type.elem_type = half
        for node in graph.node:
            names = node.output if name == "target" else node.input
            for i, found in enumerate(names):
                if found == "context":
                    names[i] = "context_float"
        if name == "target":
            cast = onnx.helper.make_node("Cast", ["context_float"], ["context"], to=half)
            graph.node.append(cast)
        else:
            kind = onnx.TensorProto.FLOAT
            graph.node.insert(
                0, onnx.helper.make_node("Cast", ["context"], ["context_float"], to=kind)
            )
        onnx.save(model, path)


def test_context_has_the_type_that_the_plans_have(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    copy = tmp_path / "half"
    shutil.copytree(exported, copy)
    halve_context(copy)
    manifest = read_manifest(exported)
    graphs = {name: describe_file(copy / name) for name in ("target.onnx", "draft.onnx")}
    changed = manifest.model_copy(update={"files": manifest.files | graphs})
    (copy / "manifest.json").write_text(changed.model_dump_json())
    prompts = make_prompts()
    with closing(open_engine(exported)) as engine:
        expected = texts(engine, prompts, "off")
        (context,) = engine.context([prompts[0].token_ids])
    engine = open_on_gpu(copy, tmp_path)
    assert runtime_of(engine)._context_bytes == 2 * context.shape[1]
    assert texts(engine, prompts, "on") == expected
    (halved,) = engine.context([prompts[0].token_ids])
    np.testing.assert_allclose(halved, context, rtol=2e-3, atol=1e-3)


def test_bfloat16_has_a_host_type() -> None:
    assert np.dtype(host_type("BF16")).itemsize == 2
    assert host_type("BF16") is ml_dtypes.bfloat16


def test_a_row_that_breaks_harms_neither_its_neighbours_nor_its_successor(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    engine, lengths = open_on_gpu(exported, tmp_path), (12, 7, 30, 15)

    def drafted(rows: list[Row]) -> list[int]:
        """A round of which every row verifies another part, so that some cells are padding."""
        block, planned = engine.draft_raw(rows), np.array([3, 2, 3, 1])
        result = engine.verify(rows, block, VerifyPlan(planned))
        for r, row in enumerate(rows):
            row.tokens += [*block.tokens[r, : result.num_accepted[r]].tolist(), result.bonus[r]]
        return result.bonus.tolist()

    rows = start(engine, lengths)
    expected = [drafted(rows), step(engine, rows), step(engine, rows)]
    for row in rows:
        engine.release(row)
    rows = start(engine, lengths)
    runtime = runtime_of(engine)
    capacity = runtime._target.caches.capacity
    machine.device.synchronize()
    for place in (0, 2):
        for address in runtime._target.caches.addresses(place).values():
            size = tiny.KV_HEADS * capacity * tiny.HEAD_DIM
            cache = machine.device.view(address, 4 * size).view(np.float32)
            cache.reshape(tiny.KV_HEADS, capacity, tiny.HEAD_DIM)[:, 9] = np.nan
    assert drafted(rows) == [-1, expected[0][1], -1, expected[0][3]]
    for row in rows[::2]:  # the first one's place is taken by a row that is well, the other's free
        engine.release(row)
    well = rows[1::2]
    assert step(engine, well) == [expected[1][1], expected[1][3]]
    assert np.isfinite(engine.draft_raw(well).confidence).all()
    again = start(engine, (7, 5), slots=[2, 0])
    assert [row.tokens for row in again] == start_alone(open_on_gpu, exported, tmp_path)
    assert step(engine, well) == [expected[2][1], expected[2][3]]
    assert np.isfinite(engine.draft_raw([*well, *again]).confidence).all()


def start_alone(open_on_gpu: Any, exported: Path, tmp_path: Path) -> list[list[int]]:
    engine = open_on_gpu(exported, tmp_path)
    rows = start(engine, (7, 5))
    return [row.tokens for row in rows]


# the device ---------------------------------------------------------------------------------------


def busy(engine: Engine, device: HostDevice, *, sampled: bool) -> tuple[list[Row], Any]:
    """Rows that have drafted and been verified until every size was met twice."""
    rows = start(engine, (12, 7, 5, 30), sampled=sampled)

    def round_() -> None:
        block = engine.draft_raw(rows)
        result = engine.verify(rows, block, VerifyPlan(np.full(4, 3)))
        for r, row in enumerate(rows):
            row.tokens += [*block.tokens[r, : result.num_accepted[r]].tolist(), result.bonus[r]]

    for _ in range(8):
        round_()
    return rows, round_


@pytest.mark.parametrize("sampled", [False, True])
def test_only_small_things_cross_the_bus(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine, sampled: bool
) -> None:
    """A round is two steps: each sends one copy, fetches one and waits once."""
    engine = open_on_gpu(exported, tmp_path)
    _, round_ = busy(engine, machine.device, sampled=sampled)
    device, runtime = machine.device, runtime_of(engine)
    room = device.room
    device.uploads, device.downloads, waits = [], [], device.num_waits
    for _ in range(5):
        round_()
    assert device.num_waits - waits == 10
    assert {address for address, _ in device.uploads} == {runtime._sent._address}
    assert {address for address, _ in device.downloads} == {runtime._fetched._address}
    # 4 rows, γ = 4: tokens and confidence of a block, then counts and bonus; places of 256 bytes.
    assert [size for _, size in device.downloads] == [2 * 256, 2 * 256] * 5
    assert max(size for _, size in device.uploads) <= 13 * 256
    logits, hidden = 4 * 4 * tiny.VOCAB * 4, 16 * 2 * tiny.HIDDEN * 4
    assert min(logits, hidden) > 2 * 256
    assert device.room == room, "no memory is allocated while decoding"


def test_rows_that_are_no_neighbours_draft_in_one_step(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    engine = open_on_gpu(exported, tmp_path)
    rows = start(engine, (4, 3, 5, 2))
    waits = machine.device.num_waits
    engine.draft_raw([rows[3], rows[0]])
    assert machine.device.num_waits == waits + 1
    assert [len(row.pending) for row in runtime_of(engine)._rows.values()] == [0, 3, 5, 0]


def test_steps_of_full_tensorrt_become_graphs(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    engine = open_on_gpu(exported, tmp_path, library="tensorrt")
    _, round_ = busy(engine, machine.device, sampled=True)
    executed = [len(e.contexts) for e in machine.module.engines]
    before = machine.device.num_replays
    for _ in range(5):
        round_()
    assert machine.device.num_replays - before >= 8  # a size may be new
    assert all(count > 2 for count in executed)  # a context of its own for each graph
    prompts = make_prompts(sampled=True)
    rows = list(runtime_of(engine)._slots)
    for slot in rows:
        runtime_of(engine).release(slot)
    with closing(open_engine(exported)) as cpu:
        assert texts(engine, prompts, "on") == texts(cpu, prompts, "on")


def test_a_step_that_cannot_be_captured_runs_without_a_graph(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    prompts = make_prompts((12, 7, 5, 30), sampled=True)
    engine = open_on_gpu(exported, tmp_path, library="tensorrt")
    expected = texts(engine, prompts, "on")
    assert machine.device.num_replays > 5
    engine = open_on_gpu(exported, tmp_path, library="tensorrt")
    machine.device.refuses_capture = True
    assert texts(engine, prompts, "on") == expected
    assert machine.device.num_replays == 0


def test_graphs_can_be_left_out(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    prompts = make_prompts((12, 7, 5, 30), sampled=True)
    found = []
    for library in LIBRARIES:
        copy = tmp_path / library
        copy.mkdir()
        expected = texts(open_on_gpu(exported, copy, library=library), prompts, "on")
        device = HostDevice()
        machine.module.Runtime.device = device
        folder = copy / "gpu"
        manifest = read_manifest(folder)
        plain = TrtRuntime(folder, manifest, 4, trt=machine.module, device=device, graphs=False)
        engine = Engine(manifest, plain, folder=folder, max_rows=4, hardware_key="")
        assert texts(engine, prompts, "on") == expected
        assert device.num_replays == 0
        found.append(expected)
    assert found[0] == found[1]


def test_tensorrt_rtx_captures_its_decode_steps_itself(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    engine = open_on_gpu(exported, tmp_path)
    texts(engine, make_prompts((12, 7)), "on")
    assert machine.device.num_replays == 0
    for opened in machine.module.engines:
        strategies = [context.how.cuda_graph_strategy.name for context in opened.contexts]
        assert strategies == ["WHOLE_GRAPH_CAPTURE", "DISABLED"]


def test_no_step_of_tensorrt_rtx_runs_on_kernels_that_others_will_replace(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> None:
    """Or their time would be taken for that of the step."""
    open_on_gpu(exported, tmp_path)
    contexts = [context for opened in machine.module.engines for context in opened.contexts]
    found = [c.how.dynamic_shapes_kernel_specialization_strategy.name for c in contexts]
    assert found == ["EAGER"] * 4


@pytest.mark.parametrize(
    ("room", "budget"), [(10**12, 5 * 10**9), (3 * 10**9, None)], ids=["all", "some"]
)
def test_weights_stream_where_they_do_not_fit(
    exported: Path,
    tmp_path: Path,
    open_on_gpu: Any,
    machine: Machine,
    room: int,
    budget: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostDevice, "free_bytes", lambda _: room)
    engine = open_on_gpu(exported, tmp_path, streamable=5 * 10**9)
    working, scratch = 2 * 1000, 10**6
    for opened in machine.module.engines:
        assert opened.weight_streaming_budget_v2 == (budget or room - working - 2**28 - scratch)
    assert len(texts(engine, make_prompts((12, 7)), "on")) == 2


def test_a_gpu_that_is_full_is_named(
    exported: Path, tmp_path: Path, open_on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostDevice, "free_bytes", lambda _: 1000)
    with pytest.raises(EngineError, match=r"(?s)(target|draft)\.plan.*no room.*--max-rows"):
        open_on_gpu(exported, tmp_path, streamable=5 * 10**9)


def test_sizes_are_few_and_not_much_larger() -> None:
    sizes = {rounded(n) for n in range(1, 513)}
    assert [rounded(n) for n in (0, 1, 7, 8, 9, 17, 33, 512)] == [0, 1, 7, 8, 10, 20, 40, 512]
    assert all(n <= rounded(n) <= 1.25 * n for n in range(1, 5000))
    assert len(sizes) <= 8 + 4 * 6


# kernels of TensorRT-RTX, from run to run ---------------------------------------------------------

CACHES = ("target.plan.cache", "draft.plan.cache")


@pytest.fixture
def decode_once(
    exported: Path, tmp_path: Path, open_on_gpu: Any, machine: Machine
) -> Callable[..., tuple[int, dict[int, tuple[int, ...]]]]:
    """A run in a process of its own: how many kernels it compiled, and its text."""

    def run(lengths: Any = (12, 7, 30), **plans: Any) -> tuple[int, dict[int, tuple[int, ...]]]:
        with closing(open_on_gpu(exported, tmp_path, **plans)) as engine:
            found = texts(engine, make_prompts(lengths), "on")
        return sum(opened.num_compiled for opened in machine.module.engines), found

    return run


def test_kernels_are_compiled_once(decode_once: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    num_compiled, text = decode_once()
    assert num_compiled > 4
    assert {path.name for path in folder.glob("*.cache*")} == set(CACHES)
    head, _, kernels = (folder / CACHES[0]).read_bytes().partition(b"\n")
    assert json.loads(head)["for"] == (
        f"Fake, sm_89, CUDA 13.0, driver 580, tensorrt_rtx {VERSION}"
    )
    before = [(folder / name).stat().st_mtime_ns for name in CACHES]
    assert decode_once() == (0, text)
    assert [(folder / name).stat().st_mtime_ns for name in CACHES] == before  # nothing new
    assert decode_once((90, 64, 3))[0] > 0
    assert len((folder / CACHES[0]).read_bytes().partition(b"\n")[2]) > len(kernels)
    assert decode_once() == (0, text)  # the first ones are still there
    read_manifest(folder)


def test_full_tensorrt_compiles_at_export_and_keeps_nothing(
    decode_once: Any, tmp_path: Path
) -> None:
    decode_once(library="tensorrt")
    assert not list((tmp_path / "gpu").glob("*.cache*"))


@pytest.mark.parametrize("change", ["gpu", "arch", "driver", "cuda", "library"])
def test_kernels_for_something_else_are_not_used(
    change: str, decode_once: Any, tmp_path: Path
) -> None:
    num_compiled, _ = decode_once()
    path = tmp_path / "gpu" / CACHES[0]
    line, _, kernels = path.read_bytes().partition(b"\n")
    old, new = {
        "gpu": ("Fake", "Fake Ti"),
        "arch": ("sm_89", "sm_86"),
        "driver": ("driver 580", "driver 590"),
        "cuda": ("CUDA 13.0", "CUDA 13.1"),
        "library": (f"rtx {VERSION}", "rtx 1.0"),
    }[change]
    for name in CACHES:
        there = tmp_path / "gpu" / name
        assert old.encode() in there.read_bytes()
        there.write_bytes(there.read_bytes().replace(old.encode(), new.encode(), 1))
    assert decode_once()[0] == num_compiled
    assert path.read_bytes() == line + b"\n" + kernels  # and makes way for those of this GPU


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"\xff\xfe\n",
        lambda _: b"[1]\n[]",
        lambda _: b'{"for": "x"}',
        lambda content: content[:-3],
        lambda content: content.replace(b'"sha256": "', b'"sha256": "0', 1),
    ],
)
def test_a_damaged_file_of_kernels_is_replaced(
    damage: Callable[[bytes], bytes],
    decode_once: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_compiled, text = decode_once()
    paths = [tmp_path / "gpu" / name for name in CACHES]
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(damage(content))
    assert decode_once() == (num_compiled, text)
    assert [path.read_bytes() for path in paths] == whole
    wrong_key = damage(whole[0]) == b'{"for": "x"}'
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (0 if wrong_key else 2), warnings
    assert all("kernels are compiled again" in warning for warning in warnings)


def test_kernels_that_the_library_refuses_are_replaced(
    decode_once: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may check more than we do. Even a longer file goes then."""
    _, text = decode_once()
    path = tmp_path / "gpu" / CACHES[0]
    head = json.loads(path.read_bytes().partition(b"\n")[0])
    kernels = json.dumps(["refused", "x" * 10**5]).encode()
    head["sha256"] = hashlib.sha256(kernels).hexdigest()
    path.write_bytes(json.dumps(head).encode() + b"\n" + kernels)
    assert decode_once()[1] == text
    assert path.stat().st_size < 10**5
    assert not caplog.records


@pytest.mark.parametrize("when", ["read", "write"])
def test_a_folder_that_keeps_no_kernels_does_not_stop_a_run(
    when: str,
    decode_once: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_compiled, text = decode_once()
    for name in CACHES:
        (tmp_path / "gpu" / name).unlink()

    def refuse(path: Path, *arguments: Any) -> Any:
        if path.name.startswith(CACHES):
            raise OSError(30, "Read-only file system")
        return real(path, *arguments)

    name = f"{when}_bytes"
    real = getattr(Path, name)
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, refuse)
        assert decode_once() == (num_compiled, text)
    assert "Read-only file system" in caplog.text
    if when == "write":
        assert not list((tmp_path / "gpu").glob("*.cache*"))
        assert decode_once()[0] == num_compiled


def test_of_two_processes_the_one_with_more_kernels_is_kept(
    exported: Path, tmp_path: Path, open_on_gpu: Any
) -> None:
    """As `bench` has them: one engine with its draft, one that decodes plainly."""
    path = tmp_path / "gpu" / CACHES[0]
    many, few = open_on_gpu(exported, tmp_path), open_on_gpu(exported, tmp_path)
    texts(few, make_prompts((5,)), "off")
    texts(many, make_prompts((12, 7, 30)), "on")
    many.close()
    kept = path.read_bytes()
    few.close()
    assert path.read_bytes() == kept


def test_a_folder_with_kernels_is_still_ours_to_replace(decode_once: Any, tmp_path: Path) -> None:
    decode_once()
    folder, scratch = tmp_path / "gpu", tmp_path / "new"
    (folder / f"{CACHES[0]}.tmp").write_bytes(b"of a crash")
    scratch.mkdir()
    replace_folder(folder, scratch, ENGINE_FILES, mark=FILE_NAME)
    assert not list(folder.iterdir())
