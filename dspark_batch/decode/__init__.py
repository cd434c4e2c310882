"""Speculative decoding itself: the loop, its schedule, and the values that cross borders.

NumPy only: no model, no file format and no device is known here. `algorithm` has the formulas.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
