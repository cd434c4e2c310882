"""The verification op `dspark::DSparkVerify`: one contract, and its bodies.

`specification` is the op in NumPy. The ONNX, TensorRT and Triton bodies are held to it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
