"""Train a draft on the target's own answers. The only room that knows torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
