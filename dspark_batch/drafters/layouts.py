"""Layouts of draft checkpoints: who wrote it, and what its `config.json` means.

| layout | told by | layer ids | slot k predicts |
|---|---|---|---|
| DeepSpec, Qwen3 flavour | `architectures: Qwen3DSparkModel` | i | the token after it |
| DeepSpec, Gemma 4 flavour | `architectures: Gemma4DSparkModel` | i | the token after it |
| SpecForge | `architectures: DSparkDraftModel`, nested `dflash_config` | i | the token after it |
| speculators | `speculators_model_type: dspark` | i + 1 | as `sample_from_anchor` says |

i is the output of decoder layer i. Names of tensors are the same in all of them. A draft that is
read in a slightly wrong way still gives the right text, only slower: nothing here is guessed, and
whatever a config or a file holds beyond what is built is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.config import DraftConfig
from dspark_batch.drafters.spec import DraftSpec
from dspark_batch.errors import EngineError
from dspark_batch.models import activation, rope_from_parameters
from dspark_batch.models.weights import Weights

Config = Mapping[str, Any]

# Tensors beside the network: tables that it may share with the target, and the vocabulary's maps.
_TABLES = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
# speculators saves what it needed of its target for training.
_OF_THE_TARGET = "verifier_"


def draft_spec(weights: Weights) -> DraftSpec:
    """Read the config of a draft checkpoint, and compare it with the tensors that are there.

    Raises:
        EngineError: the layout is not known, a key is missing, a value or a tensor has no graph.
    """
    config = weights.config
    try:
        spec = _layout(config)(config, weights)
    except KeyError as missing:
        raise EngineError(f"draft config.json lacks {missing}") from missing
    except ValueError as problem:
        raise EngineError(f"draft config.json: {problem}") from problem
    _check_tensors(spec, weights)
    return spec


def draft_vocab(weights: Weights, spec: DraftSpec) -> NDArray[np.int64]:
    """Draft id -> target id `[D]`. `d2t` holds offsets, as in EAGLE-3 and speculators.

    Raises:
        EngineError: the map is not there, is of another size, or leaves the target's vocabulary.
    """
    names, size = weights.names(), weights.config.get("draft_vocab_size") or spec.vocab_size
    if "d2t" not in names:
        if size != spec.vocab_size:
            raise EngineError(f"the draft has draft_vocab_size {size}, but no d2t to map it")
        return np.arange(spec.vocab_size)
    offsets = weights.tensor("d2t").astype(np.int64)
    vocab = offsets + np.arange(len(offsets))
    if vocab.min() < 0 or vocab.max() >= spec.vocab_size or len(set(vocab.tolist())) != len(vocab):
        raise EngineError(
            f"the draft's d2t does not map its {len(vocab)} tokens into the target's "
            f"vocabulary of {spec.vocab_size}"
        )
    if "draft_vocab_size" in weights.config and size != len(vocab):
        raise EngineError(f"the draft has draft_vocab_size {size}, but a d2t of {len(vocab)}")
    if "t2d" in names and not np.array_equal(np.flatnonzero(weights.tensor("t2d")), np.sort(vocab)):
        raise EngineError("the draft's t2d and d2t name different tokens of the target")
    return vocab


def _layout(config: Config) -> Callable[[Config, Weights], DraftSpec]:
    kind = config.get("speculators_model_type")
    if kind is not None:
        if kind != "dspark":
            raise EngineError(
                f"draft config.json: speculators_model_type {kind!r} is not known",
                hint="known: dspark",
            )
        return _speculators
    names = config.get("architectures") or ["none"]
    if names[0] not in LAYOUTS:
        raise EngineError(
            f"draft config.json: architectures names {names[0]!r}, a layout that is not known",
            hint=f"known: {', '.join(LAYOUTS)}, speculators_model_type dspark",
        )
    return LAYOUTS[names[0]]


def _deepspec(config: Config, weights: Weights) -> DraftSpec:
    """The base of all: DeepSpec's keys, a Qwen3 backbone.

    `embedding_scale` and `final_logit_softcapping` are for drafts of other targets than Qwen3; the
    published ones have neither. Nor do they lack the norms that a Llama-style draft lacks.
    """
    parsed = DraftConfig.parsed(config)
    spec = DraftSpec(
        block_size=parsed.block_size,
        vocab_size=parsed.vocab_size,
        mask_token_id=parsed.mask_token_id,
        taps=parsed.target_layer_ids,
        hidden_size=parsed.hidden_size,
        num_layers=parsed.num_hidden_layers,
        num_heads=parsed.num_attention_heads,
        num_kv_heads=parsed.num_key_value_heads,
        head_dim=parsed.head_dim,
        epsilon=parsed.rms_norm_eps,
        markov_rank=parsed.markov_rank,
        markov_head=parsed.markov_head_type if parsed.markov_rank else None,
        confidence_head=parsed.enable_confidence_head,
        confidence_with_markov=parsed.uses_markov_confidence,
        rope=rope_from_parameters(
            parsed.rope_parameters,
            head_dim=parsed.head_dim,
            max_positions=parsed.max_position_embeddings,
        ),
        qk_norm="layers.0.self_attn.q_norm.weight" in weights.names(),
        activation=activation(config.get("hidden_act") or "silu"),
        embedding_scale=parsed.embedding_scale,
        logit_cap=config.get("final_logit_softcapping"),
    )
    bonus_anchor = bool(config.get("dspark_bonus_anchor"))  # vLLM's name for the opposite
    return _with_anchor(spec, config.get("sample_from_anchor", not bonus_anchor))


def _deepspec_gemma4(config: Config, weights: Weights) -> DraftSpec:
    """Gemma 4's layers: its full attention, its four norms, its cap. Every layer is a full one."""
    gemma = {
        "head_dim": config["global_head_dim"],
        "num_key_value_heads": config["num_global_key_value_heads"],
        "rope_parameters": config["rope_parameters"]["full_attention"],
        "hidden_act": config["hidden_activation"],
    }
    return replace(
        _deepspec({**config, **gemma}, weights),
        sandwich_norms=True,
        keys_as_values=bool(config["attention_k_eq_v"]),
        v_norm=True,
        layer_scalar=True,
        attention_scale=1.0,
        embedding_scale=config["hidden_size"] ** 0.5,
    )


