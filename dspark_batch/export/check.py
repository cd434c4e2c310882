"""The export's own check: the built graphs against an independent forward pass.

Three properties of the target, each of which a wrong graph breaks loudly: the logits are those of
`models.reference`; the context output is the residual stream after the layers that the draft
names (a tap shifted by one layer fails here); and a row's logits depend neither on its neighbours
nor on how many tokens a call carries, without which speculative text would differ from plain. The
draft's distributions are those of its twin in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.manifest import CacheInfo
from dspark_batch.models import reference
from dspark_batch.models.decoder import stream_name
from dspark_batch.models.reference import Forward, forward
from dspark_batch.models.spec import DecoderSpec
from dspark_batch.runtimes.layout import DRAFT_INPUTS, idle_draws, row_feeds, token_layout
from dspark_batch.runtimes.ort import float_type, open_session
from dspark_batch.runtimes.session import Ints

Tensor = Callable[[str], NDArray[Any]]
Array = NDArray[np.float32]
Caches = list[NDArray[Any]]

# Largest accepted values, a few times what good engines have (int8: a KL of 0.006 for SmolLM2, 0.02
# for Gemma 3 270M; with sums that saturate it is 0.12). Logits: KL divergence of the next-token
# distribution from fp32, in nats. Context: error relative to the stream's norm. Invariance: largest
# difference of a logit.
LIMITS = {
    "fp32": {"kl": 1e-5, "context_error": 1e-3, "invariance": 1e-2},
    "int8": {"kl": 0.03, "context_error": 0.1, "invariance": 1e-2},
    # In fp16 a sum in another order rounds otherwise; bf16 is checked as its twin in fp32.
    "fp16": {"kl": 1e-3, "context_error": 0.02, "invariance": 0.25},
    "bf16": {"kl": 5e-3, "context_error": 0.05, "invariance": 1e-2},
    "int8-weights": {"kl": 0.1, "context_error": 0.1, "invariance": 0.25},
    "int4-weights": {"kl": 0.6, "context_error": 0.5, "invariance": 0.25},
}

# The same of the draft: mean KL divergence of a slot's distribution from the fp32 graph's.
DRAFT_LIMITS = {
    "fp32": {"draft_kl": 1e-5},
    "int8": {"draft_kl": 0.02},
    "fp16": {"draft_kl": 1e-3},
    "bf16": {"draft_kl": 5e-3},
    "int8-weights": {"draft_kl": 0.1},
    "int4-weights": {"draft_kl": 0.6},
}

_GROUP = 8  # rows of a pass
_BLOCK = 32  # tokens whose distributions are compared at a time

# Tokens of a row, and of caches as wide as rows beside it would make them: multiples of 64, as the
# runtime's are.
_SHORT, _CAPACITIES = 48, (64, 128, 512)


class TargetProbe:
    """Runs `target.onnx` on rows from given caches and returns logits and context of all tokens."""

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec | CacheInfo,
        *,
        capacity: int,
        outputs: Sequence[str] = (),
    ) -> None:
        """`outputs` are values of the graph that can be fetched too."""
        self._session = open_session(path, threads=0, outputs=outputs)
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
        ends = np.cumsum([len(row) for row in rows])[:-1]
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        outputs = ["logits", "context", *(f"present_{name}" for name in names)]
        logits, context, *new = self._session.run(outputs, self._feeds(rows, starts, caches))
        context = context.astype(np.float32)
        return np.split(logits, ends), np.split(context, ends), new

    def fetch(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> list[NDArray[Any]]:
        """The values `names` of one pass over whole rows."""
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
    """Runs a draft's graph on known context."""

    def __init__(self, path: Path, cache: CacheInfo) -> None:
        self._session = open_session(path, threads=0, inputs=DRAFT_INPUTS)
        self._shapes = cache.cache_shapes
        self._dtype = float_type(self._session, "context")
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._block_size = int(shapes["uniforms"][1])

    def rounds(
        self, rows: Sequence[Sequence[int]], contexts: Sequence[Array]
    ) -> Iterator[tuple[Ints, Array, Array]]:
        """Greedy blocks of all rows after each γ tokens: tokens [R, γ], logits and confidence.

        `contexts` [n, taps * hidden] are of the rows' tokens. A row that has no γ more tokens
        drafts again from where it ended, so that every block has all rows.
        """
        gamma, num_rows = self._block_size, len(rows)
        longest = max(map(len, rows))
        caches = [
            np.zeros((num_rows, heads, longest + 2 * gamma + 2, size), self._dtype)
            for heads, size in self._shapes
            for _ in ("key", "value")
        ]
        taken = np.zeros(num_rows, np.int64)
        names = [f"{kind}_{i}" for i in range(len(self._shapes)) for kind in ("key", "value")]
        outputs = ["draft_tokens", "draft_logits", "confidence", *(f"present_{n}" for n in names)]
        for end in range(gamma, longest, gamma):
            ends = np.array([min(end, len(row) - 1) for row in rows])
            counts = ends - taken
            new = [context[a:b] for context, a, b in zip(contexts, taken, ends, strict=True)]
            feeds: dict[str, NDArray[Any]] = {
                "context": np.concatenate(new).astype(self._dtype),
                "context_tokens": np.arange(counts.sum()),
                "context_index": token_layout(np.maximum(counts, 1))[0] % max(counts.sum(), 1),
                "context_starts": taken,
                "anchors": np.array([row[e] for row, e in zip(rows, ends, strict=True)]),
                "anchor_positions": ends,
                **row_feeds(idle_draws(num_rows, gamma)),
            }
            feeds |= {f"past_{name}": cache for name, cache in zip(names, caches, strict=True)}
            tokens, logits, confidence, *caches = self._session.run(outputs, feeds)
            moved = counts > 0
            yield tokens[moved], logits[moved], confidence[moved]
            taken = ends


