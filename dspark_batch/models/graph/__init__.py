"""How graphs are written: a builder, the blocks of a transformer, linear layers by precision."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
