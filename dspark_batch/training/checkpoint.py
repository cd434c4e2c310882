"""A draft on disk: `config.json` and `model.safetensors` in the published DeepSpec layout.

Written without `embed_tokens` and `lm_head`, which are the target's; read with or without them.
With a reduced vocabulary the file carries `d2t`, int64 `[V']`, in the convention of EAGLE-3 and
speculators: **offsets**, `target_id = draft_id + d2t[draft_id]`, target ids ascending. In memory
`DSparkDraft.draft_vocab` holds the target ids themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dspark_batch.drafters import config_from_json
from dspark_batch.engine import replacing
from dspark_batch.errors import EngineError
from dspark_batch.training.draft import DSparkDraft

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def offsets_from_draft_vocab(draft_vocab: Tensor) -> Tensor:
    """Target ids `[V']` to the stored offsets `d2t [V']`."""
    return draft_vocab - torch.arange(len(draft_vocab))


def draft_vocab_from_offsets(d2t: Tensor) -> Tensor:
    """Stored offsets `d2t [V']` to target ids `[V']`."""
    return d2t + torch.arange(len(d2t))


def save_draft(
    draft: DSparkDraft,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    temperatures: Sequence[float] | None = None,
) -> None:
    """Write the draft's own tensors in `dtype`; each file appears whole or not at all.

    `temperatures` [γ] of the confidence logits go into the config, as `confidence_temperatures`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise EngineError(f"the draft's weights do not fit {dtype}: some are not finite")
    if draft.config.draft_vocab_size is not None:
        tensors["d2t"] = offsets_from_draft_vocab(draft.draft_vocab.cpu())
    config = draft.config.as_json(dtype=str(dtype).removeprefix("torch."))
    if temperatures is not None:
        config["confidence_temperatures"] = list(temperatures)
    # `save_file` would leave a file that only its owner can read.
    with replacing(folder / CONFIG) as config_file, replacing(folder / WEIGHTS) as weights_file:
        weights_file.write_bytes(save(tensors, metadata={"format": "pt"}))
        config_file.write_text(json.dumps(config, indent=2) + "\n")


def load_draft(
    folder: Path, *, embed_tokens: Tensor | None = None, lm_head: Tensor | None = None
) -> DSparkDraft:
    """Read a draft in fp32. `embed_tokens [V, d]` and `lm_head [V, d]` are the target's, full.

    They may be left out where the checkpoint carries its own.
    """
    config = config_from_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"cannot read the draft {folder / WEIGHTS}: {error}") from error
    own_embed = tensors.pop("embed_tokens.weight", None)
    own_head = tensors.pop("lm_head.weight", None)
    tensors.pop("t2d", None)
    d2t = tensors.pop("d2t", None)
    embed = own_embed if embed_tokens is None else embed_tokens
    if embed is None or (own_head is None and lm_head is None):
        raise EngineError(f"{folder} has no embedding or head of its own", hint="give the target's")
    if (d2t is None) != (config.draft_vocab_size is None):
        raise EngineError(f"{folder}: d2t and draft_vocab_size must come together")
    vocab = None if d2t is None else draft_vocab_from_offsets(d2t)
    if lm_head is not None:
        head = lm_head if vocab is None else lm_head[vocab]
    else:
        assert own_head is not None
        head = own_head
    draft = DSparkDraft(config, embed_tokens=embed.float(), lm_head=head.float(), draft_vocab=vocab)
    try:
        draft.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise EngineError(f"{folder / WEIGHTS} does not fit its config: {error}") from error
    return draft
