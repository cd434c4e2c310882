"""An engine folder, opened: what it holds, what this machine is, and what runs the graphs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
