"""The Triton kernel of the verification op: its decisions in Triton's CPU interpreter, what it
compiles to without a GPU, and how it is launched.

The interpreter takes a tile of rows at once. A GPU takes one row a program, and so does
`test_a_row_does_not_depend_on_its_company`.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from interpreted import interpret, noise, prepare, replay
from scipy import stats
from verify_calls import (
    SETTINGS,
    Call,
    Result,
    assert_same,
    broken_logits,
    dirty_padding,
    make_call,
)

from dspark_batch.decode.algorithm import sampling
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import launch
from dspark_batch.models.plugin.contract import INPUT_NAMES, OUTPUT_NAMES
from dspark_batch.models.plugin.launch import CudaLauncher, Kernel, VerifyCall, compile_kernels

pytest.importorskip("torch")
triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Processes in which Triton interprets."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=prepare) as executor:
        yield executor


class Body:
    """The kernel as a body of the op."""

    def __init__(self, pool: Executor, *sizes: int | None) -> None:
        self._pool, self._sizes = pool, sizes

    def __call__(self, call: Call) -> Result:
        return self._pool.submit(interpret, call, *self._sizes).result()


@pytest.fixture(scope="module")
def body(pool: Executor) -> Body:
    return Body(pool, 16)


# decisions ----------------------------------------------------------------------------------------


def rows_of(name: str) -> dict[str, Any]:
    """Settings whose rows fill a tile; the interpreter takes as long for more of them."""
    return SETTINGS[name] | {"rows": 128 if "rows" in SETTINGS[name] else 512}


@pytest.mark.parametrize("name", SETTINGS)
def test_kernel_decides_as_the_specification(name: str, pool: Executor) -> None:
    """Vocabularies of 37 and 700 tokens are no multiples of the slices. Lists of 16 tokens are too
    short for some cells, and for some of these also between the finer thresholds."""
    settings = rows_of(name)
    call = make_call(seed=11, **settings)
    sizes = (256, None, 64) if "vocab" in settings else (16,)
    outcomes = assert_same(call, Body(pool, *sizes))
    assert len(outcomes) == (1 if SETTINGS[name].get("drafts") == 0 else 2)


def test_one_row_a_program_in_slices_of_the_gpu_s_size(pool: Executor) -> None:
    call = make_call(
        seed=13,
        rows=4,
        vocab=2 * launch.SLICE + 5,
        gamma=2,
        draft_vocab=launch.SLICE + 7,
        temperature=[0.0, 1.0],
        top_k=[0, 50],
        top_p=[0.9, 1.0],
        spread=4.0,
    )
    assert set(call.temperature) == {0.0, 1.0}
    assert_same(call, Body(pool, launch.SLICE, 1, launch.CAPACITY))


@pytest.mark.parametrize("vocab", [15, 16, 17, 31, 32, 33])
def test_a_vocabulary_may_end_anywhere_in_a_slice(vocab: int, body: Body) -> None:
    call = make_call(
        seed=24,
        rows=128,
        vocab=vocab,
        draft_vocab=min(vocab, 16),
        gamma=1,
        temperature=[0.0, 1.0],
        top_k=[0, 3, vocab - 1],
        top_p=[0.7, 1.0],
    )
    assert_same(call, body)


def test_a_vocabulary_may_have_more_slices_than_are_read_at_a_time(pool: Executor) -> None:
    """34 slices of 8 tokens, read by 32."""
    call = make_call(
        seed=25,
        rows=32,
        vocab=34 * 8 - 3,
        gamma=1,
        draft_vocab=33 * 8,
        temperature=[0.0, 1.0, 0.3],
        top_k=[0, 10, 100],
        top_p=[0.9, 1.0],
    )
    assert_same(call, Body(pool, 8, None, 512))


@pytest.mark.parametrize("capacity", [1, 4, 64])
def test_a_list_of_any_length_finds_the_same_threshold(capacity: int, pool: Executor) -> None:
    """No list, some, and one for every cell."""
    call = make_call(
        seed=26,
        rows=128,
        gamma=1,
        temperature=[0.3, 1.0, 50.0],
        top_k=[0, 2, 9, 36],
        top_p=[0.2, 0.9, 1.0],
    )
    assert_same(call, Body(pool, 16, None, capacity))


def test_a_call_does_not_depend_on_what_the_workspace_held(pool: Executor) -> None:
    """Other operands at the same address, as when a CUDA graph is replayed."""
    settings = {"temperature": [0.0, 0.9], "top_k": [0, 3], "top_p": [0.8, 1.0], "rows": 64}
    calls = [make_call(seed=seed, draft_vocab=20, gamma=2, **settings) for seed in (27, 28)]  # type: ignore[arg-type]
    alone = [pool.submit(interpret, call) for call in calls]
    replayed = pool.submit(replay, [*calls, calls[0]]).result()
    for found, future in zip(replayed, [*alone, alone[0]], strict=True):
        for a, b in zip(found, future.result(), strict=True):
            np.testing.assert_array_equal(a, b)


def one_hot(tokens: Any, vocab: int) -> Any:
    """Logits of which one has all the mass."""
    return np.where(np.arange(vocab) == np.asarray(tokens)[..., None], 0, -1e4).astype(np.float32)


def test_a_one_hot_target_accepts_its_token_alone(body: Body) -> None:
    call = make_call(seed=29, rows=128, temperature=1.0, top_k=[0, 4], top_p=[0.5, 1.0], noise=0)
    sure = np.arange(len(call.logits)) % 37
    call = replace(call, logits=one_hot(sure, 37))
    accepted, bonus = body(call)
    right = call.draft_tokens == sure[call.logit_rows[:, :-1]]
    planned = np.arange(right.shape[1]) < call.lengths[:, None]
    np.testing.assert_array_equal(accepted, np.cumprod(right & planned, axis=1).sum(axis=1))
    ends = call.logit_rows[np.arange(128), accepted]
    np.testing.assert_array_equal(bonus, sure[ends])
    assert len(set(accepted)) > 1


def test_disjoint_supports_reject_and_a_residual_of_one_token_is_drawn(body: Body) -> None:
    """The draft proposes the lower half, which the target has nothing of; then all but one token of
    what the target has as well, so that only that one is left."""
    rows, vocab, half = 64, 37, 18
    call = make_call(seed=30, rows=rows, temperature=1.0, gamma=2)
    logits = call.logits.copy()
    logits[:, :half] = -1e4
    low = np.where(np.arange(vocab) < half, np.float32(0), -np.inf).astype(np.float32)
    tokens = np.full_like(call.draft_tokens, 5)
    draft_logits = np.broadcast_to(low, call.draft_logits.shape).copy()
    call = replace(call, logits=logits, draft_tokens=tokens, draft_logits=draft_logits)
    accepted, bonus = body(call)
    assert not accepted.any()
    assert (bonus >= half).all()
    assert_same(call, body)

    one = np.where(np.arange(vocab) < 2, np.float32(0), np.float32(-1e4))
    first = np.where(np.arange(vocab) == 0, np.float32(0), -np.inf).astype(np.float32)
    call = replace(
        call,
        logits=np.broadcast_to(one, logits.shape).copy(),
        draft_tokens=np.zeros_like(tokens),
        draft_logits=np.broadcast_to(first, draft_logits.shape).copy(),
        lengths=np.full(rows, 2),
    )
    accepted, bonus = body(call)  # half of the drafts are accepted
    assert set(accepted) == {0, 1, 2}
    assert (bonus[accepted < 2] == 1).all()
    assert set(bonus[accepted == 2]) == {0, 1}


def test_padding_may_hold_anything(body: Body) -> None:
    call = make_call(seed=14, rows=128, temperature=[0.0, 1.0], top_p=[0.8, 1.0])
    clean = body(call)
    for garbage in (-1, 10**9):
        for a, b in zip(body(dirty_padding(call, garbage)), clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_first_token_and_filters_keep_all_of_them(body: Body) -> None:
    call = make_call(
        seed=15, rows=128, temperature=[0.0, 1.0], top_k=[0, 1, 2, 5], top_p=[0.5, 1.0], vocab=40
    )
    assert_same(replace(call, logits=np.round(call.logits)), body)  # a dozen values
    flat = replace(call, logits=np.zeros_like(call.logits))
    assert_same(flat, body)
    greedy = (call.temperature == 0) & (call.lengths == 0)
    assert greedy.any()
    assert not body(flat)[1][greedy].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_marks_its_row_and_no_other(value: float, body: Body) -> None:
    call = make_call(seed=16, rows=128, temperature=[0.0, 1.0], top_p=[0.9, 1.0])
    clean = body(call)
    broken, hit = broken_logits(call, value)
    accepted, bonus = body(broken)
    assert (bonus[hit] == -1).all()
    assert not accepted[hit].any()
    np.testing.assert_array_equal(accepted[~hit], clean[0][~hit])
    np.testing.assert_array_equal(bonus[~hit], clean[1][~hit])


@pytest.mark.parametrize("draft_vocab", [None, 11])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_draft_that_is_not_finite_costs_acceptance_only(
    value: float, draft_vocab: int | None, body: Body
) -> None:
    call = make_call(seed=17, rows=128, temperature=1.0, draft_vocab=draft_vocab)
    draft_logits = call.draft_logits.copy()
    draft_logits[::2, 1] = value  # a whole position; one -inf is how a filtered draft looks
    broken = replace(call, draft_logits=draft_logits)
    assert_same(broken, body)
    assert body(broken)[0][::2].max() == 1
    assert body(call)[0][::2].max() > 1


def test_a_filtered_draft_is_no_broken_one(body: Body) -> None:
    call = make_call(seed=18, rows=128, temperature=1.0)
    draft_logits = call.draft_logits.copy()
    draft_logits[draft_logits < np.quantile(draft_logits, 0.5)] = -np.inf
    assert_same(replace(call, draft_logits=draft_logits), body)


def test_a_row_does_not_depend_on_its_company(pool: Executor, body: Body) -> None:
    settings = {"temperature": [0.0, 0.9], "top_k": [0, 3], "top_p": [0.8, 1.0]}
    call = make_call(seed=19, rows=8, draft_vocab=20, **settings)  # type: ignore[arg-type]
    alone = Body(pool, 16, 1)
    for a, b in zip(alone(call), body(call), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_draft_like_the_target_leaves_the_bonus_to_the_target(body: Body) -> None:
    """The residual after a rejection has no mass then; uniforms of 1 force the rejection."""
    call = make_call(seed=20, rows=128, temperature=1.0, noise=0.0)
    uniforms = call.uniforms.copy()
    uniforms[:, :-1] = 1.0
    call = replace(call, uniforms=uniforms)
    accepted, bonus = body(call)
    assert (accepted < call.lengths).any()
    wanted = call.specified()
    np.testing.assert_array_equal(accepted, wanted[0])
    np.testing.assert_array_equal(bonus, wanted[1])


def test_no_value_leads_out_of_the_arrays(body: Body) -> None:
    """A builder times the plugin on values of its own."""
    call = make_call(seed=22, rows=128, temperature=[0.0, 0.9], draft_vocab=11, top_p=[0.8, 1.0])
    rng = np.random.default_rng(23)
    wild = np.array([-(2**62), -1, len(call.logits), 2**40, 2**62])
    rows = np.where(
        rng.random(call.logit_rows.shape) < 0.5,
        rng.choice(wild, call.logit_rows.shape),
        call.logit_rows,
    )
    found = body(replace(call, logit_rows=rows))
    near = np.clip(rows, 0, len(call.logits) - 1)
    for a, b in zip(found, body(replace(call, logit_rows=near)), strict=True):
        np.testing.assert_array_equal(a, b)
    integers = ("logit_rows", "draft_tokens", "lengths", "certain", "draft_vocab", "top_k")
    noise = {name: rng.choice(wild, getattr(call, name).shape) for name in integers}
    accepted, bonus = body(replace(call, **noise))
    assert set(accepted) <= set(range(call.draft_tokens.shape[1] + 1))
    assert set(bonus) <= set(range(-1, call.logits.shape[1]))


@pytest.mark.parametrize("draft_vocab", [6, 4])
def test_emitted_tokens_have_the_target_s_law(draft_vocab: int, pool: Executor) -> None:
    """The first token after each of two anchors, filtered by top-p."""
    rows, vocab = 2**14, 6
    rng = np.random.default_rng(21)
    logits = (rng.standard_normal((2, vocab)) * 1.5).astype(np.float32)
    kept = np.sort(rng.permutation(vocab)[:draft_vocab])
    anchor = rng.integers(0, 2, rows)
    draft_rows = logits[:, kept] + rng.standard_normal((2, draft_vocab))
    draft_logits = draft_rows[anchor][:, None].astype(np.float32)
    temperature = np.full(rows, 0.8, np.float32)
    tokens = kept[
        sampling.sample(sampling.softmax(draft_logits[:, 0], temperature), rng.random(rows))
    ]
    call = Call(
        logits,
        np.stack([anchor, anchor], axis=1),
        tokens[:, None],
        np.ones(rows, np.int64),
        np.zeros(rows, np.int64),
        draft_logits,
        kept,
        temperature,
        np.zeros(rows, np.int64),
        np.full(rows, 0.9, np.float32),
        rng.random((rows, 2), dtype=np.float32),
    )
    accepted, bonus = Body(pool, 8, 2048)(call)
    first = np.where(accepted > 0, tokens, bonus)
    law = sampling.filtered_probs(logits, np.full(2, 0.8), np.zeros(2), np.full(2, 0.9))
    assert 0.2 < accepted.mean() < 0.95
    for i in range(2):
        counts = np.bincount(first[anchor == i], minlength=vocab)
        possible = law[i] > 0
        assert not counts[~possible].any()
        expected = law[i][possible].astype(np.float64)
        expected *= counts.sum() / expected.sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


# ahead of time ------------------------------------------------------------------------------------


def test_the_parameters_are_the_contract_s() -> None:
    from dspark_batch.models.plugin.triton_kernel import dspark_verify

    assert tuple(launch.OPERANDS) == INPUT_NAMES + OUTPUT_NAMES
    assert (*INPUT_NAMES, *launch.SIZES, *OUTPUT_NAMES, "workspace") == launch.PARAMETERS
    assert dspark_verify.arg_names == [*launch.PARAMETERS, *launch.CONSTANTS]
    assert len(launch.PARAMETER_TYPES) == 13 + 5 + 1 + launch.HIDDEN_POINTERS


@pytest.mark.parametrize("arch", launch.ARCHS)
def test_every_stage_compiles_without_a_gpu(arch: int) -> None:
    kernels = compile_kernels([arch])
    assert tuple(kernel.stage for kernel in kernels) == launch.STAGES
    for kernel in kernels:
        check_compiled(kernel, arch)


def check_compiled(kernel: Kernel, arch: int) -> None:
    assert kernel.arch == arch
    assert kernel.num_threads == 256
    assert f".reqntid {kernel.num_threads}\n" in kernel.ptx
    assert kernel.shared_bytes <= 48 * 1024  # more would have to be asked for
    assert kernel.cubin[:4] == b"\x7fELF"
    assert int.from_bytes(kernel.cubin[18:20], "little") == 190  # machine: CUDA
    target, version = (re.search(rf"\.{key} (\S+)", kernel.ptx) for key in ("target", "version"))
    assert target is not None
    assert target[1] == f"sm_{arch}" + ("a" if arch >= 90 else "")
    assert version is not None
    assert int(version[1].replace(".", "")) == launch.PTX_VERSIONS[arch] < 90  # CUDA 13.0 has 9.0
    assert launch.parameter_bytes(kernel.ptx) == [8] * 11 + [4] * 5 + [8] * 5
    folder = str(inspect.getfile(launch)).rsplit("/", 1)[0]
    assert folder not in kernel.ptx
    assert folder.encode() not in kernel.cubin
    assert "fma.rn" not in kernel.ptx


def test_an_architecture_without_a_kernel_is_refused() -> None:
    with pytest.raises(EngineError, match=r"(?s)sm_70.*choose from sm_75, .*sm_120"):
        compile_kernels([70])


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EngineError, match=r"(?s)Triton.*not installed.*pip install"):
        compile_kernels([89])


def test_another_calling_convention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PARAMETER_TYPES", launch.PARAMETER_TYPES[:-1])
    with pytest.raises(EngineError, match=r"(?s)other parameters.*triton==3.9"):
        compile_kernels([89])


# launch -------------------------------------------------------------------------------------------

KERNELS = tuple(
    Kernel(arch=89, stage=stage, num_threads=256, shared_bytes=128 * i, cubin=bytes([i]))
    for i, stage in enumerate(launch.STAGES)
)
CALL = VerifyCall(tuple(range(1000, 1013)), 3, 15, 9000, 20, 4, 7, 5000)


def parameters_at(address: int) -> list[int]:
    """What CUDA reads of the parameters of a launch."""
    kinds = launch.PARAMETER_TYPES
    pointers = (ctypes.c_void_p * len(kinds)).from_address(address)
    return [kind.from_address(p).value or 0 for kind, p in zip(kinds, pointers, strict=True)]


class FakeDriver:
    """What `CudaLauncher` uses of `cuda.bindings.driver`, on a device of capability 8.9."""

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = "major"
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "minor"

    def __init__(self, **statuses: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.passed: list[list[int]] = []
        self._statuses = statuses

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            first = arguments[0] if arguments else None
            values: dict[str, list[Any]] = {
                "cuCtxGetDevice": [0],
                "cuDeviceGetAttribute": [8 if first == "major" else 9],
                "cuLibraryLoadData": [f"library of {first!r}"],
                "cuLibraryGetKernel": [f"kernel in {first}"],
                "cuKernelGetFunction": [f"function of {first}"],
                "cuLaunchKernel": [],
            }
            if name == "cuLaunchKernel":  # CUDA copies them, and they are gone after the call
                self.passed.append(parameters_at(arguments[-2]))
            return (self._statuses.get(name, 0), *values[name])

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]  # type: ignore[misc]


def test_every_stage_is_launched_in_order_with_all_parameters() -> None:
    driver = FakeDriver()
    launcher = CudaLauncher(KERNELS, driver=driver)
    launcher(CALL, stream=77)
    launcher(CALL, stream=78)
    loaded = [arguments[0] for arguments in driver.called("cuLibraryLoadData")]
    assert loaded == [kernel.cubin for kernel in KERNELS]
    assert {name for _, name in driver.called("cuLibraryGetKernel")} == {b"dspark_verify"}
    launches = driver.called("cuLaunchKernel")
    assert [arguments[8] for arguments in launches] == [77] * 7 + [78] * 7
    grids = [tuple(arguments[1:4]) for arguments in launches]
    # 3 rows, 5 cells, 2 slices of the target and 1 of the draft
    heavy = (3, 5, 2)
    wanted = [(3, 5, 3), heavy, heavy, heavy, (3, 5, 1), (3, 1, 2), (3, 1, 1)]
    assert grids == wanted * 2
    for arguments, kernel in zip(launches, KERNELS * 2, strict=True):
        assert repr(kernel.cubin) in arguments[0]
        assert arguments[4:8] == [256, 1, 1, kernel.shared_bytes]
    values = [*range(1000, 1011), 15, 9000, 20, 4, 7, 1011, 1012, 5000, 0, 0]
    assert driver.passed == [values] * 14


def test_a_gpu_of_another_architecture_is_named() -> None:
    with pytest.raises(EngineError, match=r"(?s)this GPU is sm_89.*sm_120 only.*--gpu-arch 89"):
        CudaLauncher([replace(KERNELS[0], arch=120)], driver=FakeDriver())(CALL, stream=0)


@pytest.mark.parametrize("name", ["cuCtxGetDevice", "cuLibraryLoadData", "cuLaunchKernel"])
def test_what_cuda_refuses_is_told(name: str) -> None:
    driver = FakeDriver(**{name: 719})
    with pytest.raises(EngineError, match=r"CUDA refused.*719"):
        CudaLauncher(KERNELS, driver=driver)(CALL, stream=0)


def test_a_missing_binding_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"(?s)cuda-bindings.*not installed.*pip install"):
        CudaLauncher(KERNELS)(CALL, stream=0)


def has_driver() -> bool:
    try:
        from cuda.bindings import driver

        return bool(driver.cuInit(0)[0] == 0)
    except (ImportError, RuntimeError):
        return False


needs_no_gpu = pytest.mark.skipif(has_driver(), reason="there is a GPU")
needs_gpu = pytest.mark.skipif(not has_driver(), reason="needs an NVIDIA GPU")


@needs_no_gpu
def test_a_missing_driver_is_named() -> None:
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(EngineError, match=r"(?s)no NVIDIA driver on this machine.*nvidia-smi"):
        CudaLauncher(KERNELS)(CALL, stream=0)


@needs_no_gpu
def test_the_real_bindings_take_what_is_passed() -> None:
    """They convert the arguments, a TypeError if they cannot, before they look for the driver."""
    driver = pytest.importorskip("cuda.bindings.driver")
    fake = FakeDriver()
    CudaLauncher(KERNELS, driver=fake)(CALL, stream=77)
    kinds = {"library": driver.CUlibrary, "kernel": driver.CUkernel, "function": driver.CUfunction}
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR

    def real_of(argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        kind = kinds.get(argument.split()[0])
        return attribute if kind is None else kind(1)

    assert len(fake.calls) == 3 + 4 * len(KERNELS)
    for name, *arguments in fake.calls:
        real = [real_of(argument) for argument in arguments]
        with pytest.raises(RuntimeError, match="driver library"):
            getattr(driver, name)(*real)
    with pytest.raises(TypeError):
        driver.cuLibraryLoadData(object(), [], [], 0, [], [], 0)


# on a GPU -----------------------------------------------------------------------------------------


def run_on_gpu(call: Call) -> Result:
    """One call on the first device."""
    return run_all_on_gpu([call])[0]


def run_all_on_gpu(calls: list[Call]) -> list[Result]:
    """Calls of one shape, each with copies of its arrays, all in one workspace."""
    from cuda.bindings import driver

    def checked(returned: tuple[Any, ...]) -> Any:
        assert returned[0] == 0, returned
        return returned[1] if len(returned) > 1 else None

    def copied(array: Any) -> Any:
        address = checked(driver.cuMemAlloc(max(array.nbytes, 1)))
        if array.nbytes:
            checked(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
        return address

    capability = driver.CUdevice_attribute
    device = checked(driver.cuDeviceGet(0))
    checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(device))))
    major, minor = (
        checked(driver.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            capability.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            capability.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    launcher = CudaLauncher(compile_kernels([10 * major + minor]))
    num_rows, num_drafts = calls[0].draft_tokens.shape
    _, gamma, draft_vocab_size = calls[0].draft_logits.shape
    sizes = (num_rows, *calls[0].logits.shape, draft_vocab_size, num_drafts, gamma)
    num_bytes = launch.workspace_bytes(num_rows, num_drafts, sizes[2], draft_vocab_size)
    workspace = copied(noise(num_bytes // 4))
    found = []
    for call in calls:
        results = [np.full(num_rows, -7, np.int64) for _ in OUTPUT_NAMES]
        arrays = [*(np.ascontiguousarray(call.feeds[name]) for name in INPUT_NAMES), *results]
        addresses = [copied(array) for array in arrays]
        launcher(VerifyCall(tuple(map(int, addresses)), *sizes, int(workspace)), stream=0)
        checked(driver.cuStreamSynchronize(0))
        for address, result in zip(addresses[-len(OUTPUT_NAMES) :], results, strict=True):
            checked(driver.cuMemcpyDtoH(result.ctypes.data, address, result.nbytes))
        for address in addresses:
            checked(driver.cuMemFree(address))
        found.append((results[0], results[1]))
    checked(driver.cuMemFree(workspace))
    return found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_a_gpu_decides_as_the_specification(name: str) -> None:
    for seed in range(3):
        assert_same(make_call(seed=seed, **SETTINGS[name]), run_on_gpu)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_takes_a_vocabulary_of_151936_tokens() -> None:
    settings = {"temperature": [0.0, 0.8], "top_k": [0, 50], "top_p": [0.9, 1.0], "spread": 4.0}
    call = make_call(seed=0, rows=32, vocab=151_936, gamma=7, draft_vocab=32_000, **settings)  # type: ignore[arg-type]
    assert_same(call, run_on_gpu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("vocab", [launch.SLICE - 1, launch.SLICE, launch.SLICE + 1, 60_000])
def test_a_gpu_repeats_itself_in_a_workspace_of_other_calls(vocab: int) -> None:
    settings = {"temperature": [0.0, 0.8, 30.0], "top_k": [0, 50], "top_p": [0.9, 1.0]}
    calls = [make_call(seed=seed, rows=24, vocab=vocab, gamma=3, **settings) for seed in (1, 2)]  # type: ignore[arg-type]
    first, second, again = run_all_on_gpu([*calls, calls[0]])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for call, found in zip(calls, (first, second), strict=True):
        assert_same(call, lambda _, found=found: found)  # type: ignore[misc]
