"""Weights read as named arrays: `open_weights(source)` for every format.

A source is a GGUF file, a Hugging Face folder (`config.json` and safetensors), or
`package:DISTRIBUTION/path/inside`, either of them inside an installed Python package. Names,
values and config are always those of Hugging Face.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
