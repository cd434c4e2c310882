"""Target families: each is a function from a Hugging Face config to a `DecoderSpec`."""

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
    """The spec of a target config.

    Raises:
        EngineError: the family is not known, or the config asks for something it cannot do.
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
