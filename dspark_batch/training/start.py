"""The draft that a training starts from: its shape, vocabulary, mask token and first weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_batch.drafters import DraftConfig, config_from_json
from dspark_batch.errors import EngineError, InputError
from dspark_batch.models.weights import Weights
from dspark_batch.training.backbone import DraftLayer
from dspark_batch.training.checkpoint import CONFIG, load_draft
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.features import TrainingSequence
from dspark_batch.training.geometry import draft_config_from_target, evenly_tapped
from dspark_batch.training.initialise import (
    copy_layers,
    frequent_ids,
    initialise_from_draft,
    initialise_from_target,
    initialise_heads,
)
from dspark_batch.training.recipe import DraftSection, TrainingRecipe
from dspark_batch.training.responses import Sequences
from dspark_batch.training.target import TargetTables

# Of a draft from scratch; 16,384 ids are cheap to score and cover most of what targets say.
_LAYERS, _BLOCK_SIZE, _MARKOV_RANK, _VOCAB_SIZE = 3, 7, 128, 16384


def resolved_taps(recipe: TrainingRecipe, weights: Weights) -> tuple[int, ...]:
    """The target layers that the draft will read. Raises `EngineError` for one there is not."""
    folder, taps = recipe.start_folder, recipe.draft.taps
    num_layers = int(weights.config["num_hidden_layers"])
    if folder is not None:
        taps = config_from_json(folder / CONFIG).target_layer_ids
    elif taps is None:
        taps = evenly_tapped(num_layers)
    if list(taps) != sorted(set(taps)) or not taps or taps[0] < -1 or taps[-1] >= num_layers:
        raise EngineError(
            f"{recipe.path}: [draft] taps {list(taps)} must increase within -1..{num_layers - 1} "
            f"(the target has {num_layers} layers)"
        )
    return taps


def check_start(recipe: TrainingRecipe, weights: Weights, tables: TargetTables) -> None:
    """Raise `EngineError` where no draft can start as the recipe says, whatever the responses."""
    start = _started_from(recipe, tables)
    if start is None:
        config = _from_scratch(recipe, weights, tables)
        if recipe.training.start != "random":
            layers = [DraftLayer(config) for _ in range(config.num_hidden_layers)]
            copy_layers(layers, weights.tensor, tables.spec)


def start_draft(
    recipe: TrainingRecipe,
    weights: Weights,
    tables: TargetTables,
    sequences: Sequences,
    *,
    text_folder: Path,
) -> DSparkDraft:
    """Build the draft of a recipe with its first weights."""
    start = _started_from(recipe, tables)
    config = _from_scratch(recipe, weights, tables) if start is None else start.config
    if recipe.draft.block_size is not None:
        config = replace(config, block_size=recipe.draft.block_size)
    mask = recipe.draft.mask_token_id
    if mask is None and start is None:
        mask = unused_token_id(text_folder, weights, sequences)
    if mask is not None:
        config = replace(config, mask_token_id=mask)
    check_mask(config, sequences, recipe)
    vocab = _vocabulary(recipe.draft, config, weights, sequences, start)
    config = replace(config, draft_vocab_size=None if vocab is None else len(vocab))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        draft = DSparkDraft(
            config,
            embed_tokens=tables.embed,
            lm_head=tables.head if vocab is None else tables.head[vocab],
            draft_vocab=vocab,
        )
    if start is not None:
        initialise_from_draft(draft, start)
    elif recipe.training.start == "random":
        initialise_heads(draft)
    else:
        initialise_from_target(draft, weights.tensor, tables.spec)
    return draft


def _started_from(recipe: TrainingRecipe, tables: TargetTables) -> DSparkDraft | None:
    """The draft to go on from. Raises `EngineError` where it is not one of this recipe's kind."""
    folder, asked = recipe.start_folder, recipe.draft
    if folder is None:
        return None
    config = config_from_json(folder / CONFIG)
    size = (config.hidden_size, config.vocab_size)
    if size != (tables.spec.hidden_size, tables.spec.vocab_size):
        raise EngineError(
            f"the draft {folder} is for another target: hidden_size and vocab_size {size} are not "
            f"{(tables.spec.hidden_size, tables.spec.vocab_size)}"
        )
    has = {
        "layers": config.num_hidden_layers,
        "taps": config.target_layer_ids,
        "markov_head": config.markov_head_type if config.markov_rank else "none",
        "markov_rank": config.markov_rank,
        "confidence_head": config.enable_confidence_head,
        "confidence_with_markov": config.uses_markov_confidence,
        "intermediate_size": config.intermediate_size,
    }
    other = [
        f"{key} {value} is not {has[key]}"
        for key, value in asked.model_dump(include=set(has), exclude_none=True).items()
        if value != has[key]
    ]
    if other:
        raise EngineError(
            f"{recipe.path}: [draft] differs from the draft to start from, {folder}: "
            + ", ".join(other)
        )
    return load_draft(folder, embed_tokens=tables.embed, lm_head=tables.head)


