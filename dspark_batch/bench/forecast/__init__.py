"""Speed of a machine that is not here: recorded rounds, replayed by a cost table or a roofline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
