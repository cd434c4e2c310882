"""Captured steps over pages, through twins on the CPU: attention, verification, the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from numpy.typing import NDArray
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.decode import DecodeStats, Prompt, SamplingParams, decode
from dspark_batch.engine import CacheInfo, Engine, Gpus, find_gpus, open_engine
from dspark_batch.engine.hardware import Gpu
from dspark_batch.engine.manifest import EngineManifest, read_manifest
from dspark_batch.engine.runtimes import Placement, ort_cuda
from dspark_batch.engine.runtimes.paged import PagedRuntime
from dspark_batch.errors import EngineError
from dspark_batch.models.device_body import DeviceBody, Verification, verifying
from dspark_batch.models.families import decoder_spec
from dspark_batch.models.graph.builder import FLOAT, FLOAT16, GraphBuilder
from dspark_batch.models.graph.paged import (
    PAGE,
    PagedHeads,
    PagedRows,
    paged_attention,
    with_twins,
)
from dspark_batch.models.paged_decoder import check_paged
from dspark_batch.models.plugin import specification

Array = NDArray[Any]
HEADS, KV, SIZE = 4, 2, 16


# attention --------------------------------------------------------------------------------------


def rotated(x: Array, angles: Array) -> Array:
    a, b = x[: SIZE // 2], x[SIZE // 2 :]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    )


def normed(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean() + 1e-6) * weight


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("norms", [False, True])
def test_the_twin_of_paged_attention_is_its_formula(
    tmp_path: Path, causal: bool, window: int | None, norms: bool
) -> None:
    """Key by key in float64: rows of several lengths, one across a border of pages."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("attention", tmp_path)
    rows = PagedRows.declared(b)
    width = (HEADS + 2 * KV) * SIZE
    qkv = b.input("qkv", FLOAT, ["T", width])
    pools = [b.input(name, FLOAT, ["P", PAGE, KV, SIZE]) for name in ("k", "v")]
    angles = np.arange(512)[:, None] / 100 ** (np.arange(0, SIZE, 2) / SIZE)
    rope = [b.weight(n, f(angles).astype(np.float32)) for n, f in (("c", np.cos), ("s", np.sin))]
    weights = 1 + 0.1 * rng.standard_normal((2, SIZE)) if norms else np.ones((2, SIZE))
    names = [b.weight(f"norm{i}", weights[i].astype(np.float32)) for i in range(2)]
    heads = PagedHeads(HEADS, KV, SIZE**-0.5, causal=causal, window=window)
    found = paged_attention(
        b,
        (qkv, "", ""),
        (pools[0], pools[1]),
        rows,
        (rope[0], rope[1]),
        heads,
        norms=(names[0], names[1]) if norms else None,
    )
    for value, name in zip(found, ("y", "new_k", "new_v"), strict=True):
        shape = ["T", HEADS * SIZE] if name == "y" else ["P", PAGE, KV, SIZE]
        b.output(value, name, FLOAT, shape)
    model = onnx.load(b.save())
    with_twins(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    counts, past = np.array([3, 1, 5]), np.array([0, 255, 254], np.int32)
    begins = np.cumsum(counts) - counts
    pages = np.array([[3, 0], [5, 1], [2, 4]], np.int32)
    given = rng.standard_normal((9, width)).astype(np.float32)
    keys, values = rng.standard_normal((2, 6, PAGE, KV, SIZE)).astype(np.float32)
    y, new_k, new_v = session.run(
        None,
        {
            "qkv": given,
            "k": keys,
            "v": values,
            "cumulative": np.array([0, 3, 4, 9], np.int32),
            "past": past,
            "pages": pages,
            "bounds": np.array([5, 300], np.int32),
        },
    )
    cells = given.reshape(9, HEADS + 2 * KV, SIZE).astype(np.float64)
    places = [
        (pages[r, p // PAGE], p % PAGE, begins[r] + p - past[r], p)
        for r in range(3)
        for p in range(past[r], past[r] + counts[r])
    ]
    for page, offset, token, position in places:
        for g in range(KV):
            key = cells[token, HEADS + g]
            key = normed(key, weights[1]) if norms else key
            keys[page, offset, g] = rotated(key, angles[position])
            values[page, offset, g] = cells[token, HEADS + KV + g]
    np.testing.assert_allclose(new_k[1:], keys[1:], atol=1e-5)
    np.testing.assert_allclose(new_v[1:], values[1:], atol=1e-5)
    for r in range(3):
        for j in range(counts[r]):
            position, token = past[r] + j, begins[r] + j
            end = position + 1 if causal else past[r] + counts[r]
            seen = np.array([p for p in range(end) if window is None or p > position - window])
            for h in range(HEADS):
                query = normed(cells[token, h], weights[0]) if norms else cells[token, h]
                query, g = rotated(query, angles[position]), h // (HEADS // KV)
                places_seen = pages[r, seen // PAGE], seen % PAGE, g
                scores = keys[places_seen] @ query * SIZE**-0.5
                probs = np.exp(scores - scores.max())
                wanted = probs / probs.sum() @ values[places_seen]
                np.testing.assert_allclose(y[token, h * SIZE : (h + 1) * SIZE], wanted, atol=1e-5)


# verification -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "filtered", "mixed"])
def test_a_verification_without_branches_decides_as_the_specification(
    tmp_path: Path, width: int, kind: str
) -> None:
    rng = np.random.default_rng(width)
    rows, vocab, gamma, drafts = 40, 19, 5, width - 1
    draft_vocab = np.sort(rng.choice(vocab, 11, replace=False))
    logits = rng.normal(0, 2, (rows * width, vocab)).astype(np.float32)
    logits[7 * width, 3] = np.nan
    logits[3 * width + drafts, 4] = np.inf
    temperature = {"greedy": 0.0, "mixed": rng.choice([0.0, 0.7], rows)}.get(kind, 0.8)
    filters = kind in ("filtered", "mixed")
    given = {
        "logits": logits,
        "lengths": rng.integers(0, width, rows),
        "draft_tokens": draft_vocab[rng.integers(0, 11, (rows, drafts))],
        "temperature": np.full(rows, temperature, np.float32),
        "top_k": rng.integers(0, 6, rows) if filters else np.zeros(rows, np.int64),
        "top_p": rng.choice([0.5, 0.9, 1.0], rows).astype(np.float32)
        if filters
        else np.ones(rows, np.float32),
        "uniforms": rng.random((rows, gamma + 1), np.float32),
        "certain": rng.integers(0, 2, rows),
        "draft_logits": rng.normal(0, 2, (rows, gamma, 11)).astype(np.float32),
        "draft_rows": rng.permutation(rows),
    }
    if drafts:  # or hardly anything would be accepted
        best = np.nan_to_num(logits).reshape(rows, width, vocab).argmax(-1)
        lucky = rng.random((rows, drafts)) < 0.7
        given["draft_tokens"] = np.where(lucky, best[:, :-1], given["draft_tokens"])
    b = GraphBuilder("tail", tmp_path)
    which = Verification(width, samples=kind != "greedy", width=vocab if filters else 0)
    DeviceBody(
        b,
        b.input("logits", FLOAT, ["N", vocab]),
        which,
        vocab_size=vocab,
        draft_vocab=b.weight("draft_vocab", draft_vocab.astype(np.int64)),
        draft_vocab_size=11,
        block_size=gamma,
    )
    session = ort.InferenceSession(str(b.save()), providers=["CPUExecutionProvider"])
    feeds = {v.name: given[v.name] for v in session.get_inputs()}
    accepted, bonus = session.run(["num_accepted", "bonus"], feeds)
    wanted = specification.verify(
        logits,
        np.arange(rows * width).reshape(rows, width),
        given["draft_tokens"],
        given["lengths"],
        given["certain"],
        given["draft_logits"][given["draft_rows"]],
        draft_vocab,
        given["temperature"],
        given["top_k"],
        given["top_p"],
        given["uniforms"],
    )
    assert accepted.tolist() == wanted.num_accepted.tolist()
    assert bonus.tolist() == wanted.bonus.tolist()
    assert -1 in bonus
    if drafts:
        assert len(set(accepted.tolist())) > 1


# the runtime ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny pair as an engine for captured steps, and as one in fp32."""
    folder = tmp_path_factory.mktemp("paged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "HEAD_DIM", 16)  # the least that the kernels on a GPU take
        target = write_target(folder / "target", target_config("llama"))
        draft = write_draft(folder / "draft", draft_config(markov_head_type="vanilla"))
    engine = 'runtime = "onnxruntime-cuda"\n'
    paged = export_pair(folder, target, draft, precision="fp16", engine=engine, max_rows=5)
    return SimpleNamespace(folder=paged, manifest=read_manifest(paged), models=(target, draft))


@pytest.fixture(scope="module")
def reference(pair: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same pair in fp32, on the CPU."""
    folder = export_pair(tmp_path_factory.mktemp("fp32"), *pair.models, max_rows=5)
    engine = open_engine(folder, placement=Placement(device="cpu"))
    yield engine
    engine.close()


def opened(pair: SimpleNamespace, *, pads_prompts: bool) -> Engine:
    manifest: EngineManifest = pair.manifest
    runtime = PagedRuntime(pair.folder, manifest, 5, device="cpu", pads_prompts=pads_prompts)
    return Engine(manifest, runtime, folder=pair.folder, max_rows=5, hardware_key="twins")


def prompts(number: int = 17, *, temperature: float = 0.0, **options: Any) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            row,
            tuple(rng.integers(0, VOCAB, rng.integers(2, 20)).tolist()),
            SamplingParams(24, temperature=temperature * (row % 3), seed=row, **options),
        )
        for row in range(number)
    ]


def texts(engine: Any, given: list[Prompt], spec: str) -> dict[int, tuple[int, ...]]:
    done = decode(given, engine, spec=spec, stats=DecodeStats())
    return {completion.row: completion.token_ids for completion in done}


@pytest.fixture
def engines(pair: SimpleNamespace) -> Iterator[list[Engine]]:
    found = [opened(pair, pads_prompts=pads) for pads in (True, False)]
    yield found
    for engine in found:
        engine.close()


def test_greedy_text_is_plain_decoding_s_and_nearly_always_that_of_fp32(
    reference: Engine, engines: list[Engine]
) -> None:
    """In fp16 a row parts where its two best tokens are nearly equal."""
    wanted = texts(reference, prompts(), "off")
    padded, exact = ({spec: texts(e, prompts(), spec) for spec in ("off", "on")} for e in engines)
    assert padded == exact
    assert padded["on"] == padded["off"]
    assert sum(padded["off"][row] == wanted[row] for row in wanted) >= len(wanted) - 2


@pytest.mark.parametrize("options", [{}, {"top_k": 4, "top_p": 0.9}, {"top_p": 0.8}])
def test_padding_changes_nothing_where_rows_sample(
    engines: list[Engine], options: dict[str, Any]
) -> None:
    given = prompts(temperature=0.5, **options)
    for spec in ("off", "on"):
        padded, exact = (texts(engine, given, spec) for engine in engines)
        assert padded == exact
        assert any(len(set(text)) > 1 for text in padded.values())


def test_context_is_what_the_fp32_engine_gives(reference: Engine, engines: list[Engine]) -> None:
    rows = [prompt.token_ids for prompt in prompts(4)]
    for engine in engines:
        pairs = zip(engine.context(rows), reference.context(rows), strict=True)
        for found, wanted in pairs:
            assert found.shape == wanted.shape
            assert np.linalg.norm(found - wanted) < 0.005 * np.linalg.norm(wanted)


def test_rows_may_wait_long_for_their_draft(engines: list[Engine]) -> None:
    """Context of plain steps piles up in the ring, and then the draft takes it in."""
    engine = engines[0]
    from dspark_batch.decode import RunningRow, VerifyPlan

    rows = [RunningRow(p, p.row, list(p.token_ids), len(p.token_ids)) for p in prompts(3)]
    for row in rows:
        engine.admit(row)
    for row, token in zip(rows, engine.prefill(rows).tolist(), strict=True):
        row.tokens.append(token)
    for _ in range(70):
        result = engine.verify(rows, None, VerifyPlan(np.zeros(3, np.int64)))
        for row, token in zip(rows, result.bonus.tolist(), strict=True):
            row.tokens.append(token)
    late = engine.draft(rows)
    for row in rows:
        engine.release(row)
    again = [RunningRow(p, p.row, list(p.token_ids), len(p.token_ids)) for p in prompts(3)]
    for row, other in zip(again, rows, strict=True):
        engine.admit(row)
        row.tokens = other.tokens[:-1]
    engine.prefill(again)
    for row, other in zip(again, rows, strict=True):
        row.tokens.append(other.tokens[-1])
    at_once = engine.draft(again)
    assert late.tokens.tolist() == at_once.tokens.tolist()
    np.testing.assert_allclose(late.confidence, at_once.confidence, atol=5e-3)
    for row in again:
        engine.release(row)


def test_weights_that_target_and_draft_share_are_there_once(engines: list[Engine]) -> None:
    runtime: Any = engines[0]._runtime
    texts(engines[0], prompts(2), "on")
    target = runtime._session("target", Verification(1))[1]
    draft = runtime._session("draft", None)[1]
    assert draft["embed_tokens"] is target["model.embed_tokens"]
    assert target["lm_head" if "lm_head" in target else "model.embed_tokens"] in target.values()


def test_no_graph_branches_or_asks_for_a_shape(pair: SimpleNamespace) -> None:
    """One such node ends the capture of a CUDA graph; ArgMax has no CUDA kernel at all."""
    ends = [Verification(1), Verification(4), Verification(4, samples=True, width=8)]
    models = [verifying(pair.folder / "target.onnx", end, block_size=7).model() for end in ends]
    models += [
        onnx.load(pair.folder / f"{n}.onnx", load_external_data=False)
        for n in ("draft", "draft-sampling")
    ]
    forbidden = {"If", "Loop", "Scan", "Shape", "Size", "Range", "NonZero", "ArgMax", "ReduceMax"}
    for model in models:
        assert not {node.op_type for node in model.graph.node} & forbidden
        assert not model.functions
        assert any(node.op_type == "PagedAttention" for node in model.graph.node)


def test_a_broken_row_leaves_clean_pages(engines: list[Engine]) -> None:
    runtime: Any = engines[0]._runtime
    runtime.admit(0)
    runtime._cover([0], np.array([10]))
    page = int(runtime._pages[0, 0])
    pool = runtime._caches["target"][0]
    octets = pool.owner.view(np.float16).reshape(pool.shape)
    octets[page] = np.nan
    runtime._broken.add(0)
    runtime.release(0)
    assert not octets[page].any()
    assert page in runtime._free


# refusals ---------------------------------------------------------------------------------------


def test_without_a_gpu_the_error_says_what_is_missing(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Gpus(problem="no NVIDIA driver")
    monkeypatch.setattr(ort_cuda, "find_gpus", lambda: none)
    with pytest.raises(EngineError, match="built for NVIDIA GPUs, and there is none") as error:
        open_engine(pair.folder)
    assert "--device cpu" in str(error.value.hint)
    assert "dspark-batch export tiny;" in str(error.value.hint)
    open_engine(pair.folder, placement=Placement(device="cpu")).close()


def test_what_the_kernels_do_not_take_is_named(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(arch: int, manifest: EngineManifest) -> str:
        found = Gpus((Gpu("Card", "GPU-1", arch, 8, 8),))
        monkeypatch.setattr(ort_cuda, "find_gpus", lambda: found)
        problem = ort_cuda.refusal(pair.folder, manifest)
        assert problem is not None
        return problem.message

    assert "cannot use the GPU" in refused(90, pair.manifest)
    monkeypatch.setattr(ort_cuda.ort_devices, "providers", lambda: ["CUDAExecutionProvider"])
    assert "Card is sm_75" in refused(75, pair.manifest)
    odd = CacheInfo.from_shapes(((2, 8),))
    narrow = pair.manifest.target.model_copy(update={"cache": odd})
    manifest = pair.manifest.model_copy(update={"target": narrow})
    assert "heads of 8 channels have no kernel" in refused(90, manifest)


def test_too_many_rows_for_the_memory_are_refused(pair: SimpleNamespace) -> None:
    with pytest.raises(EngineError, match="GB for keys and values") as error:
        PagedRuntime(pair.folder, pair.manifest, 5, device="cpu", free_bytes=1000)
    assert "fewer rows" in str(error.value.hint)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"v_norm": True}, "norm values"), ({"head_dim": 512}, "heads of 512 channels")],
)
def test_a_target_without_kernels_is_refused(changes: dict[str, Any], problem: str) -> None:
    spec = decoder_spec(target_config("qwen3"))
    check_paged(spec)
    if "head_dim" in changes:
        layers = tuple(replace(layer, **changes) for layer in spec.layers)
        spec = replace(spec, layers=layers)
    else:
        spec = replace(spec, **changes)
    with pytest.raises(EngineError, match=f"onnxruntime-cuda cannot run .*{problem}"):
        check_paged(spec)


def test_bf16_is_checked_and_run_as_a_twin_in_fp32(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    engine = 'runtime = "onnxruntime-cuda"\n'
    folder = export_pair(tmp_path, target, draft, precision="bf16", engine=engine)
    opened = open_engine(folder, placement=Placement(device="cpu"))
    given = prompts(5)
    assert texts(opened, given, "on") == texts(opened, given, "off")
    model = onnx.load(folder / "target.onnx", load_external_data=False)
    assert FLOAT16 not in {v.type.tensor_type.elem_type for v in model.graph.input}


# on a GPU ---------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> None:
    """Skips where captured steps cannot run."""
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not find_gpus().gpus:
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")


@pytest.mark.gpu
def test_on_a_gpu_text_is_that_of_the_twins(
    pair: SimpleNamespace, engines: list[Engine], gpu: None
) -> None:
    """Greedy rows may part where their two best tokens are nearly equal."""
    captured = open_engine(pair.folder, max_rows=5)
    twins = texts(engines[1], prompts(), "off")
    for spec in ("off", "on"):
        for _ in range(2):  # the second time all steps are replayed
            found = texts(captured, prompts(), spec)
            assert sum(found[row] == twins[row] for row in twins) >= len(twins) - 3
    sampled = texts(captured, prompts(temperature=0.5), "on")
    assert sorted(sampled) == sorted(twins)
    assert all(0 < len(text) <= 24 for text in sampled.values())


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, None)])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv", "size"), [(9, 3, 64), (4, 1, 256), (3, 3, 64), (6, 2, 32)])
def test_on_a_gpu_paged_attention_is_its_twin(
    tmp_path: Path,
    gpu: None,
    causal: bool,
    window: int | None,
    norms: bool,
    heads: int,
    kv: int,
    size: int,
) -> None:
    rng = np.random.default_rng(0)
    b = GraphBuilder("attention", tmp_path, FLOAT16)
    rows = PagedRows.declared(b)
    parts = [heads * size, kv * size, kv * size]
    qkv = [b.input(n, FLOAT16, ["T", w]) for n, w in zip("qkv", parts, strict=True)]
    pools = [b.input(f"past_{name}", FLOAT16, ["P", PAGE, kv, size]) for name in "kv"]
    angles = np.arange(512)[:, None] / 100 ** (np.arange(0, size, 2) / size)
    rope = [b.weight(n, f(angles), np.float16) for n, f in (("cos", np.cos), ("sin", np.sin))]
    named = [b.weight(f"norm{i}", 1 + rng.random(size) / 9, np.float16) for i in range(2)]
    found = paged_attention(
        b,
        (qkv[0], qkv[1], qkv[2]),
        (pools[0], pools[1]),
        rows,
        (rope[0], rope[1]),
        PagedHeads(heads, kv, size**-0.5, causal=causal, window=window),
        norms=(named[0], named[1]) if norms else None,
    )
    for value, name in zip(found, ("y", "new_k", "new_v"), strict=True):
        shape = ["T", heads * size] if name == "y" else ["P", PAGE, kv, size]
        b.output(value, name, FLOAT16, shape)
    path = b.save()
    given = {
        n: rng.normal(size=(9, w)).astype(np.float16) for n, w in zip("qkv", parts, strict=True)
    }
    given |= {
        "cumulative": np.array([0, 3, 4, 9], np.int32),
        "past": np.array([0, 255, 254], np.int32),
        "pages": np.array([[3, 0], [5, 1], [2, 4]], np.int32),
        "bounds": np.array([5, 300], np.int32),
    }
    past = {f"past_{n}": rng.normal(size=(6, PAGE, kv, size)).astype(np.float16) for n in "kv"}
    model = onnx.load(path)
    with_twins(model)
    twin = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = twin.run(["y", "new_k", "new_v"], given | {n: a.copy() for n, a in past.items()})
    ort.preload_dlls()
    session = ort.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    placed = {n: ort.OrtValue.ortvalue_from_numpy(a, "cuda", 0) for n, a in past.items()}
    for name, array in given.items():
        device = "cpu" if name == "bounds" else "cuda"
        placed[name] = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
    placed["y"] = ort.OrtValue.ortvalue_from_shape_and_type((9, parts[0]), np.float16, "cuda", 0)
    for name, value in placed.items():
        if name != "y":
            binding.bind_ortvalue_input(name, value)
    outputs = ("y", "past_k", "past_v")
    for name, at in zip(("y", "new_k", "new_v"), outputs, strict=True):
        binding.bind_ortvalue_output(name, placed[at])
    session.run_with_iobinding(binding)
    for name, expected in zip(outputs, wanted, strict=True):
        begin = 0 if name == "y" else 1  # page 0 is for what belongs to no row
        difference = placed[name].numpy()[begin:].astype(np.float32) - expected[begin:]
        assert np.abs(difference).max() < 0.02
