"""A tiny pair whose draft is right now and then: one that is random is right too seldom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny import HIDDEN, draft_config, target_config, write_draft, write_target


def write_agreeing_pair(folder: Path, *, stops: bool) -> tuple[Path, Path]:
    """A target that mostly follows its last token, and a draft whose Markov head knows that."""
    config = target_config("llama", eos_token_id=0 if stops else None)
    target = write_target(folder / "target", config)
    weights = load_file(target / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.03
    save_file(weights, target / "model.safetensors")
    draft = write_draft(folder / "draft", draft_config(markov_rank=HIDDEN))
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    scale = np.sqrt((embedding**2).mean(axis=1, keepdims=True))
    guess = load_file(draft / "model.safetensors")
    guess["markov_head.markov_w1.weight"] = embedding / scale * weights["model.norm.weight"]
    guess["markov_head.markov_w2.weight"] = 3 * head
    guess["confidence_head.proj.weight"] *= 4  # so that confidences differ
    save_file(guess, draft / "model.safetensors")
    return target, draft
