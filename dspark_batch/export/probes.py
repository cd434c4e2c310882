"""Run a graph on given rows, outside of an engine, for checks and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.engine import CacheInfo
from dspark_batch.engine.runtimes import (
    DRAFT_INPUTS,
    Ints,
    float_type,
    idle_draws,
    open_session,
    row_feeds,
    token_layout,
)
from dspark_batch.models import DecoderSpec
from dspark_batch.models.graph import PAGE

Array = NDArray[np.float32]
Caches = list[NDArray[Any]]


class TargetProbe:
    """Runs `target.onnx` on rows and caches, and returns logits and context of all tokens."""

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec | CacheInfo,
        *,
        capacity: int,
        outputs: Sequence[str] = (),
    ) -> None:
        """`outputs` are more values of the graph that `fetch` can return."""
        self._session = open_session(path, threads=0, outputs=outputs)
        self._shapes = spec.cache_shapes
        self._dtype = float_type(self._session, "past_key_0")
        self._capacity = capacity

    @property
    def in_half(self) -> bool:
        """Whether the graph's activations are fp16."""
        return self._dtype is np.float16

    def empty(self, num_rows: int, *, capacity: int | None = None) -> Caches:
        """Empty caches for rows, by default of the probe's capacity."""
        return [
            np.zeros((num_rows, num_kv_heads, capacity or self._capacity, head_dim), self._dtype)
            for num_kv_heads, head_dim in self._shapes
            for _ in ("key", "value")
        ]

    def run(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], caches: Caches
    ) -> tuple[list[Array], list[Array], Caches]:
        """Logits [n, V] and context [n, taps * hidden] of each row of n tokens, and new caches."""
        ends = np.cumsum([len(row) for row in rows])[:-1]
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        outputs = ["logits", "context", *(f"present_{name}" for name in names)]
        logits, context, *new = self._session.run(outputs, self._feeds(rows, starts, caches))
        return np.split(logits, ends), self._split(context, ends), new

    def _split(self, context: NDArray[Any], ends: Ints) -> list[Array]:
        return np.split(context.astype(np.float32), ends)

    def fetch(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> list[NDArray[Any]]:
        """The values `names` of one pass over the rows, from their start."""
        feeds = self._feeds(rows, [0] * len(rows), self.empty(len(rows)))
        found: list[NDArray[Any]] = self._session.run(list(names), feeds)
        return found

    def _feeds(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], caches: Caches
    ) -> dict[str, NDArray[Any]]:
        counts = np.array([len(row) for row in rows])
        ends = np.cumsum(counts)
        index, cells = token_layout(counts)
        num_rows, inputs = len(rows), {i.name: i for i in self._session.get_inputs()}
        vocab_size = inputs["draft_logits"].shape[2]
        feeds: dict[str, NDArray[Any]] = {
            "tokens": np.concatenate([np.array(row, np.int64) for row in rows]),
            "starts": np.array(starts, np.int64),
            "token_index": index,
            "cell_index": cells,
            "logit_tokens": np.arange(ends[-1]),
            "logit_rows": np.zeros((num_rows, 2), np.int64),
            "draft_tokens": np.zeros((num_rows, 1), np.int64),
            "lengths": np.zeros(num_rows, np.int64),
            "certain": np.zeros(num_rows, np.int64),
            "draft_logits": np.zeros((num_rows, 1, vocab_size), np.float32),
            "temperature": np.zeros(num_rows, np.float32),
            "top_k": np.zeros(num_rows, np.int64),
            "top_p": np.ones(num_rows, np.float32),
            "uniforms": np.zeros((num_rows, 2), np.float32),
        }
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        feeds.update({f"past_{n}": cache for n, cache in zip(names, caches, strict=True)})
        return feeds


class PagedTargetProbe(TargetProbe):
    """The same for a graph over pages (`models.paged_decoder`); its caches are pools of pages.

    Each row has pages of its own behind page 0.
    """

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec | CacheInfo,
        *,
        capacity: int,
        outputs: Sequence[str] = (),
    ) -> None:
        """See `TargetProbe`."""
        self._session = open_session(path, threads=0, outputs=outputs, twins=True)
        self._shapes = spec.cache_shapes
        self._dtype = float_type(self._session, "past_key_0")
        self._capacity = capacity

    def empty(self, num_rows: int, *, capacity: int | None = None) -> Caches:
        """See `TargetProbe`."""
        num_pages = 1 + num_rows * -(-(capacity or self._capacity) // PAGE)
        return [
            np.zeros((num_pages, PAGE, num_kv_heads, head_dim), self._dtype)
            for num_kv_heads, head_dim in self._shapes
            for _ in ("key", "value")
        ]

    def run(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], caches: Caches
    ) -> tuple[list[Array], list[Array], Caches]:
        """See `TargetProbe`."""
        logits, context, new = super().run(rows, starts, caches)
        return [part.astype(np.float32) for part in logits], context, new

    def _split(self, context: NDArray[Any], ends: Ints) -> list[Array]:
        return super()._split(context[0], ends)

    def _feeds(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], caches: Caches
    ) -> dict[str, NDArray[Any]]:
        counts = np.array([len(row) for row in rows])
        total = int(counts.sum())
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        reach = int((np.array(starts) + counts).max())
        feeds: dict[str, NDArray[Any]] = {
            "tokens": np.concatenate([np.array(row, np.int64) for row in rows]),
            "logit_tokens": np.arange(total),
            "cumulative": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            "past": np.array(starts, np.int32),
            "pages": _own_pages(len(rows), len(caches[0])),
            "bounds": np.array([counts.max(), reach], np.int32),
            "context_start": np.zeros(1, np.int64),
            "past_ring": np.zeros((1, total, shapes["past_ring"][2]), self._dtype),
        }
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        feeds.update({f"past_{n}": cache for n, cache in zip(names, caches, strict=True)})
        return feeds


