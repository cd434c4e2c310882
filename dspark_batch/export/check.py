"""The export's own check: the built target graph against an independent forward pass.

Three properties, each of which a wrong graph breaks loudly: the logits are those of
`models.reference`; the context output is the residual stream after the layers that the draft
names (a tap shifted by one layer fails here); and a row's logits depend neither on its neighbours
nor on how many tokens a call carries, without which speculative text would differ from plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.manifest import CacheInfo
from dspark_batch.models.reference import forward
from dspark_batch.models.spec import DecoderSpec
from dspark_batch.runtimes.ort import float_type, open_session

Tensor = Callable[[str], NDArray[Any]]
Array = NDArray[np.float32]
Caches = list[NDArray[Any]]

# Largest accepted values. Logits: KL divergence of the next-token distribution from fp32, in nats.
# Context: error relative to the stream's norm. Invariance: largest difference of a logit.
LIMITS = {
    "fp32": {"kl": 1e-5, "context_error": 1e-3, "invariance": 1e-2},
    "int8": {"kl": 0.1, "context_error": 0.1, "invariance": 1e-2},
    # In fp16 a sum in another order rounds otherwise; bf16 is checked as its twin in fp32.
    "fp16": {"kl": 1e-3, "context_error": 0.02, "invariance": 0.25},
    "bf16": {"kl": 5e-3, "context_error": 0.05, "invariance": 1e-2},
    "int8-weights": {"kl": 0.1, "context_error": 0.1, "invariance": 0.25},
    "int4-weights": {"kl": 0.6, "context_error": 0.5, "invariance": 0.25},
}

# Tokens of a row, and of caches as wide as rows beside it would make them: multiples of 64, as the
# runtime's are.
_SHORT, _CAPACITIES = 48, (64, 128, 512)


class TargetProbe:
    """Runs `target.onnx` on rows from given caches and returns logits and context of all tokens."""

    def __init__(self, path: Path, spec: DecoderSpec | CacheInfo, *, capacity: int) -> None:
        self._session = open_session(path, threads=0)
        self._shapes = spec.cache_shapes
        self._dtype = float_type(self._session, "past_key_0")
        self._capacity = capacity

    @property
    def in_half(self) -> bool:
        """Whether the graph's activations are fp16."""
        return self._dtype is np.float16

    def empty(self, num_rows: int, *, capacity: int | None = None) -> Caches:
        """Caches of rows without tokens; their usual capacity is the probe's."""
        return [
            np.zeros((num_rows, num_kv_heads, capacity or self._capacity, head_dim), self._dtype)
            for num_kv_heads, head_dim in self._shapes
            for _ in ("key", "value")
        ]

    def run(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], caches: Caches
    ) -> tuple[list[Array], list[Array], Caches]:
        """Logits [n, V] and context [n, taps * hidden] per row of n tokens, and new caches."""
        counts = np.array([len(row) for row in rows])
        ends = np.cumsum(counts)
        cells = np.arange(counts.max())[None, :]
        index = (ends - counts)[:, None] + np.minimum(cells, counts[:, None] - 1)
        num_rows, inputs = len(rows), {i.name: i for i in self._session.get_inputs()}
        vocab_size = inputs["draft_logits"].shape[2]
        feeds: dict[str, NDArray[Any]] = {
            "tokens": np.concatenate([np.array(row, np.int64) for row in rows]),
            "starts": np.array(starts, np.int64),
            "token_index": index,
            "cell_index": np.flatnonzero(cells < counts[:, None]),
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
        outputs = ["logits", "context", *(f"present_{name}" for name in names)]
        logits, context, *new = self._session.run(outputs, feeds)
        context = context.astype(np.float32)
        return np.split(logits, ends[:-1]), np.split(context, ends[:-1]), new


def check_target(
    path: Path,
    spec: DecoderSpec,
    tensor: Tensor,
    *,
    taps: Sequence[int],
    prompts: Sequence[Sequence[int]],
    precision: str,
) -> dict[str, float]:
    """Measure parity and invariance of `path`; the figures go into the manifest.

    Raises:
        EngineError: one of them is over its limit.
    """
    longest = max(len(prompt) for prompt in prompts)
    probe = TargetProbe(path, spec, capacity=longest + 8)
    logits, context, _ = probe.run(prompts, [0] * len(prompts), probe.empty(len(prompts)))
    found = {"kl": 0.0, "context_error": 0.0, "agreement": 0.0}
    expected = forward(spec, tensor, prompts, taps=taps)
    for wanted, row_logits, row_context in zip(expected, logits, context, strict=True):
        found["kl"] += divergence(wanted.logits, row_logits) / len(prompts)
        same = (wanted.logits.argmax(-1) == row_logits.argmax(-1)).mean()
        found["agreement"] += float(same) / len(prompts)
        for part, tap in zip(np.split(row_context, max(len(taps), 1), axis=1), taps, strict=False):
            error = np.linalg.norm(part - wanted.streams[tap]) / np.linalg.norm(wanted.streams[tap])
            found["context_error"] = max(found["context_error"], float(error))
    found["invariance"] = _invariance(probe, prompts)
    for name, limit in LIMITS[precision].items():
        if not found[name] <= limit:
            cause = "the weights or this family's graph are wrong"
            if probe.in_half and not np.isfinite(found["kl"]):
                cause = "fp16 ends at 65504 and this target goes beyond: take --precision bf16"
            raise EngineError(
                f"{path}: the built graph fails its check: {name} is {found[name]:.3g}, over "
                f"{limit:.3g} for {precision} ({found}); {cause}, nothing was installed"
            )
    return found


def divergence(wanted: Array, found: Array) -> float:
    """Mean KL(wanted || found) over tokens, in nats."""

    def log_softmax(x: Array) -> NDArray[np.float64]:
        shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _invariance(probe: TargetProbe, prompts: Sequence[Sequence[int]]) -> float:
    """Largest change of a row's last five logits: alone, in company, token by token, at once.

    Also of a short row's where the cache has room for no more, and for many more tokens.
    """
    row, others = prompts[0], prompts[1:4]
    head, tail = list(row[:-5]), list(row[-5:])
    _, _, cache = probe.run([head], [0], probe.empty(1))
    at_once = probe.run([tail], [len(head)], cache)[0][0]
    worst = 0.0
    stepping = cache
    for i, token in enumerate(tail):
        step, _, stepping = probe.run([[token]], [len(head) + i], stepping)
        worst = max(worst, float(np.abs(step[0][0] - at_once[i]).max()))
    company = probe.run([row, *others], [0] * (1 + len(others)), probe.empty(1 + len(others)))[0]
    worst = max(worst, float(np.abs(company[0][-5:] - at_once).max()))
    short = list(row[:_SHORT])
    beside = [
        probe.run([short], [0], probe.empty(1, capacity=capacity))[0][0][-5:]
        for capacity in _CAPACITIES
    ]
    return max(worst, *(float(np.abs(found - beside[0]).max()) for found in beside[1:]))
