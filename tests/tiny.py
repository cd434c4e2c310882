"""Tiny random targets and drafts in the published layouts, and engines exported from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dspark_batch.export.pipeline import export
from dspark_batch.models.reference import forward
from dspark_batch.models.smoothing import Outliers
from dspark_batch.models.spec import DecoderSpec

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 40, 32, 3, 4, 2, 8, 48
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def target_config(family: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [
            {
                "llama": "LlamaForCausalLM",
                "qwen3": "Qwen3ForCausalLM",
                "gemma3_text": "Gemma3ForCausalLM",
            }[family]
        ],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": 0,
        "rope_parameters": dict(ROPE),
    }
    if family == "gemma3_text":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": dict(ROPE),
            },
        }
    return config | changes


def write_target(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """A Hugging Face folder with random fp32 weights, large enough that logits differ."""
    rng = np.random.default_rng(seed)
    gemma = config["model_type"] == "gemma3_text"
    width, kv = HEADS * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (rng.uniform(0.5, 1.5, size) - (1.0 if gemma else 0.0)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": norm(HIDDEN),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if gemma:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        tensors |= {f"{name}.{n}.weight": norm(HIDDEN) for n in norms}
        shapes = {"q": (width, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, width)}
        tensors |= {f"{name}.self_attn.{p}_proj.weight": matrix(*s) for p, s in shapes.items()}
        if config["model_type"] != "llama":
            for p in "qk":
                tensors[f"{name}.self_attn.{p}_norm.weight"] = norm(HEAD_DIM)
        for p in ("gate", "up"):
            tensors[f"{name}.mlp.{p}_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    return _write(folder, config, tensors)


def draft_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3DSparkModel"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 2,
        "num_target_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "layer_types": ["full_attention"] * 2,
        "block_size": 4,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": [0, 1],
        "num_anchors": 8,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "tie_word_embeddings": False,
        "rope_parameters": dict(ROPE),
    } | changes


def write_draft(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 1,
    draft_vocab: np.ndarray | None = None,
) -> Path:
    """A draft checkpoint in DeepSpec's layout without embedding and head."""
    rng = np.random.default_rng(seed)
    width, kv, rank = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, config["markov_rank"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {
        "fc.weight": matrix(HIDDEN, HIDDEN * len(config["target_layer_ids"])),
        "hidden_norm.weight": norm(HIDDEN),
        "norm.weight": norm(HIDDEN),
    }
    for i in range(config["num_hidden_layers"]):
        name = f"layers.{i}"
        shapes = {"q": (width, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, width)}
        tensors |= {f"{name}.self_attn.{p}_proj.weight": matrix(*s) for p, s in shapes.items()}
        tensors |= {f"{name}.self_attn.{p}_norm.weight": norm(HEAD_DIM) for p in "qk"}
        for n in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{n}.weight"] = norm(HIDDEN)
        for p in ("gate", "up"):
            tensors[f"{name}.mlp.{p}_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    size = VOCAB if draft_vocab is None else len(draft_vocab)
    if rank:
        tensors["markov_head.markov_w1.weight"] = matrix(VOCAB, rank) * 2
        tensors["markov_head.markov_w2.weight"] = matrix(size, rank) * 2
    if config["markov_head_type"] == "gated" and rank:
        tensors["markov_head.gate_proj.weight"] = matrix(rank, HIDDEN + rank)
        tensors["markov_head.gate_proj.bias"] = matrix(1, rank)[0]
    if config["markov_head_type"] == "rnn" and rank:
        tensors["markov_head.joint_proj.weight"] = matrix(3 * rank, HIDDEN + 2 * rank)
        tensors["markov_head.joint_proj.bias"] = matrix(1, 3 * rank)[0]
    if config["enable_confidence_head"]:
        features = HIDDEN + (rank if config["confidence_head_with_markov"] else 0)
        tensors["confidence_head.proj.weight"] = matrix(1, features)
        tensors["confidence_head.proj.bias"] = matrix(1, 1)[0]
    if draft_vocab is not None:
        config = config | {"draft_vocab_size": size}
        tensors["d2t"] = draft_vocab - np.arange(size)
    return _write(folder, config, tensors)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


def export_pair(
    folder: Path,
    target: Path,
    draft: Path | str | None,
    *,
    precision: str = "fp32",
    max_rows: int = 4,
    max_tokens: int = 96,
    engine: str = "",
    **options: Any,
) -> Path:
    """Export into `folder/engines/tiny` from a recipe in `folder/export/tiny.toml`.

    `draft` is a checkpoint, without a lookup beside it, or the lines of the recipe's section, or
    None for no draft at all.
    `engine` are more lines of the engine's section, `options` those of `export`.
    """
    recipe = folder / "export" / "tiny.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'[target]\nweights = "{target}"\n']
    if draft is None:
        draft = 'drafter = "none"'
    if isinstance(draft, Path):
        draft = f'weights = "{draft}"\nlookup = "none"'
    lines.append(f"[draft]\n{draft}\n")
    lines.append(
        f'[engine]\nprecision = "{precision}"\nmax_rows = {max_rows}\nmax_tokens = {max_tokens}\n'
        + engine
    )
    recipe.write_text("\n".join(lines))
    return export(recipe, output=folder / "engines" / "tiny", **options)


def smoothing_factors(
    spec: DecoderSpec, tensor: Any, rows: list[list[int]]
) -> dict[str, np.ndarray]:
    """The factors of a target that has seen the rows."""
    outliers = Outliers()
    forward(spec, tensor, rows, observe=outliers)
    return outliers.factors(spec)
