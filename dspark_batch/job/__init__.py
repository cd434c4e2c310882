"""Run a job: Parquet in, decode, Parquet out; also its dry run, progress and status."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
