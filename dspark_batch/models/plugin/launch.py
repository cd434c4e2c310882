"""Compile the verification kernel ahead of time, and launch its stages on the current CUDA device.

Compiling needs `triton` and no GPU. Launching needs `cuda-bindings` and a driver, and no Triton.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dspark_batch.errors import EngineError
from dspark_batch.models.plugin.contract import INPUT_NAMES, OPERANDS, OUTPUT_NAMES

KERNEL_NAME = "dspark_verify"
# One launch each, in this order; `triton_kernel` says what they do.
STAGES = ("survey", "coarse", "fine", "gather", "judge", "weigh", "draw")
SLICE = 8192  # tokens of the vocabulary that one program serves
CAPACITY = 4096  # tokens of a cell among which the filters' threshold is searched for
WAYS = 16
VERDICTS = 8
NUM_WARPS = 8
# Compute capability -> the oldest PTX version that has it, times ten. Triton's own choice is the
# newest that its assembler knows, which an older driver refuses.
PTX_VERSIONS = {75: 80, 80: 80, 86: 80, 89: 80, 90: 80, 100: 87, 120: 87}
ARCHS = tuple(PTX_VERSIONS)
SIZES = ("num_logits", "vocab_size", "draft_vocab_size", "num_drafts", "block_size")
PARAMETERS = (*INPUT_NAMES, *SIZES, *OUTPUT_NAMES, "workspace")
"""The kernel's, in order. Every stage takes all of them."""
CONSTANTS = ("STAGE", "ROWS", "SLICE", "CAPACITY")
_POINTERS = {"float32": "*fp32", "int64": "*i64"}
# Triton appends two pointers to scratch memory. This kernel uses none, so they are null.
HIDDEN_POINTERS = 2
PARAMETER_TYPES = (
    *(ctypes.c_int32 if name in SIZES else ctypes.c_void_p for name in PARAMETERS),
    *(ctypes.c_void_p,) * HIDDEN_POINTERS,
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One stage compiled for sm_`arch`, and what a launch must know of it."""

    arch: int
    stage: str
    """One of `STAGES`."""
    num_threads: int
    shared_bytes: int
    cubin: bytes
    ptx: str = ""
    """What the cubin was assembled from; empty for a kernel that is read from an engine."""


@dataclass(frozen=True, slots=True)
class VerifyCall:
    """One call: device addresses of the inputs and outputs, the sizes R, N, V, D, K and γ, and the
    address of `workspace_bytes` of scratch memory, which may hold anything."""

    pointers: tuple[int, ...]
    num_rows: int
    num_logits: int
    vocab_size: int
    draft_vocab_size: int
    num_drafts: int
    block_size: int
    workspace: int


def workspace_bytes(
    num_rows: int,
    num_drafts: int,
    vocab_size: int,
    draft_vocab_size: int,
    *,
    slice_size: int = SLICE,
    capacity: int = CAPACITY,
) -> int:
    """Scratch memory of a call. `triton_kernel` says what is where; it grows with every size."""
    slices, draft_slices = -(-vocab_size // slice_size), -(-draft_vocab_size // slice_size)
    record = (6 + 4 * WAYS) * slices + 2 * draft_slices + VERDICTS + capacity
    return 4 * (vocab_size + num_rows * (num_drafts + 1) * record)


def grid(
    stage: str,
    num_rows: int,
    num_drafts: int,
    vocab_size: int,
    draft_vocab_size: int,
    *,
    slice_size: int = SLICE,
) -> tuple[int, int, int]:
    """Programs of a stage: rows, cells, slices."""
    slices, draft_slices = -(-vocab_size // slice_size), -(-draft_vocab_size // slice_size)
    cells = 1 if stage in ("weigh", "draw") else num_drafts + 1
    parts = {"survey": slices + draft_slices, "judge": 1, "draw": 1}.get(stage, slices)
    return num_rows, cells, parts


class Launcher(Protocol):
    """What runs a call, without waiting for it."""

    def __call__(self, call: VerifyCall, stream: int) -> None:
        """Enqueue the stages on `stream`, the address of a CUDA stream."""


def compile_kernels(archs: Iterable[int] = ARCHS) -> tuple[Kernel, ...]:
    """Every stage for each architecture.

    What was compiled before comes from Triton's cache (`TRITON_CACHE_DIR`).

    Raises:
        EngineError: Triton is missing, has no such architecture, or is of a version that compiles
            the kernel to something that `CudaLauncher` does not launch.
    """
    return tuple(_compile(arch, stage) for arch in archs for stage in STAGES)


def _compile(arch: int, stage: str) -> Kernel:
    if arch not in ARCHS:
        known = ", ".join(f"sm_{known}" for known in ARCHS)
        raise EngineError(
            f"there is no verification kernel for sm_{arch}", hint=f"choose from {known}"
        )
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise EngineError(
            "Triton, which compiles the verification kernel, is not installed",
            hint='pip install "dspark-batch[tensorrt-rtx]"',
        ) from error
    from dspark_batch.models.plugin.triton_kernel import dspark_verify

    signature = dict.fromkeys(PARAMETERS, "i32")
    signature |= {name: _POINTERS[operand.dtype] for name, operand in OPERANDS.items()}
    signature |= {"workspace": "*fp32"} | dict.fromkeys(CONSTANTS, "constexpr")
    constants = (STAGES.index(stage), 1, SLICE, CAPACITY)
    with triton.knobs.compilation.scope():
        # Line information names the folders of this machine.
        triton.knobs.compilation.disable_line_info = True
        built = triton.compile(
            ASTSource(dspark_verify, signature, dict(zip(CONSTANTS, constants, strict=True))),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": NUM_WARPS,
                "ptx_version": PTX_VERSIONS[arch],
                # Weights are compared with a threshold that other stages found among them, so
                # every stage must round alike.
                "enable_fp_fusion": False,
            },
        )
    metadata, ptx = built.metadata, built.asm["ptx"]
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    wanted = [ctypes.sizeof(kind) for kind in PARAMETER_TYPES]
    if metadata.name != KERNEL_NAME or parameter_bytes(ptx) != wanted or scratch:
        raise EngineError(
            f"Triton {triton.__version__} compiles the verification kernel to other parameters "
            "than this program launches",
            hint='pip install "triton==3.9.*"',
        )
    num_threads = metadata.num_warps * metadata.warp_size
    return Kernel(arch, stage, num_threads, metadata.shared, built.asm["cubin"], ptx)


def parameter_bytes(ptx: str) -> list[int]:
    """Size of each parameter of the entry in `ptx`."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param \.[a-z](\d+) ", entry[: entry.index("{")])
    return [int(bits) // 8 for bits in found]


class CudaLauncher:
    """Launches the stages for the current device, through the CUDA driver API.

    The cubins are loaded once, at the first launch; CUDA hands them to every context that uses
    them. `driver` stands in for `cuda.bindings.driver`.
    """

    def __init__(self, kernels: Sequence[Kernel], *, driver: Any = None) -> None:
        self._kernels: dict[int, list[Kernel]] = {}
        for kernel in kernels:
            self._kernels.setdefault(kernel.arch, []).append(kernel)
        self._driver = driver
        self._loaded: dict[int, list[Any]] = {}

    def __call__(self, call: VerifyCall, stream: int) -> None:
        """Enqueue every stage.

        Raises:
            EngineError: no driver, no kernel for this device, or CUDA refuses.
        """
        driver = self._driver = self._driver or _cuda_driver()
        kernels = self._kernels_of_device(driver)
        arch = kernels[0].arch
        if arch not in self._loaded:
            self._loaded[arch] = [_handle(driver, kernel) for kernel in kernels]
        named = dict(zip(OPERANDS, call.pointers, strict=True))
        named |= {name: getattr(call, name) for name in (*SIZES, "workspace")}
        values = (*(named[name] for name in PARAMETERS), *(0,) * HIDDEN_POINTERS)
        # Converted once for all stages. CUDA copies them within the launch.
        held = [kind(value) for kind, value in zip(PARAMETER_TYPES, values, strict=True)]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        sizes = (call.num_rows, call.num_drafts, call.vocab_size, call.draft_vocab_size)
        for kernel, handle in zip(kernels, self._loaded[arch], strict=True):
            _checked(
                driver.cuLaunchKernel(
                    _checked(driver.cuKernelGetFunction(handle)),
                    *grid(kernel.stage, *sizes),
                    *(kernel.num_threads, 1, 1),
                    kernel.shared_bytes,
                    stream,
                    ctypes.addressof(addresses),
                    0,
                )
            )

    def _kernels_of_device(self, driver: Any) -> list[Kernel]:
        arch = _arch_of(driver, _checked(driver.cuCtxGetDevice()))
        if arch not in self._kernels:
            there = ", ".join(f"sm_{arch}" for arch in self._kernels)
            raise EngineError(
                f"this GPU is sm_{arch}, but the engine has the verification kernel for {there} "
                "only",
                hint=f"build the engine with --gpu-arch {arch}",
            )
        return self._kernels[arch]


def _handle(driver: Any, kernel: Kernel) -> Any:
    library = _checked(driver.cuLibraryLoadData(kernel.cubin, [], [], 0, [], [], 0))
    return _checked(driver.cuLibraryGetKernel(library, KERNEL_NAME.encode()))


def _arch_of(driver: Any, device: Any) -> int:
    names = driver.CUdevice_attribute
    major, minor = (
        _checked(driver.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(10 * major + minor)


def _cuda_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(
            "cuda-bindings, which launches the verification kernel, is not installed",
            hint='pip install "dspark-batch[tensorrt-rtx]"',
        ) from error
    try:
        _checked(driver.cuInit(0))
    except RuntimeError as error:  # how cuda-bindings says that it found no libcuda
        raise EngineError(
            f"there is no NVIDIA driver on this machine ({error})",
            hint="run where nvidia-smi shows a GPU; building needs none",
        ) from error
    return driver


def _checked(returned: tuple[Any, ...]) -> Any:
    """The values that a driver call returned after its status."""
    status, *values = returned
    if status != 0:
        raise EngineError(f"CUDA refused to launch the verification kernel: {status!r}")
    return values[0] if values else None
