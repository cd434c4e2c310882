"""Offline batch inference over Parquet prompt files with DSpark speculative decoding."""

from __future__ import annotations

__all__ = ["__version__"]
__version__ = "0.1.0"
