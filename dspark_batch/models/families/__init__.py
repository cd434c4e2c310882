"""Target families: `decoder_spec` turns a config into a `DecoderSpec`; one module per family."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
