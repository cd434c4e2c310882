"""A cost table for a GPU that is not here: a roofline of public figures and stated assumptions.

A pass takes the longer of two times, reading what it must read and computing what it must compute,
plus what its kernels and the host cost whatever their size. Nothing here was measured. Every
number of a `Roofline` is an assumption that a caller may replace.

Left out: the time of the schedule itself, activations, samplers, the context's way into the
draft's cache, interconnects, clocks that throttle, kernels that fit a size badly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

from dspark_batch.bench.forecast.catalogue import DTYPE_BYTES, GPUS, PAIRS
from dspark_batch.decode.algorithm import CostTable
from dspark_batch.errors import UsageError, did_you_mean

_CACHE_BYTES = 2  # of a key or value number, in any of these
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


_SHEET, _SHAPE, _GUESS, _RECORD, _GIVEN = "datasheet", "shape", "guess", "record", "given"


def _assumed(unit: str, origin: str) -> Any:
    """A figure of `Roofline` that `assume` may replace."""
    return field(metadata={"unit": unit, "origin": origin})


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Everything that the time of a pass is made of."""

    gpu: str
    gpu_source: str
    pair: str
    dtype: str
    block_size: int
    bandwidth_gbs: float = _assumed("GB/s", _SHEET)
    tflops: float = _assumed("dense TFLOP/s", _SHEET)
    memory_gb: float = _assumed("GB", _SHEET)
    bandwidth_efficiency: float = _assumed("share of it that is reached", _GUESS)
    compute_efficiency: float = _assumed("share of it that is reached", _GUESS)
    memory_share: float = _assumed("share that weights and caches may fill", _GUESS)
    kernel_us: float = _assumed("µs that a kernel takes besides its work", _GUESS)
    host_us: float = _assumed("µs of the host in every pass", _GUESS)
    context_tokens: float = _assumed("cached tokens of a row, on average", _RECORD)
    weights_gb: float = _assumed("GB of weights in memory, both models", _SHAPE)
    target_gb: float = _assumed("GB of weights that a target pass reads", _SHAPE)
    target_gflop: float = _assumed("GFLOP of a target's token", _SHAPE)
    target_attention_kflop: float = _assumed("kFLOP of it per cached token", _SHAPE)
    target_kv_kib: float = _assumed("KiB of keys and values per cached token", _SHAPE)
    target_kernels: float = _assumed("kernels of a target pass", _GUESS)
    draft_gb: float = _assumed("GB of weights that a draft pass reads", _SHAPE)
    draft_gflop: float = _assumed("GFLOP of a drafted token", _SHAPE)
    draft_attention_kflop: float = _assumed("kFLOP of it per cached token", _SHAPE)
    draft_kv_kib: float = _assumed("KiB of keys and values per cached token", _SHAPE)
    draft_kernels: float = _assumed("kernels of a draft pass", _GUESS)
    given: tuple[str, ...] = ()
    """Names of the figures that `assume` replaced."""

    @classmethod
    def for_gpu(
        cls, gpu_name: str, pair_name: str, *, dtype: str | None, block_size: int, context: float
    ) -> Self:
        """The roofline of a named GPU and pair; `dtype` None is the first that the GPU has.

        Raises `UsageError` for a name that is not in the tables, or a dtype that the GPU lacks.
        """
        gpu = GPUS.get(gpu_name) or _unknown("GPU", gpu_name, GPUS)
        pair = PAIRS.get(pair_name) or _unknown("model", pair_name, PAIRS)
        dtype = dtype or next(iter(gpu.tflops))
        if dtype not in gpu.tflops:
            has = ", ".join(gpu.tflops)
            raise UsageError(f"--dtype {dtype}: {gpu.title} has no tensor cores for it, but {has}")
        size = DTYPE_BYTES[dtype]
        draft_read = (
            pair.num_draft_layers * pair.layer_params
            + pair.num_taps * pair.hidden_size**2
            + pair.draft_head_params
        )
        draft_computed = (
            pair.num_draft_layers * pair.layer_params
            + pair.draft_head_params
            + pair.markov_step_params
        )
        target_computed = pair.num_layers * pair.layer_params + pair.head_params
        attention = 4 * pair.num_heads * pair.head_dim / 1e3
        cache = 2 * pair.num_kv_heads * pair.head_dim * _CACHE_BYTES / 1024
        return cls(
            gpu=gpu.title,
            gpu_source=gpu.source,
            pair=pair.title,
            dtype=dtype,
            block_size=block_size,
            bandwidth_gbs=gpu.bandwidth_gbs,
            tflops=gpu.tflops[dtype],
            memory_gb=gpu.memory_gb,
            bandwidth_efficiency=0.8,
            compute_efficiency=0.6,
            memory_share=0.9,
            kernel_us=2.0,
            host_us=50.0,
            context_tokens=round(context, 1),
            weights_gb=(pair.target_params + pair.draft_params) * size / 1e9,
            target_gb=target_computed * size / 1e9,
            target_gflop=2 * target_computed / 1e9,
            target_attention_kflop=pair.num_layers * attention,
            target_kv_kib=pair.num_layers * cache,
            target_kernels=10 * pair.num_layers + 10,
            draft_gb=(draft_read + block_size * pair.markov_step_params) * size / 1e9,
            draft_gflop=2 * draft_computed / 1e9,
            draft_attention_kflop=pair.num_draft_layers * attention,
            draft_kv_kib=pair.num_draft_layers * cache,
            draft_kernels=10 * pair.num_draft_layers + 10 + 6 * block_size,
        )

    def assume(self, given: Iterable[str]) -> Self:
        """With other figures, each as `NAME=VALUE`.

        Raises `UsageError` for a name that is none of them, or a value that is no number above 0.
        """
        names = [f.name for f in fields(self) if f.metadata]
        values: dict[str, Any] = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in names:
                _unknown("assumption", name, names)
            try:
                values[name] = float(value)
            except ValueError:
                values[name] = 0.0
            if not 0 < values[name] < float("inf"):
                raise UsageError(f"--assume {text}: {value!r} is no number above 0")
        return replace(self, **values, given=(*self.given, *values))

    def assumptions(self) -> list[tuple[str, float, str, str]]:
        """Name, value and unit of every figure, and where it is from."""
        return [
            (
                f.name,
                getattr(self, f.name),
                f.metadata["unit"],
                _GIVEN if f.name in self.given else f.metadata["origin"],
            )
            for f in fields(self)
            if f.metadata
        ]

    def verify_seconds(self, num_rows: int, num_tokens: int) -> float:
        """A target pass over `num_tokens` tokens of `num_rows` rows."""
        return self._pass(
            num_rows,
            num_tokens,
            weights_gb=self.target_gb,
            gflop=self.target_gflop,
            attention_kflop=self.target_attention_kflop,
            kv_kib=self.target_kv_kib,
            num_kernels=self.target_kernels,
        )

    def draft_seconds(self, num_rows: int) -> float:
        """A draft pass: γ tokens for every row."""
        return self._pass(
            num_rows,
            num_rows * self.block_size,
            weights_gb=self.draft_gb,
            gflop=self.draft_gflop,
            attention_kflop=self.draft_attention_kflop,
            kv_kib=self.draft_kv_kib,
            num_kernels=self.draft_kernels,
        )

    def _pass(
        self,
        num_rows: int,
        num_tokens: int,
        *,
        weights_gb: float,
        gflop: float,
        attention_kflop: float,
        kv_kib: float,
        num_kernels: float,
    ) -> float:
        cached = self.context_tokens
        read = weights_gb * 1e9 + num_rows * cached * kv_kib * 1024
        computed = num_tokens * (gflop * 1e9 + cached * attention_kflop * 1e3)
        reading = read / (self.bandwidth_gbs * 1e9 * self.bandwidth_efficiency)
        computing = computed / (self.tflops * 1e12 * self.compute_efficiency)
        return max(reading, computing) + (num_kernels * self.kernel_us + self.host_us) * 1e-6

    def costs(self) -> CostTable:
        """The cost table that this machine would be measured to have."""
        per_row = range(1, self.block_size + 2)
        return CostTable.measured(
            _ROWS,
            per_row,
            verify_seconds=np.array(
                [[self.verify_seconds(n, n * m) for m in per_row] for n in _ROWS]
            ),
            draft_seconds=np.array([self.draft_seconds(n) for n in _ROWS]),
        )

    def most_rows(self, row_tokens: int) -> int:
        """Rows of so many tokens whose caches fit into memory beside the weights; 0: not one."""
        free = self.memory_gb * 1e9 * self.memory_share - self.weights_gb * 1e9
        return max(0, int(free / (row_tokens * (self.target_kv_kib + self.draft_kv_kib) * 1024)))


def _unknown(what: str, name: str, known: Iterable[str]) -> Any:
    names = list(known)
    message = f"there is no {what} {name!r}{did_you_mean(name, names)}"
    raise UsageError(message, hint=f"known: {', '.join(names)}")