def _own_pages(num_rows: int, num_pages: int) -> NDArray[np.int32]:
    """`[R, W]`: the pages behind page 0, in order."""
    return np.arange(1, num_pages, dtype=np.int32).reshape(num_rows, -1)


class DraftProbe:
    """Runs `draft.onnx` on rows whose context is known, and drafts after every γ tokens."""

    def __init__(self, path: Path, cache: CacheInfo) -> None:
        self._session = open_session(path, threads=0, inputs=DRAFT_INPUTS)
        self._shapes = cache.cache_shapes
        self._dtype = float_type(self._session, "context")
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._block_size = int(shapes["uniforms"][1])

    def rounds(
        self, rows: Sequence[Sequence[int]], contexts: Sequence[Array]
    ) -> Iterator[tuple[list[int], Ints, Array, Array]]:
        """Greedy blocks of each round; `contexts` [t, taps * hidden] are of a row's t tokens.

        Round n, counted from 1, has the R rows with more than n γ tokens: their indices, drafted
        tokens [R, γ], logits [R, γ, D] and confidence logits [R, γ].
        """
        gamma = self._block_size
        longest = max(map(len, rows))
        caches = [
            np.zeros((len(rows), heads, longest + 2 * gamma + 2, size), self._dtype)
            for heads, size in self._shapes
            for _ in ("key", "value")
        ]
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        outputs = ["draft_tokens", "draft_logits", "confidence", *(f"present_{n}" for n in names)]
        running = list(range(len(rows)))
        for end in range(gamma, longest, gamma):
            going = [place for place, r in enumerate(running) if len(rows[r]) > end]
            running, caches = [running[i] for i in going], [cache[going] for cache in caches]
            counts = np.full(len(running), gamma)
            context = np.concatenate([contexts[r][end - gamma : end] for r in running])
            feeds: dict[str, NDArray[Any]] = {
                "context": context.astype(self._dtype),
                "context_tokens": np.arange(len(context)),
                "context_index": token_layout(counts)[0],
                "context_starts": counts * 0 + end - gamma,
                "anchors": np.array([rows[r][end] for r in running]),
                "anchor_positions": counts * 0 + end,
                **row_feeds(idle_draws(len(running), gamma)),
            }
            feeds |= {f"past_{name}": cache for name, cache in zip(names, caches, strict=True)}
            tokens, logits, confidence, *caches = self._session.run(outputs, feeds)
            yield running, tokens, logits, confidence


class PagedDraftProbe:
    """The same for a graph over pages (`drafters.paged_dspark`)."""

    def __init__(self, path: Path, cache: CacheInfo, *, mask_token_id: int) -> None:
        self._session = open_session(path, threads=0, twins=True)
        self._shapes = cache.cache_shapes
        self._dtype = float_type(self._session, "context")
        self._mask_token_id = mask_token_id

    def rounds(
        self, rows: Sequence[Sequence[int]], contexts: Sequence[Array]
    ) -> Iterator[tuple[list[int], Ints, Array, Array]]:
        """See `DraftProbe.rounds`."""
        gamma = int(self._session.get_outputs()[-1].shape[1])
        slots = {v.name: v.shape for v in self._session.get_inputs()}["block_tokens"][1]
        longest = max(map(len, rows))
        width = -(-(longest + 2 * gamma + 2) // PAGE)
        caches = [
            np.zeros((1 + len(rows) * width, PAGE, heads, size), self._dtype)
            for heads, size in self._shapes
            for _ in ("key", "value")
        ]
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        outputs = ["draft_tokens", "draft_logits", "confidence", *(f"present_{n}" for n in names)]
        pages = _own_pages(len(rows), len(caches[0]))
        for end in range(gamma, longest, gamma):
            running = [r for r in range(len(rows)) if len(rows[r]) > end]
            num = len(running)
            context = np.concatenate([contexts[r][end - gamma : end] for r in running])
            anchors = np.array([rows[r][end] for r in running])
            block = np.full((num, slots), self._mask_token_id)
            block[:, 0] = anchors
            feeds: dict[str, NDArray[Any]] = {
                "context": context.astype(self._dtype)[None],
                "context_rows": np.arange(len(context)),
                "context_cumulative": np.arange(num + 1, dtype=np.int32) * np.int32(gamma),
                "context_past": np.full(num, end - gamma, np.int32),
                "context_bounds": np.array([gamma, end], np.int32),
                "pages": pages[running],
                "block_tokens": block,
                "block_cumulative": np.arange(num + 1, dtype=np.int32) * np.int32(slots),
                "block_past": np.full(num, end, np.int32),
                "block_bounds": np.array([slots, end + slots], np.int32),
                "anchors": anchors,
            }
            feeds |= {f"past_{name}": cache for name, cache in zip(names, caches, strict=True)}
            tokens, logits, confidence, *caches = self._session.run(outputs, feeds)
            yield running, tokens, logits.astype(np.float32), confidence
