"""Qwen3: Llama with an RMSNorm on the heads of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_batch.models import DecoderSpec
from dspark_batch.models.families import llama


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec of a config with `model_type: qwen3`."""
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported")
    return replace(llama.spec(config), family="qwen3", qk_norm=True)
