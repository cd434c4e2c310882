from . import contract as contract
from . import onnx_body as onnx_body
from . import trt_body as trt_body
from .trt_build import Bounds as Bounds
from .trt_build import PlanReport as PlanReport
from .trt_build import PlanRequest as PlanRequest
from .trt_build import build_plan as build_plan
