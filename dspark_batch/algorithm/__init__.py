"""The paper in NumPy: arrays in, arrays out, randomness passed in; no model, device or log.

`acceptance` is the specification of the verification op; the ONNX and TensorRT bodies are
compared with it decision by decision.
"""
