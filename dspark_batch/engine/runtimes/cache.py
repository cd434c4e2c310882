"""KV caches of ONNX Runtime: buffers that steps run on in place.

Rows live in buckets. A bucket is one buffer `[rows, kv, capacity, d]` per layer and kind, of the
smallest capacity that its longest row needs, because CPU attention costs by capacity, not by
length. Rows of similar length share a bucket (512, 2048, 8192, ... tokens at the most); a row
that outgrows its bucket moves on, and buffers grow and shrink by copying. Live rows are the first
ones of their bucket, so a step over any run of them is a view: no gathering.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from dspark_batch.engine import CacheInfo
from dspark_batch.engine.runtimes.memory import Array, Memory

_FIRST_LIMIT = 512
_RATIO = 4


class Cache:
    """Keys and values of one model for the rows of one bucket."""

    def __init__(
        self, shape: CacheInfo, num_rows: int, limit: int, *, dtype: Any, memory: Memory
    ) -> None:
        self._shapes = shape.cache_shapes
        self._num_rows = num_rows
        self._limit = limit  # tokens of a row
        self._dtype = dtype
        self._memory = memory
        self.capacity = 0
        self.buffers: list[Array] = []
        self.bindings: dict[tuple[int, int, int, tuple[str, ...]], ort.IOBinding] = {}
        """By session, first row, rows and outputs; good until the buffers change."""

    def reserve(self, needed: int, num_live: int) -> None:
        """Hold at least `needed` tokens a row; shrink when half would do. Copies live rows."""
        capacity = self._memory.capacity(needed, self._limit)
        if self.capacity >= capacity > self.capacity // 2:
            return
        kept = min(self.capacity, capacity)
        grown = []
        for i in range(2 * len(self._shapes)):
            num_kv_heads, head_dim = self._shapes[i // 2]
            # Zeroed: a masked key must be finite, since 0 * NaN would reach the output.
            shape = (self._num_rows, num_kv_heads, capacity, head_dim)
            buffer = self._memory.zeros(shape, self._dtype)
            if num_live and kept:
                self._memory.copy(buffer[:num_live], self.buffers[i][:num_live])
                self.buffers[i] = buffer
            grown.append(buffer)
        self.buffers = grown
        self.capacity = capacity
        self.bindings.clear()

    def copy_row(self, row: int, source: Cache, source_row: int) -> None:
        """Take over a row, of this cache or of another bucket's."""
        for mine, theirs in zip(self.buffers, source.buffers, strict=True):
            self._memory.copy(mine[row], theirs[source_row])

    def wipe_if_broken(self, row: int) -> None:
        """Zero a row that holds values which are not finite."""
        if self.buffers and not np.isfinite(self._memory.fetch(self.buffers[-1][row]).sum()):
            for buffer in self.buffers:
                self._memory.clear(buffer[row])


class Bucket:
    """Rows that share buffers; `slots[i]` owns row i."""

    def __init__(self, limit: int, target: Cache, draft: Cache | None) -> None:
        self.limit = limit  # tokens of a row
        self.target = target
        self.draft = draft
        self.slots: list[int] = []

    def caches(self) -> list[Cache]:
        """The target's, and the draft's if there is one."""
        return [self.target] if self.draft is None else [self.target, self.draft]

    def leave(self, slot: int) -> None:
        """Drop a row; the last one takes its place, so that live rows stay neighbours."""
        row, last = self.slots.index(slot), len(self.slots) - 1
        if row != last:
            for cache in self.caches():
                if cache.capacity:
                    cache.copy_row(row, cache, last)
            self.slots[row] = self.slots[last]
        self.slots.pop()


def buckets_for(
    target: CacheInfo,
    draft: CacheInfo | None,
    *,
    num_rows: int,
    most_tokens: int,
    dtype: Any,
    memory: Memory,
) -> list[Bucket]:
    """Empty buckets with growing limits, the last one good for `most_tokens`."""
    buckets: list[Bucket] = []
    limit = _FIRST_LIMIT
    while not buckets or buckets[-1].limit < most_tokens:
        most = min(limit, most_tokens)
        caches = [
            Cache(shape, num_rows, most, dtype=dtype, memory=memory) if shape else None
            for shape in (target, draft)
        ]
        assert caches[0] is not None
        buckets.append(Bucket(limit, caches[0], caches[1]))
        limit *= _RATIO
    return buckets
