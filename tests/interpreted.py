"""The Triton kernel in Triton's CPU interpreter.

Triton reads TRITON_INTERPRET when it is imported, for its own library too: a process can either
interpret kernels or compile them. So `interpret` belongs into a process that began with `prepare`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verify_calls import Call, Result

from dspark_batch.models.plugin.contract import INPUT_NAMES, OPERANDS, OUTPUT_NAMES
from dspark_batch.models.plugin.launch import PARAMETERS, SIZES, VerifyCall


def prepare() -> None:
    """Make this process one that interprets."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"


def interpret(call: Call, block: int = 16, tile: int | None = None) -> Result:
    """Run a call, `tile` rows a program. Default: the largest power of two that divides them."""
    num_rows, num_drafts = call.draft_tokens.shape
    _, block_size, draft_vocab_size = call.draft_logits.shape
    results = [np.full(num_rows, -7, np.int64) for _ in OUTPUT_NAMES]
    operands = [np.ascontiguousarray(call.feeds[name]) for name in INPUT_NAMES]
    sizes = (*call.logits.shape, draft_vocab_size, num_drafts, block_size)
    _run([*operands, *results], sizes, block, tile or num_rows & -num_rows)
    return results[0], results[1]


class HostLauncher:
    """Stands in for `CudaLauncher`: the addresses are of arrays in host memory."""

    def __init__(self, *_: Any) -> None:
        self.streams: list[int] = []

    def __call__(self, call: VerifyCall, stream: int) -> None:
        rows, drafts, gamma = call.num_rows, call.num_drafts, call.block_size
        sizes_of = {
            "R": rows,
            "N": call.num_logits,
            "V": call.vocab_size,
            "D": call.draft_vocab_size,
        }
        sizes_of |= {"K": drafts, "K1": drafts + 1, "G": gamma, "G1": gamma + 1}
        arrays = [
            _at(address, tuple(sizes_of[size] for size in operand.shape), operand.dtype)
            for operand, address in zip(OPERANDS.values(), call.pointers, strict=True)
        ]
        sizes = tuple(getattr(call, name) for name in SIZES)
        _run(arrays, sizes, block=16, tile=1)
        self.streams.append(stream)


def _at(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def _run(arrays: list[NDArray[Any]], sizes: tuple[int, ...], block: int, tile: int) -> None:
    named = dict(zip((*OPERANDS, *SIZES), (*arrays, *sizes), strict=True))
    _call(len(arrays[-1]), [named[name] for name in PARAMETERS], block, tile)


def _call(num_rows: int, values: Sequence[Any], block: int, tile: int) -> None:
    """Run the kernel on `values`, its parameters in order."""
    import torch

    from dspark_batch.models.plugin.triton_kernel import dspark_verify

    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    with np.errstate(all="ignore"):
        dspark_verify[(num_rows // tile,)](*tensors, ROWS=tile, BLOCK=block)