@dataclass(frozen=True, slots=True)
class Texts:
    """What graphs are checked on."""

    rows: Sequence[Sequence[int]]
    taps: Sequence[int]
    expected: Sequence[Forward]
    """`reference.forward` of the rows with these taps."""

    @classmethod
    def of(
        cls,
        spec: DecoderSpec,
        tensor: Tensor,
        rows: Sequence[Sequence[int]],
        *,
        taps: Sequence[int],
        **options: Any,
    ) -> Self:
        """The rows, run through the reference; `options` are its."""
        return cls(rows, taps, forward(spec, tensor, rows, taps=taps, **options))


def check_target(
    path: Path,
    spec: DecoderSpec,
    tensor: Tensor,
    texts: Texts,
    *,
    precision: str,
) -> dict[str, float]:
    """Measure parity and invariance of `path`; the figures go into the manifest.

    Raises:
        EngineError: one of the figures is over its limit.
    """
    probe = TargetProbe(path, spec, capacity=max(map(len, texts.rows)) + 8)
    total = sum(map(len, texts.rows))
    found = {"tokens": float(total), "kl": 0.0, "context_error": 0.0, "agreement": 0.0}
    head = reference.head_weight(spec, tensor)  # read once: of a GGUF file that takes a while
    for group in _groups(texts.rows):
        starts, chosen = [0] * len(group), [texts.rows[r] for r in group]
        capacity = max(map(len, chosen))
        caches = probe.empty(len(group), capacity=capacity)
        logits, context, _ = probe.run(chosen, starts, caches)
        normed = [texts.expected[r].normed for r in group]
        ends = np.cumsum([len(part) for part in normed])[:-1]
        wanted_logits = np.split(reference.logits(spec, head, np.concatenate(normed)), ends)
        parts = zip(group, wanted_logits, logits, context, strict=True)
        for r, wanted, row_logits, row_context in parts:
            share = len(texts.rows[r]) / total
            found["kl"] += divergence(wanted, row_logits) * share
            same = (wanted.argmax(-1) == row_logits.argmax(-1)).mean()
            found["agreement"] += float(same) * share
            by_tap = np.split(row_context, max(len(texts.taps), 1), axis=1)
            for part, tap in zip(by_tap, texts.taps, strict=False):
                error = _distance(part, texts.expected[r].streams[tap])
                found["context_error"] = max(found["context_error"], error)
    found["invariance"] = _invariance(probe, texts.rows)
    for name, limit in LIMITS[precision].items():
        if not found.get(name, 0.0) <= limit:
            cause = "the weights or this family's graph are wrong"
            if probe.in_half and not np.isfinite(found["kl"]):
                cause = "fp16 ends at 65504 and this target goes beyond: take --precision bf16"
            elif name != "invariance":
                cause += f", from {_offender(path, spec, tensor, texts.rows[0])} on"
            raise EngineError(
                f"{path}: the built graph fails its check: {name} is {found[name]:.3g}, over "
                f"{limit:.3g} for {precision} ({found}); {cause}, nothing was installed"
            )
    return found


