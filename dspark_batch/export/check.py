"""The check of every export: the built graphs against independent references in NumPy.

Of the target it checks three properties:

- the logits are those of `models.reference`
- the context is the residual stream after the layers that the draft names, so that a tap shifted
  by one layer fails here
- a row's logits depend neither on other rows nor on the number of tokens in a call; otherwise
  speculative decoding would give other text than plain decoding

The draft's blocks must be those of `drafters.reference`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dspark_batch.drafters import ReferenceDraft
from dspark_batch.engine import CacheInfo
from dspark_batch.errors import EngineError
from dspark_batch.export.probes import (
    Array,
    DraftProbe,
    PagedDraftProbe,
    PagedTargetProbe,
    TargetProbe,
)
from dspark_batch.models import DecoderSpec, Forward, reference, stream_name
from dspark_batch.models.weights import ReadTensor, Weights

# The largest values that pass, a few times those of good engines. In int8, `kl` is 0.006 for
# SmolLM2 and 0.02 for Gemma 3 270M; sums that saturate make it 0.12.
#   kl             KL divergence of the next-token distribution from that of fp32, in nats
#   context_error  of a residual stream, relative to its norm
#   invariance     largest difference of a logit
LIMITS = {
    "fp32": {"kl": 1e-5, "context_error": 1e-3, "invariance": 1e-2},
    "int8": {"kl": 0.03, "context_error": 0.1, "invariance": 1e-2},
    # fp16 sums depend on their order. bf16 graphs are checked in fp32, so they do not.
    "fp16": {"kl": 1e-3, "context_error": 0.02, "invariance": 0.25},
    "bf16": {"kl": 5e-3, "context_error": 0.05, "invariance": 1e-2},
    "int8-weights": {"kl": 0.1, "context_error": 0.1, "invariance": 0.25},
    "int4-weights": {"kl": 0.6, "context_error": 0.5, "invariance": 0.25},
}

# The same for a draft, by slot; confidence as a probability.
DRAFT_LIMITS = {
    "fp32": {"draft_kl": 1e-5, "draft_confidence": 1e-3},
    "int8": {"draft_kl": 0.02, "draft_confidence": 0.02},
    "fp16": {"draft_kl": 1e-3, "draft_confidence": 0.01},
    "bf16": {"draft_kl": 5e-3, "draft_confidence": 0.02},
    "int8-weights": {"draft_kl": 0.1, "draft_confidence": 0.05},
    "int4-weights": {"draft_kl": 0.6, "draft_confidence": 0.2},
}

_GROUP_TOKENS = 256  # of a pass; their logits take most of the memory of a check
_BLOCK = 32  # tokens whose distributions are compared at once

# Length of a short row, and cache capacities that longer rows in the batch would lead to: multiples
# of 64, like those of the runtime.
_SHORT, _CAPACITIES = 48, (64, 128, 512)


_TEXT_MODEL = ("model.layers.", "model.embed_tokens", "model.norm", "lm_head.")


def check_all_used(weights: Weights, spec: DecoderSpec, used: Collection[str]) -> None:
    """Refuse weights of which the reference read only a part: they are of another network.

    A bias, a scale of quantized weights or an adapter changes the result, and would be dropped
    without a word. What transformers drops too is allowed: rotary tables, the head of a tied
    model, keys of a layer that reads those of another, and all beside a multimodal text model.

    Raises:
        EngineError: a tensor that is not among `used`, by name.
    """
    allowed = {"lm_head.weight"} if spec.tied_head else set()
    for i, layer in enumerate(spec.layers):
        if layer.shares_with is not None:
            names = ("k_proj", "v_proj", "k_norm")
            allowed |= {f"model.layers.{i}.self_attn.{name}.weight" for name in names}
    is_multimodal = "outer_model_type" in weights.config
    other = [
        name
        for name in weights.names()
        if name not in used and name not in allowed and not name.endswith("rotary_emb.inv_freq")
        if name.startswith(_TEXT_MODEL) or not is_multimodal
    ]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise EngineError(
            f"the target has weights that no {spec.family} model has: {other[0]}{more}; "
            "it is of another network, or quantized",
            hint="give the original model's folder in bf16, fp16 or fp32, or a GGUF file",
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of text with what the reference makes of them."""

    rows: Sequence[Sequence[int]]
    taps: Sequence[int]
    expected: Sequence[Forward]
    """Of each row, with these taps."""

    def context(self, row: int) -> Array:
        """[n, taps * hidden] of a row, as the target gives it to the draft."""
        streams = self.expected[row].streams
        return np.concatenate([streams[tap] for tap in self.taps], axis=1)

    @classmethod
    def from_rows(
        cls,
        spec: DecoderSpec,
        read: ReadTensor,
        rows: Sequence[Sequence[int]],
        *,
        taps: Sequence[int],
        **options: Any,
    ) -> Self:
        """Run the reference on the rows; `options` are passed to `reference.forward`."""
        return cls(rows, taps, reference.forward(spec, read, rows, taps=taps, **options))


