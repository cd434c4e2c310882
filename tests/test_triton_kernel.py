"""The Triton kernel of the verification op: its decisions in Triton's CPU interpreter, what it
compiles to without a GPU, and how it is launched.

The interpreter takes a tile of rows at once. A GPU takes one row a program, and so does
`test_a_row_does_not_depend_on_its_company`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from interpreted import interpret, prepare
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
GPU_BLOCK = launch.BLOCK


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Processes in which Triton interprets."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=prepare) as executor:
        yield executor


class Body:
    """The kernel as a body of the op."""

    def __init__(self, pool: Executor, block: int, tile: int | None = None) -> None:
        self._pool, self._block, self._tile = pool, block, tile

    def __call__(self, call: Call) -> Result:
        return self._pool.submit(interpret, call, self._block, self._tile).result()


@pytest.fixture(scope="module")
def body(pool: Executor) -> Body:
    return Body(pool, block=16)


# decisions ----------------------------------------------------------------------------------------


def rows_of(name: str) -> dict[str, Any]:
    """Settings whose rows fill tiles."""
    return SETTINGS[name] | {"rows": 64 if "rows" in SETTINGS[name] else 256}


@pytest.mark.parametrize("name", SETTINGS)
def test_kernel_decides_as_the_specification(name: str, pool: Executor) -> None:
    """Vocabularies of 37 and 700 tokens are no multiples of the blocks."""
    settings = rows_of(name)
    calls = [make_call(seed=seed, **settings) for seed in (11, 12)]
    block = 256 if "vocab" in settings else 16
    found = [pool.submit(interpret, call, block) for call in calls]
    outcomes: Counter[str] = Counter()
    for call, future in zip(calls, found, strict=True):
        outcomes += assert_same(call, lambda _, future=future: future.result())  # type: ignore[misc]
    assert len(outcomes) == (1 if SETTINGS[name].get("drafts") == 0 else 2)


def test_one_row_a_program_in_blocks_of_the_gpu_s_size(pool: Executor) -> None:
    call = make_call(
        seed=13,
        rows=4,
        vocab=3 * GPU_BLOCK + 5,
        gamma=3,
        draft_vocab=GPU_BLOCK + 7,
        temperature=[0.0, 1.0],
        top_k=[0, 50],
        top_p=[0.9, 1.0],
        spread=4.0,
    )
    assert set(call.temperature) == {0.0, 1.0}
    assert_same(call, Body(pool, block=GPU_BLOCK, tile=1))


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
    alone = Body(pool, block=16, tile=1)
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
    rows, vocab = 2**15, 6
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
    accepted, bonus = Body(pool, block=8, tile=4096)(call)
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
    assert (*INPUT_NAMES, *launch.SIZES, *OUTPUT_NAMES) == launch.PARAMETERS
    assert dspark_verify.arg_names == [*launch.PARAMETERS, "ROWS", "BLOCK"]
    assert len(launch.PARAMETER_TYPES) == 13 + 5 + launch.HIDDEN_POINTERS


@pytest.mark.parametrize("arch", launch.ARCHS)
def test_the_kernel_compiles_without_a_gpu(arch: int) -> None:
    (kernel,) = compile_kernels([arch])
    assert kernel.arch == arch
    assert kernel.num_threads == 512
    assert f".reqntid {kernel.num_threads}\n" in kernel.ptx
    assert kernel.shared_bytes <= 48 * 1024  # more would have to be asked for
    assert kernel.cubin[:4] == b"\x7fELF"
    assert int.from_bytes(kernel.cubin[18:20], "little") == 190  # machine: CUDA
    target, version = (re.search(rf"\.{key} (\S+)", kernel.ptx) for key in ("target", "version"))
    assert target is not None
    assert target[1] == f"sm_{arch}" + ("a" if arch >= 90 else "")
    assert version is not None
    assert int(version[1].replace(".", "")) == launch.PTX_VERSIONS[arch] < 90  # CUDA 13.0 has 9.0
    assert launch.parameter_bytes(kernel.ptx) == [8] * 11 + [4] * 5 + [8] * 4
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

KERNEL = Kernel(arch=89, num_threads=512, shared_bytes=256, cubin=b"\x7fELF")
CALL = VerifyCall(tuple(range(1000, 1013)), 3, 15, 50, 20, 4, 7)


class FakeDriver:
    """What `CudaLauncher` uses of `cuda.bindings.driver`, on a device of capability 8.9."""

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = "major"
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "minor"

    def __init__(self, **statuses: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._statuses = statuses

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            values: dict[str, list[Any]] = {
                "cuCtxGetDevice": [0],
                "cuDeviceGetAttribute": [8 if arguments[:1] == ("major",) else 9],
                "cuLibraryLoadData": ["library"],
                "cuLibraryGetKernel": ["kernel"],
                "cuKernelGetFunction": ["function"],
                "cuLaunchKernel": [],
            }
            return (self._statuses.get(name, 0), *values[name])

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]  # type: ignore[misc]


def test_a_launch_passes_every_parameter_in_its_place() -> None:
    driver = FakeDriver()
    launcher = CudaLauncher([KERNEL], driver=driver)
    launcher(CALL, stream=77)
    launcher(CALL, stream=78)
    assert [arguments[0] for arguments in driver.called("cuLibraryLoadData")] == [KERNEL.cubin]
    assert driver.called("cuLibraryGetKernel") == [["library", b"dspark_verify"]]
    first, second = driver.called("cuLaunchKernel")
    values = (*range(1000, 1011), 15, 50, 20, 4, 7, 1011, 1012, 0, 0)
    parameters = (values, launch.PARAMETER_TYPES)
    assert first == ["function", 3, 1, 1, 512, 1, 1, 256, 77, parameters, 0]
    assert second[8] == 78


def test_a_gpu_of_another_architecture_is_named() -> None:
    with pytest.raises(EngineError, match=r"(?s)this GPU is sm_89.*sm_120 only.*--gpu-arch 89"):
        CudaLauncher([replace(KERNEL, arch=120)], driver=FakeDriver())(CALL, stream=0)


@pytest.mark.parametrize("name", ["cuCtxGetDevice", "cuLibraryLoadData", "cuLaunchKernel"])
def test_what_cuda_refuses_is_told(name: str) -> None:
    driver = FakeDriver(**{name: 719})
    with pytest.raises(EngineError, match=r"CUDA refused.*719"):
        CudaLauncher([KERNEL], driver=driver)(CALL, stream=0)


def test_a_missing_binding_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"(?s)cuda-bindings.*not installed.*pip install"):
        CudaLauncher([KERNEL])(CALL, stream=0)


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
        CudaLauncher([KERNEL])(CALL, stream=0)


@needs_no_gpu
def test_the_real_bindings_take_what_is_passed() -> None:
    """They convert the arguments, a TypeError if they cannot, before they look for the driver."""
    driver = pytest.importorskip("cuda.bindings.driver")
    fake = FakeDriver()
    CudaLauncher([KERNEL], driver=fake)(CALL, stream=77)
    handles = {"library": driver.CUlibrary(1), "kernel": driver.CUkernel(1)}
    handles |= {"function": driver.CUfunction(1)}
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    handles |= {"major": attribute, "minor": attribute}
    assert len(fake.calls) == 7
    for name, *arguments in fake.calls:
        real = [handles.get(a, a) if isinstance(a, str) else a for a in arguments]
        with pytest.raises(RuntimeError, match="driver library"):
            getattr(driver, name)(*real)
    with pytest.raises(TypeError):
        driver.cuLibraryLoadData(object(), [], [], 0, [], [], 0)


# on a GPU -----------------------------------------------------------------------------------------


def run_on_gpu(call: Call) -> Result:
    """The kernel compiled for the first device, on copies of the call's arrays."""
    from cuda.bindings import driver

    def checked(returned: tuple[Any, ...]) -> Any:
        assert returned[0] == 0, returned
        return returned[1] if len(returned) > 1 else None

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
    num_rows, num_drafts = call.draft_tokens.shape
    _, gamma, draft_vocab_size = call.draft_logits.shape
    results = [np.full(num_rows, -7, np.int64) for _ in OUTPUT_NAMES]
    arrays = [*(np.ascontiguousarray(call.feeds[name]) for name in INPUT_NAMES), *results]
    addresses = [checked(driver.cuMemAlloc(max(array.nbytes, 1))) for array in arrays]
    for address, array in zip(addresses, arrays, strict=True):
        if array.nbytes:
            checked(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
    sizes = (num_rows, *call.logits.shape, draft_vocab_size, num_drafts, gamma)
    launcher = CudaLauncher(compile_kernels([10 * major + minor]))
    launcher(VerifyCall(tuple(map(int, addresses)), *sizes), stream=0)
    checked(driver.cuStreamSynchronize(0))
    for address, result in zip(addresses[-len(OUTPUT_NAMES) :], results, strict=True):
        checked(driver.cuMemcpyDtoH(result.ctypes.data, address, result.nbytes))
    for address in addresses:
        checked(driver.cuMemFree(address))
    return results[0], results[1]


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
