"""Target models: a decoder as data (`DecoderSpec`), its ONNX graph and its NumPy reference.

Rooms inside: `families` (from a config to a `DecoderSpec`), `weights` (reading them), `graph`
(writing ONNX), `plugin` (the verification op).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
