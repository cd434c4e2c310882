"""Compile the verification kernel ahead of time, and launch it on the current CUDA device.

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
BLOCK = 2048  # tokens that a program reads at a time
NUM_WARPS = 16
# Compute capability -> the oldest PTX version that has it, times ten. Triton's own choice is the
# newest that its assembler knows, which an older driver refuses.
PTX_VERSIONS = {75: 80, 80: 80, 86: 80, 89: 80, 90: 80, 100: 87, 120: 87}
ARCHS = tuple(PTX_VERSIONS)
SIZES = ("num_logits", "vocab_size", "draft_vocab_size", "num_drafts", "block_size")
PARAMETERS = (*INPUT_NAMES, *SIZES, *OUTPUT_NAMES)
"""The kernel's, in order."""
_POINTERS = {"float32": "*fp32", "int64": "*i64"}
# Triton appends two pointers to scratch memory. This kernel uses none, so they are null.
HIDDEN_POINTERS = 2
PARAMETER_TYPES = (
    *(ctypes.c_int32 if name in SIZES else ctypes.c_void_p for name in PARAMETERS),
    *(ctypes.c_void_p,) * HIDDEN_POINTERS,
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel compiled for sm_`arch`, and what a launch must know of it."""

    arch: int
    num_threads: int
    shared_bytes: int
    cubin: bytes
    ptx: str = ""
    """What the cubin was assembled from; empty for a kernel that is read from an engine."""


@dataclass(frozen=True, slots=True)
class VerifyCall:
    """One call: device addresses of the inputs and outputs, and the sizes R, N, V, D, K and γ."""

    pointers: tuple[int, ...]
    num_rows: int
    num_logits: int
    vocab_size: int
    draft_vocab_size: int
    num_drafts: int
    block_size: int


class Launcher(Protocol):
    """What runs a call, without waiting for it."""

    def __call__(self, call: VerifyCall, stream: int) -> None:
        """Enqueue the kernel on `stream`, the address of a CUDA stream."""


def compile_kernels(archs: Iterable[int] = ARCHS) -> tuple[Kernel, ...]:
    """The kernel for each architecture.

    What was compiled before comes from Triton's cache (`TRITON_CACHE_DIR`).

    Raises:
        EngineError: Triton is missing, has no such architecture, or is of a version that compiles
            the kernel to something that `CudaLauncher` does not launch.
    """
    return tuple(map(_compile, archs))


def _compile(arch: int) -> Kernel:
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
    signature |= {"ROWS": "constexpr", "BLOCK": "constexpr"}
    with triton.knobs.compilation.scope():
        # Line information names the folders of this machine.
        triton.knobs.compilation.disable_line_info = True
        built = triton.compile(
            ASTSource(dspark_verify, signature, {"ROWS": 1, "BLOCK": BLOCK}),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": NUM_WARPS,
                "ptx_version": PTX_VERSIONS[arch],
                # Weights are compared with a threshold that other passes found among them, so
                # every pass must round alike.
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
    return Kernel(arch, num_threads, metadata.shared, built.asm["cubin"], ptx)


def parameter_bytes(ptx: str) -> list[int]:
    """Size of each parameter of the entry in `ptx`."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param \.[a-z](\d+) ", entry[: entry.index("{")])
    return [int(bits) // 8 for bits in found]


class CudaLauncher:
    """Launches the kernel of the current device, through the CUDA driver API.

    The cubin is loaded once, at the first launch; CUDA hands it to every context that uses it.
    `driver` stands in for `cuda.bindings.driver`.
    """

    def __init__(self, kernels: Sequence[Kernel], *, driver: Any = None) -> None:
        self._kernels = {kernel.arch: kernel for kernel in kernels}
        self._driver = driver
        self._loaded: dict[int, Any] = {}

    def __call__(self, call: VerifyCall, stream: int) -> None:
        """Enqueue the kernel.

        Raises:
            EngineError: no driver, no kernel for this device, or CUDA refuses.
        """
        driver = self._driver = self._driver or _cuda_driver()
        kernel = self._kernel_of_device(driver)
        if kernel.arch not in self._loaded:
            library = _checked(driver.cuLibraryLoadData(kernel.cubin, [], [], 0, [], [], 0))
            handle = _checked(driver.cuLibraryGetKernel(library, KERNEL_NAME.encode()))
            self._loaded[kernel.arch] = handle
        function = _checked(driver.cuKernelGetFunction(self._loaded[kernel.arch]))
        named = dict(zip(OPERANDS, call.pointers, strict=True))
        named |= {name: getattr(call, name) for name in SIZES}
        values = (*(named[name] for name in PARAMETERS), *(0,) * HIDDEN_POINTERS)
        grid, block = (call.num_rows, 1, 1), (kernel.num_threads, 1, 1)
        parameters = (values, PARAMETER_TYPES)
        _checked(
            driver.cuLaunchKernel(
                function, *grid, *block, kernel.shared_bytes, stream, parameters, 0
            )
        )

    def _kernel_of_device(self, driver: Any) -> Kernel:
        arch = _arch_of(driver, _checked(driver.cuCtxGetDevice()))
        if arch not in self._kernels:
            there = ", ".join(f"sm_{arch}" for arch in self._kernels)
            raise EngineError(
                f"this GPU is sm_{arch}, but the engine has the verification kernel for {there} "
                "only",
                hint=f"build the engine with --gpu-arch {arch}",
            )
        return self._kernels[arch]


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
