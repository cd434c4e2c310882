"""Start a draft from its target's weights.

The backbone takes the target's last layers. Their input norms are folded into the projections, so
that the shared context rows (which pass no layer norm) reach every layer's keys and values in the
scale that its weights expect; `fc` starts as the identity on the last tap, which makes the last
layer's context exact when that tap is the output of the layer before it. Per-head q/k norms, which
a Llama target lacks, start at the scale that its queries and keys have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dspark_batch.errors import EngineError
from dspark_batch.models import DecoderSpec
from dspark_batch.training.backbone import DraftLayer, RMSNorm
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.target import NamedTensor, tensor


def initialise_from_target(draft: DSparkDraft, read: NamedTensor, spec: DecoderSpec) -> None:
    """Copy what fits from the target's last layers; `read` gives its tensors by name.

    Norms that the draft has not (Gemma's after attention and MLP) cannot be copied; there each
    half layer starts by adding nothing. Raises `EngineError` where the shapes do not fit.
    """
    initialise_heads(draft)
    copy_layers([cast("DraftLayer", layer) for layer in draft.layers], read, spec)
    with torch.no_grad():
        draft.norm.weight.copy_(tensor(read, "model.norm.weight") + spec.norm_offset)


@torch.no_grad()
def copy_layers(layers: Sequence[DraftLayer], read: NamedTensor, spec: DecoderSpec) -> None:
    """Copy the target's last layers into `layers`. Raises `EngineError` where shapes differ."""
    first = spec.num_layers - len(layers)
    for i, layer in enumerate(layers):
        try:
            _copy_layer(layer, read, f"model.layers.{first + i}", spec)
        except (EngineError, RuntimeError) as error:
            raise EngineError(
                f"the draft cannot start from the target's layer {first + i}: {error}",
                hint='set [training] start = "random"',
            ) from error


def _copy_layer(layer: DraftLayer, read: NamedTensor, name: str, spec: DecoderSpec) -> None:
    attention = layer.self_attn
    scale = tensor(read, f"{name}.input_layernorm.weight") + spec.norm_offset
    for projection in ("q_proj", "k_proj", "v_proj"):
        linear = cast("nn.Linear", getattr(attention, projection))
        linear.weight.copy_(tensor(read, f"{name}.self_attn.{projection}.weight") * scale)
    attention.o_proj.weight.copy_(tensor(read, f"{name}.self_attn.o_proj.weight"))
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = cast("nn.Linear", getattr(layer.mlp, projection))
        linear.weight.copy_(tensor(read, f"{name}.mlp.{projection}.weight"))
    before = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
    layer.post_attention_layernorm.weight.copy_(
        tensor(read, f"{name}.{before}.weight") + spec.norm_offset
    )
    if spec.sandwich_norms:
        attention.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for norm, linear, kind in (
        (attention.q_norm, attention.q_proj, "q_norm"),
        (attention.k_norm, attention.k_proj, "k_norm"),
    ):
        if isinstance(norm, RMSNorm) and spec.qk_norm:
            norm.weight.copy_(tensor(read, f"{name}.self_attn.{kind}.weight") + spec.norm_offset)
        elif isinstance(norm, RMSNorm):
            norm.weight.fill_(float(linear.weight.pow(2).sum(1).mean().sqrt()))


@torch.no_grad()
def initialise_heads(draft: DSparkDraft) -> None:
    """`fc` as the identity on the last tap, heads that say nothing yet."""
    size = draft.config.hidden_size
    draft.fc.weight.zero_()
    draft.fc.weight[:, -size:].copy_(torch.eye(size))
    if draft.markov_head is not None:
        draft.markov_head.markov_w1.weight.copy_(
            principal_rows(draft.embed_weight.float(), draft.config.markov_rank)
        )
        draft.markov_head.markov_w2.weight.zero_()
    if draft.confidence_head is not None:
        draft.confidence_head.proj.weight.zero_()
        draft.confidence_head.proj.bias.zero_()


@torch.no_grad()
def initialise_from_draft(draft: DSparkDraft, start: DSparkDraft) -> None:
    """Go on from another draft of the same shape; the draft vocabularies may differ.

    Ids that the older one has not start without a Markov bias.
    """
    kept = {name: value for name, value in start.state_dict().items() if "markov_w2" not in name}
    missing = set(draft.load_state_dict(kept, strict=False).missing_keys)
    if draft.markov_head is not None and start.markov_head is not None:
        missing.discard("markov_head.markov_w2.weight")
        rows = start.draft_ids[draft.draft_vocab]
        old = start.markov_head.markov_w2.weight
        new = torch.where(rows[:, None] >= 0, old[rows.clamp(min=0)], 0.0)
        draft.markov_head.markov_w2.weight.copy_(new)
    if missing:
        raise EngineError(f"the draft to start from has no {', '.join(sorted(missing))}")


def principal_rows(embedding: Tensor, rank: int) -> Tensor:
    """The embedding `[V, d]` in its first `rank` principal directions, whitened, `[V, r]`.

    Tokens that training never meets then still have a row like those of their neighbours. A rank
    beyond d repeats directions.
    """
    centred = embedding - embedding.mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    whitened: Tensor = centred @ directions * values.clamp(min=1e-12).rsqrt()
    return whitened.repeat(1, -(-rank // whitened.shape[1]))[:, -rank:]


def frequent_ids(
    counts: Tensor, size: int, *, always: Sequence[int] = (), fallback: Tensor | None = None
) -> Tensor:
    """A draft vocabulary: `size` target ids, ascending, `[V']`.

    First the ids in `always` (stop tokens), then by how often the target emitted them
    (`counts [V]`), then by `fallback [V]` (say, counts in the prompts), then the lowest ids.
    """
    if not len(always) <= size <= len(counts):
        raise EngineError(f"a draft vocabulary of {size} ids does not fit {len(counts)} target ids")
    order = counts.double()
    if fallback is not None:
        order = order + fallback.double() / (fallback.double().sum() + 1)
    order[torch.tensor(always, dtype=torch.long)] = float("inf")
    return order.sort(descending=True, stable=True).indices[:size].sort().values
