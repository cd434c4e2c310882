"""Weight sources as named arrays: `open_weights(source)` is the only door.

A source is a GGUF file, a Hugging Face folder (safetensors and `config.json`), or
`package:DISTRIBUTION/path/inside`, a file or folder that an installed Python package ships.
Whatever the format, what comes out has Hugging Face names, values and configuration.
"""

from __future__ import annotations

from dspark_batch.weights.source import Weights, open_weights, resolve_source, sha256_of

__all__ = ["Weights", "open_weights", "resolve_source", "sha256_of"]
