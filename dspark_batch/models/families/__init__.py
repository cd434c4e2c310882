"""Target families: each is a function from a Hugging Face config to a `DecoderSpec`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
