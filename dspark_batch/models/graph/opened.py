"""A graph as it is opened for captured steps: its weights are inputs.

Several sessions then read one copy of a weight on the device, target and draft alike. ONNX Runtime
shares initializers only if their memory is not its own, which from Python it is on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from dspark_batch.models.graph.builder import BFLOAT16, in_fp32_model
from dspark_batch.models.graph.paged import with_twins


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Where the bytes of a weight are, and what they are."""

    file: str
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]


def hoisted(model: onnx.ModelProto, *, twins: bool) -> tuple[bytes, dict[str, WeightPlace]]:
    """The model with an input for each weight of a data file, and where those weights are.

    With `twins`, as ONNX Runtime's CPU provider can run it: attention in standard ops, and fp32
    in place of bfloat16, for which weights are to be cast.
    """
    places: dict[str, WeightPlace] = {}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            kept.append(tensor)
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        places[tensor.name] = WeightPlace(
            entry["location"],
            int(entry["offset"]),
            int(entry["length"]),
            tensor.data_type,
            tuple(tensor.dims),
        )
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if twins:
        if any(v.type.tensor_type.elem_type == BFLOAT16 for v in model.graph.input):
            in_fp32_model(model)
        with_twins(model)
    return bytes(model.SerializeToString()), places
