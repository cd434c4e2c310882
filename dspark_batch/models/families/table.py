"""The table of target families, and `decoder_spec`, which looks up a config's family in it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from dspark_batch.errors import EngineError
from dspark_batch.models import DecoderSpec

FAMILIES = {
    "llama": "dspark_batch.models.families.llama",
    "qwen3": "dspark_batch.models.families.qwen3",
    "gemma3_text": "dspark_batch.models.families.gemma3",
    "gemma4_text": "dspark_batch.models.families.gemma4",
    "gemma4_unified_text": "dspark_batch.models.families.gemma4",
}


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The `DecoderSpec` of a target with this `Weights.config`.

    Raises:
        EngineError: the family is unknown, a key is missing or a setting is not supported.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise EngineError(
            f"target models of type {model_type!r} are not supported", hint=f"supported: {known}"
        )
    try:
        return cast(DecoderSpec, import_module(FAMILIES[model_type]).spec(config))
    except KeyError as missing:
        raise EngineError(f"the target's config.json lacks {missing}") from missing
    except ValueError as problem:
        raise EngineError(f"the target's config.json: {problem}") from problem