def _from_scratch(recipe: TrainingRecipe, weights: Weights, tables: TargetTables) -> DraftConfig:
    asked, target = recipe.draft, weights.config
    head = asked.markov_head or "vanilla"
    if head == "none" and (asked.markov_rank or asked.confidence_with_markov):
        raise EngineError(
            f"{recipe.path}: [draft] markov_head is none, so there is nothing for markov_rank and "
            "confidence_with_markov",
            hint="leave them out",
        )
    rank = min(_MARKOV_RANK, int(target["hidden_size"]))
    return draft_config_from_target(
        target,
        num_layers=asked.layers or min(_LAYERS, int(target["num_hidden_layers"])),
        block_size=_BLOCK_SIZE,
        markov_rank=0 if head == "none" else asked.markov_rank or rank,
        markov_head_type="vanilla" if head == "none" else head,
        enable_confidence_head=asked.confidence_head is not False,
        confidence_head_with_markov=asked.confidence_with_markov is not False,
        mask_token_id=0,
        target_layer_ids=resolved_taps(recipe, weights),
        intermediate_size=asked.intermediate_size,
        embedding_scale=tables.spec.embedding_scale,
    )


def unused_token_id(text_folder: Path, weights: Weights, sequences: Sequences) -> int:
    """A mask token: an id beyond the tokenizer's, or else a special token that no text has.

    Raises `InputError` where there is none.
    """
    path = text_folder / "tokenizer.json"
    if not path.exists():
        raise InputError(
            "the target has no tokenizer to find a mask token in",
            hint="set [draft] mask_token_id to an id that no text has",
        )
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer.get("added_tokens", [])
    known = {int(token["id"]) for token in added} | set(_model_ids(tokenizer))
    size = int(weights.config["vocab_size"])
    beyond = [id for id in range(max(known, default=-1) + 1, size)]
    if beyond:
        return beyond[0]
    used = set(weights.stop_token_ids) | set(_counts(sequences.training + sequences.held_out))
    named = set(weights.special_tokens.values())
    free = [
        int(token["id"])
        for token in added
        if token.get("special") and token["id"] not in used and token["content"] not in named
    ]
    if not free:
        raise InputError(
            "the target has no special token that the responses leave unused",
            hint="set [draft] mask_token_id to an id that no text has",
        )
    return min(free)


def _model_ids(tokenizer: dict[str, Any]) -> Sequence[int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        return [int(id) for id in vocabulary.values()]
    return range(len(vocabulary))  # a unigram model lists pieces


def check_mask(config: DraftConfig, sequences: Sequences, recipe: TrainingRecipe) -> None:
    """Raise `InputError` for a mask token that is in the text or in no vocabulary."""
    mask = config.mask_token_id
    if not 0 <= mask < config.vocab_size:
        raise InputError(
            f"{recipe.path}: [draft] mask_token_id {mask} is not in the target's vocabulary of "
            f"{config.vocab_size}"
        )
    rows = sequences.training + sequences.held_out
    found = sum(mask in sequence.token_ids for sequence in rows)
    if found:
        raise InputError(
            f"{recipe.path}: the mask token {mask} appears in {found:,} of {len(rows):,} prompts "
            "and responses",
            hint="set [draft] mask_token_id to an id that no text has",
        )


def _vocabulary(
    asked: DraftSection,
    config: DraftConfig,
    weights: Weights,
    sequences: Sequences,
    start: DSparkDraft | None,
) -> Tensor | None:
    """The draft's ids, ascending; None for all of the target's."""
    if start is not None and asked.vocab_size is None:
        return None if config.draft_vocab_size is None else start.draft_vocab
    size = _VOCAB_SIZE if asked.vocab_size is None else asked.vocab_size
    if size == "full" or size >= config.vocab_size:
        return None
    responses, prompts = torch.zeros(config.vocab_size), torch.zeros(config.vocab_size)
    for counter, counts in (
        (_counts(sequences.training, response=True), responses),
        (_counts(sequences.training, response=False), prompts),
    ):
        for token, count in counter.items():
            counts[token] = count
    always = [*weights.stop_token_ids]
    if start is not None and len(always) + start.config.num_draft_ids <= size:
        always = sorted({*always, *start.draft_vocab.tolist()})
    return frequent_ids(responses, size, always=always, fallback=prompts)


def _counts(sequences: Sequence[TrainingSequence], *, response: bool | None = None) -> Counter[int]:
    """Occurrences of ids in the responses, in the prompts, or (None) in both."""
    counter: Counter[int] = Counter()
    for sequence in sequences:
        split = sequence.num_prompt_tokens
        ids = sequence.token_ids
        counter.update(ids if response is None else ids[split:] if response else ids[:split])
    return counter
