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
from dspark_batch.training.backbone import DraftLayer, RMSNorm
from dspark_batch.training.draft import DSparkDraft


@torch.no_grad()
def initialise_from_target(draft: DSparkDraft, decoder: nn.Module) -> None:
    """Copy what fits from a Llama-like `decoder` (q, k, v, o, gate, up, down and two norms)."""
    layers = cast("nn.ModuleList", decoder.layers)
    chosen = list(layers)[-len(draft.layers) :]
    for layer, source in zip(draft.layers, chosen, strict=True):
        assert isinstance(layer, DraftLayer)
        tensors = {name: value.float() for name, value in source.state_dict().items()}
        try:
            scale = tensors["input_layernorm.weight"]
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = cast("nn.Linear", getattr(layer.self_attn, name))
                projection.weight.copy_(tensors[f"self_attn.{name}.weight"] * scale)
            layer.self_attn.o_proj.weight.copy_(tensors["self_attn.o_proj.weight"])
            for name in ("gate_proj", "up_proj", "down_proj"):
                cast("nn.Linear", getattr(layer.mlp, name)).weight.copy_(
                    tensors[f"mlp.{name}.weight"]
                )
            layer.post_attention_layernorm.weight.copy_(tensors["post_attention_layernorm.weight"])
        except (KeyError, RuntimeError) as error:
            raise EngineError(
                f"the draft cannot start from the target's layers: {error}"
            ) from error
        for norm, projection in (
            (layer.self_attn.q_norm, layer.self_attn.q_proj),
            (layer.self_attn.k_norm, layer.self_attn.k_proj),
        ):
            if isinstance(norm, RMSNorm):
                norm.weight.fill_(float(projection.weight.pow(2).sum(1).mean().sqrt()))
    draft.norm.weight.copy_(cast("Tensor", cast("nn.Module", decoder.norm).weight).float())
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


def principal_rows(embedding: Tensor, rank: int) -> Tensor:
    """The embedding `[V, d]` in its first `rank` principal directions, whitened, `[V, r]`.

    Tokens that training never meets then still have a row like those of their neighbours.
    """
    centred = embedding - embedding.mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    rows: Tensor = centred @ directions[:, -rank:]
    whitened: Tensor = rows * values[-rank:].clamp(min=1e-12).rsqrt()
    return whitened


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