def _specforge(config: Config, weights: Weights) -> DraftSpec:
    """DeepSpec's keys, some of them inside `dflash_config`; the target's embedding and head."""
    return _deepspec({**config, **config["dflash_config"]}, weights)


def _speculators(config: Config, weights: Weights) -> DraftSpec:
    """The backbone's keys come from `transformer_layer_config`; `weights` has unpacked them."""
    ids = [int(i) - 1 for i in config["aux_hidden_state_layer_ids"]]
    spec = _deepspec({**config, "target_layer_ids": ids, "sample_from_anchor": True}, weights)
    return _with_anchor(spec, _samples_from_anchor(config))


def _samples_from_anchor(config: Config) -> bool:
    """speculators has written the key since July 2026; before, the number of tokens tells."""
    said, size = config.get("sample_from_anchor"), config["block_size"]
    if said is not None:
        return bool(said)
    for method in (config.get("speculators_config") or {}).get("proposal_methods") or ():
        if method.get("speculative_tokens") in (size, size - 1):
            return bool(method["speculative_tokens"] == size)
    raise ValueError(
        "sample_from_anchor is not given, and speculators_config names no number of tokens to "
        f"tell it from; add it: true if the block of {size} drafts {size} tokens, false if "
        f"{size - 1}. The wrong one costs nearly all acceptance"
    )


def _with_anchor(spec: DraftSpec, samples_from_anchor: Any) -> DraftSpec:
    """Of a block whose anchor drafts nothing, one token fewer is drafted than it has slots."""
    if samples_from_anchor in (None, True):
        if spec.block_size < 1:
            raise ValueError(f"block_size {spec.block_size} drafts nothing")
        return spec
    if spec.markov_head == "rnn":
        raise ValueError("sample_from_anchor false is not supported with markov_head_type 'rnn'")
    if spec.block_size < 2:
        raise ValueError(f"block_size {spec.block_size} drafts nothing")
    return replace(spec, block_size=spec.block_size - 1, anchor_drafts=False)


def _check_tensors(spec: DraftSpec, weights: Weights) -> None:
    """Every tensor must be part of the network that is built, and none be missing."""
    known = {*spec.tensor_names(), *_TABLES}
    other = [n for n in weights.names() if n not in known and not n.startswith(_OF_THE_TARGET)]
    if other:
        raise EngineError(
            f"the draft's config.json does not account for {_listed(other)}: the checkpoint is "
            "of another network"
        )
    missing = [name for name in spec.tensor_names() if name not in weights.names()]
    if missing:
        raise EngineError(f"the draft lacks the weights {_listed(missing)}")


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


LAYOUTS: dict[str, Callable[[Config, Weights], DraftSpec]] = {
    "Qwen3DSparkModel": _deepspec,
    "Gemma4DSparkModel": _deepspec_gemma4,
    "DSparkDraftModel": _specforge,
}
