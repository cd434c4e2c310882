from . import onnx_body as onnx_body
from . import trt_body as trt_body
from .launch import local_gpu_arch as local_gpu_arch
from .onnx_body import PLUGIN_VERSION as PLUGIN_VERSION
from .trt_build import Bounds as Bounds
from .trt_build import PlanReport as PlanReport
from .trt_build import PlanRequest as PlanRequest
from .trt_build import build_plan as build_plan
