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
        context = context.astype(np.float32)
        return np.split(logits, ends), np.split(context, ends), new

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
