"""Weight sources as named arrays: `open_weights(source)`.

A source is a GGUF file, a Hugging Face folder (safetensors and `config.json`), or
`package:DISTRIBUTION/path/inside`, a file or folder that an installed Python package ships.
Whatever the format, what comes out has Hugging Face names, values and configuration.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
