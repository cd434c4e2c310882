"""The export's own check: the built graphs against an independent forward pass.

Three properties of the target, each of which a wrong graph breaks loudly: the logits are those of
`models.reference`; the context output is the residual stream after the layers that the draft
names (a tap shifted by one layer fails here); and a row's logits depend neither on its neighbours
nor on how many tokens a call carries, without which speculative text would differ from plain. The
draft's blocks are those of `drafters.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters import ReferenceDraft
from dspark_batch.engine import CacheInfo
from dspark_batch.errors import EngineError
from dspark_batch.export.probes import Array, DraftProbe, TargetProbe
from dspark_batch.models import DecoderSpec, Forward, forward, reference, stream_name

Tensor = Callable[[str], NDArray[Any]]

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

# The same of the draft, by slot; confidence as a probability.
DRAFT_LIMITS = {
    "fp32": {"draft_kl": 1e-5, "draft_confidence": 1e-3},
    "int8": {"draft_kl": 0.02, "draft_confidence": 0.02},
    "fp16": {"draft_kl": 1e-3, "draft_confidence": 0.01},
    "bf16": {"draft_kl": 5e-3, "draft_confidence": 0.02},
    "int8-weights": {"draft_kl": 0.1, "draft_confidence": 0.05},
    "int4-weights": {"draft_kl": 0.6, "draft_confidence": 0.2},
}

_GROUP_TOKENS = 256  # of a pass: their logits are what a check holds most of
_BLOCK = 32  # tokens whose distributions are compared at a time

# Tokens of a row, and of caches as wide as rows beside it would make them: multiples of 64, as the
# runtime's are.
_SHORT, _CAPACITIES = 48, (64, 128, 512)


@dataclass(frozen=True, slots=True)
class Texts:
    """What graphs are checked on."""

    rows: Sequence[Sequence[int]]
    taps: Sequence[int]
    expected: Sequence[Forward]
    """`reference.forward` of the rows with these taps."""

    def context(self, row: int) -> Array:
        """[n, taps * hidden] of a row, as the target gives it to a draft."""
        streams = self.expected[row].streams
        return np.concatenate([streams[tap] for tap in self.taps], axis=1)

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

    `tokens` is their number; `kl` in nats, `agreement` of the likeliest tokens, both means over
    tokens; `context_error` of the tap that is furthest off; `invariance` of a logit.

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
        if not found[name] <= limit:
            cause = "the weights or the graph of this family are wrong"
            advice = "please report this with the model's name"
            if probe.in_half and not np.isfinite(found["kl"]):
                cause = "fp16 ends at 65504, and this target goes beyond"
                advice = "take --precision bf16"
            elif name != "invariance":
                cause += f", from {_offender(path, spec, tensor, texts.rows[0])} on"
            raise EngineError(
                f"{path}: the built graph fails its check: {name} is {found[name]:.3g}, over "
                f"{limit:.3g} for {precision} ({found}); {cause}",
                hint=f"nothing was installed; {advice}",
            )
    return found


def check_draft(
    path: Path, cache: CacheInfo, slow: ReferenceDraft, texts: Texts, *, precision: str
) -> dict[str, float]:
    """Compare the draft's graph with `slow`; the figures go into the manifest.

    `draft_tokens` is the number of slots; the others are means over them: `draft_kl` in nats,
    `draft_agreement` of drafted tokens, `draft_confidence`, how far it is off as a probability.

    Both draft after every γ tokens of every row, from the streams of the reference. A slot counts
    as long as both have drafted the same tokens before it: the walk depends on them.

    Raises:
        EngineError: one of the figures is over its limit.
    """
    sums = dict.fromkeys(("kl", "agreement", "confidence"), 0.0)
    count = 0
    probe = DraftProbe(path, cache)
    for group in _groups(texts.rows):
        rows, contexts = [texts.rows[r] for r in group], [texts.context(r) for r in group]
        expected = slow.blocks(rows, contexts)
        for n, (running, tokens, logits, sure) in enumerate(probe.rounds(rows, contexts)):
            wanted = [expected[r] for r in running]
            same = np.stack([blocks.tokens[n] for blocks in wanted]) == tokens  # [R, γ]
            counted = np.ones_like(same)
            counted[:, 1:] = np.logical_and.accumulate(same, axis=1)[:, :-1]
            distributions = np.stack([blocks.logits[n] for blocks in wanted])
            confidence = np.stack([blocks.confidence[n] for blocks in wanted])
            count += int(counted.sum())
            sums["kl"] += divergence(distributions[counted], logits[counted]) * counted.sum()
            sums["agreement"] += int(same[counted].sum())
            difference = np.abs(_sigmoid(confidence) - _sigmoid(sure))
            sums["confidence"] += float(difference[counted].sum())
    parity = {f"draft_{name}": float(value) / max(count, 1) for name, value in sums.items()}
    parity = {"draft_tokens": float(count), **parity}
    for name, limit in DRAFT_LIMITS[precision].items():
        if not parity[name] <= limit:
            raise EngineError(
                f"{path}: the built graph fails its check: {name} is {parity[name]:.3g}, over "
                f"{limit:.3g} for {precision} ({parity}); the draft's weights or the graph of "
                "this layout are wrong",
                hint="nothing was installed; please report this with the draft's name",
            )
    return parity


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows that run together: of similar length, so that little is padding."""
    group: list[int] = []
    for r in sorted(range(len(rows)), key=lambda r: len(rows[r])):
        if group and (len(group) + 1) * len(rows[r]) > _GROUP_TOKENS:
            yield group
            group = []
        group.append(r)
    yield group


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