def check_target(
    path: Path,
    spec: DecoderSpec,
    read: ReadTensor,
    texts: Texts,
    *,
    precision: str,
    paged: bool = False,
) -> dict[str, float]:
    """Compare the target's graph with the reference; returns figures for the manifest.

    `tokens` is their number; `kl` (in nats) and `agreement` of the likeliest tokens are means over
    them; `context_error` is that of the worst tap; `invariance` the largest difference of a logit.

    Raises:
        EngineError: a figure is over its limit.
    """
    kind = PagedTargetProbe if paged else TargetProbe
    probe = kind(path, spec, capacity=max(map(len, texts.rows)) + 8)
    total = sum(map(len, texts.rows))
    found = {"tokens": float(total), "kl": 0.0, "context_error": 0.0, "agreement": 0.0}
    head = reference.head_weight(spec, read)  # once: a GGUF file takes a while
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
                error = _relative_error(part, texts.expected[r].streams[tap])
                found["context_error"] = max(found["context_error"], error)
    found["invariance"] = _invariance(probe, texts.rows)
    for name, limit in LIMITS[precision].items():
        if not found[name] <= limit:
            cause = "the weights or the graph of this family are wrong"
            hint = "please report this, with the name of the model"
            if probe.in_half and not np.isfinite(found["kl"]):
                cause = "this target has values over 65504, the largest of fp16"
                hint = "export again with --precision bf16"
            elif name != "invariance":
                cause += f", from {_first_wrong(kind, path, spec, read, texts.rows[0])} on"
            problem = _over_limit(name, found, limit, precision)
            raise EngineError(f"{path.name} {problem}; {cause}; nothing was installed", hint=hint)
    return found


def check_draft(
    path: Path,
    cache: CacheInfo,
    slow: ReferenceDraft,
    texts: Texts,
    *,
    precision: str,
    paged: bool = False,
) -> dict[str, float]:
    """Compare the draft's graph with `slow`; returns figures for the manifest.

    `draft_tokens` is the number of slots compared. The others are means over them: `draft_kl` in
    nats, `draft_agreement` of drafted tokens, `draft_confidence` the error as a probability.

    Both draft after every γ tokens of every row, with the reference's context. A slot counts only
    if both drafted the same tokens before it, because its logits depend on them.

    Raises:
        EngineError: a figure is over its limit.
    """
    sums = dict.fromkeys(("kl", "agreement", "confidence"), 0.0)
    count = 0
    probe: DraftProbe | PagedDraftProbe = (
        DraftProbe(path, cache)
        if not paged
        else (PagedDraftProbe(path, cache, mask_token_id=slow.spec.mask_token_id))
    )
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
            problem = _over_limit(name, parity, limit, precision)
            raise EngineError(
                f"{path.name} {problem}; the weights or the graph of this layout are wrong; "
                "nothing was installed",
                hint="please report this, with the name of the draft",
            )
    return parity


def _over_limit(name: str, figures: Mapping[str, float], limit: float, precision: str) -> str:
    listed = ", ".join(f"{name} {figure:.3g}" for name, figure in figures.items())
    return (
        f"fails its check: {name} is {figures[name]:.3g}, over {limit:.3g} for {precision} "
        f"({listed})"
    )


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows to run together, of similar length so that there is little padding."""
    group: list[int] = []
    for r in sorted(range(len(rows)), key=lambda r: len(rows[r])):
        if group and (len(group) + 1) * len(rows[r]) > _GROUP_TOKENS:
            yield group
            group = []
        group.append(r)
    yield group


def _relative_error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x.astype(np.float64))), np.float32)


def _first_wrong(
    kind: type[TargetProbe],
    path: Path,
    spec: DecoderSpec,
    read: ReadTensor,
    row: Sequence[int],
) -> str:
    """Name and errors of the layer in which the error of the stream rises most, or of the head."""
    layers = range(-1, spec.num_layers)
    expected = reference.forward(spec, read, [row], taps=layers)[0]
    names = [stream_name(i) for i in layers]
    probe = kind(path, spec, capacity=len(row), outputs=names)
    streams = probe.fetch([row], names)
    errors = [
        _relative_error(found.astype(np.float32), expected.streams[i])
        for i, found in zip(layers, streams, strict=True)
    ]
    rises = [errors[0], *np.diff(errors)]
    worst = int(np.argmax(np.nan_to_num(rises, nan=np.inf)))
    head = _relative_error(probe.run([row], [0], probe.empty(1))[0][0], expected.logits)
    if head - errors[-1] > rises[worst]:
        return f"lm_head (error {errors[-1]:.2g} before it, {head:.2g} after it)"
    before = errors[worst - 1] if worst else 0.0
    name = f"model.layers.{worst - 1}" if worst else "model.embed_tokens"
    return f"{name} (error {before:.2g} before it, {errors[worst]:.2g} after it)"


def divergence(wanted: Array, found: Array) -> float:
    """Mean KL(wanted || found) over tokens, in nats, from the logits of both.

    Computed as log(1 + E[exp(d) - 1 - d]), where E is over the wanted distribution and d is the
    difference of the logits minus its mean: nothing large cancels, so fp32 is precise enough.
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
    """Largest difference in the logits of a row's last five tokens between ways to compute them.

    They are: all at once, one token at a time, and with other rows in the batch. For a short row
    also: in a cache that it fills, and in larger ones.
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
