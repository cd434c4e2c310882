"""The Triton kernel in Triton's CPU interpreter.

Triton reads TRITON_INTERPRET when it is imported, for its own library too: a process can either
interpret kernels or compile them. So `interpret` belongs into a process that began with `prepare`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verify_calls import Call, Result

from dspark_batch.models.plugin import launch
from dspark_batch.models.plugin.contract import INPUT_NAMES, OPERANDS, OUTPUT_NAMES
from dspark_batch.models.plugin.launch import PARAMETERS, SIZES, STAGES, VerifyCall


def prepare() -> None:
    """Make this process one that interprets."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"


def interpret(
    call: Call,
    slice_size: int = 16,
    tile: int | None = None,
    capacity: int = 16,
    workspace: NDArray[np.float32] | None = None,
) -> Result:
    """Run a call, `tile` rows a program. Default: the largest power of two that divides them.

    The workspace begins as noise, unless one of before is handed in, and none may be written
    beyond its end.
    """
    num_rows, num_drafts = call.draft_tokens.shape
    _, block_size, draft_vocab_size = call.draft_logits.shape
    results = [np.full(num_rows, -7, np.int64) for _ in OUTPUT_NAMES]
    operands = [np.ascontiguousarray(call.feeds[name]) for name in INPUT_NAMES]
    sizes = (*call.logits.shape, draft_vocab_size, num_drafts, block_size)
    size = launch.workspace_bytes(
        num_rows,
        num_drafts,
        call.logits.shape[1],
        draft_vocab_size,
        slice_size=slice_size,
        capacity=capacity,
    )
    if workspace is None:
        workspace = noise(size // 4 + GUARD)
    beyond = workspace[size // 4 :].tobytes()
    tile = tile or num_rows & -num_rows
    _run([*operands, *results], sizes, workspace, slice_size, tile, capacity)
    assert workspace[size // 4 :].tobytes() == beyond
    return results[0], results[1]


GUARD = 4096


def replay(calls: Sequence[Call]) -> list[Result]:
    """Calls of one shape, one after the other in one workspace."""
    num_rows, num_drafts = calls[0].draft_tokens.shape
    sizes = (calls[0].logits.shape[1], calls[0].draft_logits.shape[2])
    size = launch.workspace_bytes(num_rows, num_drafts, *sizes, slice_size=16, capacity=16)
    workspace = noise(size // 4 + GUARD)
    return [interpret(call, workspace=workspace) for call in calls]


def noise(size: int) -> NDArray[np.float32]:
    """Any bits, so that large, negative and not finite numbers are among them."""
    return np.frombuffer(np.random.default_rng(size).bytes(4 * size), np.float32).copy()


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
        size = launch.workspace_bytes(rows, drafts, call.vocab_size, call.draft_vocab_size)
        workspace = _at(call.workspace, (size // 4,), "float32")
        _run(arrays, sizes, workspace, launch.SLICE, tile=1, capacity=launch.CAPACITY)
        self.streams.append(stream)


def _at(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def _run(
    arrays: list[NDArray[Any]],
    sizes: tuple[int, ...],
    workspace: NDArray[np.float32],
    slice_size: int,
    tile: int,
    capacity: int,
) -> None:
    named = dict(zip((*OPERANDS, *SIZES), (*arrays, *sizes), strict=True))
    named["workspace"] = workspace
    values = [named[name] for name in PARAMETERS]
    _call(named, values, {"ROWS": tile, "SLICE": slice_size, "CAPACITY": capacity})


def _call(named: dict[str, Any], values: Sequence[Any], constants: dict[str, int]) -> None:
    """Run the stages on `values`, their parameters in order."""
    import torch

    _patch_once()
    from dspark_batch.models.plugin.triton_kernel import dspark_verify

    num_rows = len(named["lengths"])
    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    sizes = (named["num_drafts"], named["vocab_size"], named["draft_vocab_size"])
    for i, stage in enumerate(STAGES):
        tiles = num_rows // constants["ROWS"]
        grid = launch.grid(stage, tiles, *sizes, slice_size=constants["SLICE"])
        with np.errstate(all="ignore"):
            dspark_verify[grid](*tensors, STAGE=i, **constants)


@cache
def _patch_once() -> None:
    """Let the interpreter prepare Triton's language once for each module, not for each call of a
    function within a kernel: that took most of the time."""
    from triton.runtime import interpreter

    prepared: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
