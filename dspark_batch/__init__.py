"""Offline batch processing of prompts with DSpark speculative decoding."""

from __future__ import annotations

__version__ = "0.1.0"