def check_draft(
    path: Path,
    twin: Path,
    cache: CacheInfo,
    texts: Texts,
    *,
    precision: str,
) -> dict[str, float]:
    """Compare the draft's graph with `twin`, the same in fp32; the figures go into the manifest.

    Both draft after every few tokens of every row, from the streams of the reference. A slot
    counts as long as both have drafted the same tokens before it: the walk depends on them.

    Raises:
        EngineError: their distributions are further apart than the precision explains.
    """
    sums = dict.fromkeys(("kl", "agreement", "confidence"), 0.0)
    count = 0
    probes = [DraftProbe(graph, cache) for graph in (twin, path)]
    for group in _groups(texts.rows):
        contexts = [
            np.concatenate([texts.expected[r].streams[tap] for tap in texts.taps], 1) for r in group
        ]
        chosen = [texts.rows[r] for r in group]
        rounds = zip(*(probe.rounds(chosen, contexts) for probe in probes), strict=True)
        for (wanted, logits, sure), (tokens, found, confidence) in rounds:
            same = wanted == tokens  # [R, γ]
            counted = np.logical_and.accumulate(same, axis=1)
            counted = np.concatenate([np.ones_like(same[:, :1]), counted[:, :-1]], axis=1)
            count += int(counted.sum())
            sums["kl"] += divergence(logits[counted], found[counted]) * int(counted.sum())
            sums["agreement"] += int(same[counted].sum())
            difference = np.abs(_sigmoid(sure) - _sigmoid(confidence))
            sums["confidence"] += float(difference[counted].sum())
    parity = {f"draft_{name}": value / max(count, 1) for name, value in sums.items()}
    parity = {"draft_tokens": float(count), **parity}
    for name, limit in DRAFT_LIMITS[precision].items():
        if not parity[name] <= limit:
            raise EngineError(
                f"{path}: the built graph fails its check: {name} is {parity[name]:.3g}, over "
                f"{limit:.3g} for {precision} ({parity}), compared with itself in fp32; its "
                "weights do not stand this precision, nothing was installed"
            )
    return parity


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows that run together: of similar length, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda r: len(rows[r]))
    for begin in range(0, len(order), _GROUP):
        yield order[begin : begin + _GROUP]


def _distance(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x.astype(np.float64))), np.float32)


def _offender(path: Path, spec: DecoderSpec, tensor: Tensor, row: Sequence[int]) -> str:
    """The layer behind which the stream's error rises most; the head where none does."""
    layers = range(-1, spec.num_layers)
    expected = forward(spec, tensor, [row], taps=layers)[0]
    names = [stream_name(i) for i in layers]
    probe = TargetProbe(path, spec, capacity=len(row), outputs=names)
    streams = probe.fetch([row], names)
    errors = [
        _distance(found.astype(np.float32), expected.streams[i])
        for i, found in zip(layers, streams, strict=True)
    ]
    rises = [errors[0], *np.diff(errors)]
    worst = int(np.argmax(np.nan_to_num(rises, nan=np.inf)))
    head = _distance(probe.run([row], [0], probe.empty(1))[0][0], expected.logits)
    if head - errors[-1] > rises[worst]:
        return f"lm_head (error {errors[-1]:.2g} before it, {head:.2g} behind)"
    before = errors[worst - 1] if worst else 0.0
    name = f"model.layers.{worst - 1}" if worst else "model.embed_tokens"
    return f"{name} (error {before:.2g} before it, {errors[worst]:.2g} behind)"


def divergence(wanted: Array, found: Array) -> float:
    """Mean KL(wanted || found) over tokens, in nats.

    As log(1 + E[exp(d) - 1 - d]), E over the wanted distribution and d the differences of the
    logits less their mean under it: nothing large cancels, so fp32 does.
    """
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, len(wanted), _BLOCK):
            block = wanted[begin : begin + _BLOCK]
            p = np.exp(block - block.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            d = found[begin : begin + _BLOCK] - block
            d -= (p * d).sum(axis=-1, keepdims=True)
            p *= np.exp(d) - 1 - d
            total += float(np.log1p(p.sum(axis=-1, dtype=np.float64)).sum())
    return total / len(wanted)


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
