"""`dspark::DSparkVerify` as an ahead-of-time quick plugin of full TensorRT (`tensorrt.plugin`).

For a plan file that runs where there is no Python, from C++ or with `trtexec`: TensorRT keeps the
kernel's PTX and how to launch it, and launches it itself. `plugin.trt_body` is the plugin for all
else: TensorRT-RTX has no quick plugins, TensorRT calls this module experimental, and it loses
memory of the GPU with ahead-of-time plugins whenever the shapes of a call change (11.1 and 11.2.1,
NVIDIA/TensorRT issue 4849).

To build, on the GPU that the engine is for:

    register(tensorrt, *compile_kernels([90]))
    ...                                         # parse the ONNX file
    check_network(tensorrt, network)            # of plugin.trt_body
    ...                                         # build

To run: nothing, only deserialize.

The parser finds the plugin by the node's attributes `plugin_namespace` and `plugin_version`, as it
finds that of `trt_body`: a process registers one of the two. A quick plugin may be run by Python
too; PREFER_AOT_PYTHON_PLUGINS chooses between the two for a network. This one is ahead of time
only, so it needs no flag and minds none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any

from dspark_batch.errors import EngineError
from dspark_batch.models.plugin.launch import (
    HIDDEN_POINTERS,
    KERNEL_NAME,
    OPERANDS,
    PARAMETER_TYPES,
    SIZES,
    Kernel,
)
from dspark_batch.models.plugin.onnx_body import DOMAIN, INPUTS, OP_TYPE, OUTPUTS, PLUGIN_VERSION

PLUGIN_ID = f"{DOMAIN}::{OP_TYPE}"  # its version is always "1"
# Where the sizes that the kernel takes are in the shapes of its operands.
_DIMENSIONS = {
    "num_logits": ("logits", 0),
    "vocab_size": ("logits", 1),
    "draft_vocab_size": ("draft_logits", 2),
    "num_drafts": ("draft_tokens", 1),
    "block_size": ("draft_logits", 1),
}


def register(trt: Any, kernel: Kernel) -> None:
    """Make the plugin known to TensorRT; networks parsed from now on get `kernel`.

    Raises:
        EngineError: `trt` has no quick plugins, the plugin of `trt_body` is registered, or the
            kernel has no PTX.
    """
    try:
        quick = import_module(f"{trt.__name__}.plugin")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{trt.__name__} has no quick plugins; use full TensorRT, or the plugin of trt_body"
        ) from error
    ptx = ptx_of_op(kernel)
    creator = trt.get_plugin_registry().get_creator(OP_TYPE, PLUGIN_VERSION, DOMAIN)
    if creator is None:
        quick.register(PLUGIN_ID)(_described(quick))
        quick.autotune(PLUGIN_ID)(_typed(quick))
    elif not isinstance(creator, trt.IPluginCreatorV3Quick):
        raise EngineError(
            f"{PLUGIN_ID} is registered as the plugin of trt_body; a process has one of the two, "
            "so build this engine in another"
        )
    quick.aot_impl(PLUGIN_ID)(_implemented(quick, kernel, ptx))


def ptx_of_op(kernel: Kernel) -> str:
    """The kernel's PTX with the op's parameters alone, for TensorRT passes no more.

    Triton's hidden pointers are the last parameters, and the code does not read them.

    Raises:
        EngineError: there is no such PTX.
    """
    hidden = re.compile(rf"(,\s*\.param [^,()]+){{{HIDDEN_POINTERS}}}(?=\s*\))")
    ptx, num_found = hidden.subn("", kernel.ptx, count=1)
    if not num_found:
        raise EngineError(
            f"the kernel for sm_{kernel.arch} has no PTX, which a quick plugin needs; compile it, "
            "as one that is read from an engine has none"
        )
    mentioned = map(int, re.findall(rf"{KERNEL_NAME}_param_(\d+)", ptx))
    assert max(mentioned) < len(PARAMETER_TYPES) - HIDDEN_POINTERS
    return ptx


def _described(quick: Any) -> Callable[..., Any]:
    """What `quick.register` decorates: the outputs, of the inputs."""

    def describe(*inputs: Any) -> Any:
        lengths = inputs[INPUTS.index("lengths")]
        return tuple(lengths.like() for _ in OUTPUTS)  # int64 [R]

    return _with_signature(describe, quick, returns=_descriptions(quick))


def _typed(quick: Any) -> Callable[..., Any]:
    """What `quick.autotune` decorates: the types that the kernel takes. It has no tactics."""

    def combinations(*descriptions: Any) -> Any:
        types = ("FP32" if kind == "*fp32" else "INT64" for kind in OPERANDS.values())
        return [quick.AutoTuneCombination(", ".join(types), "LINEAR")]

    returns = list[quick.AutoTuneCombination]
    return _with_signature(combinations, quick, "outputs", returns=returns)


def _implemented(quick: Any, kernel: Kernel, ptx: str) -> Callable[..., Any]:
    """What `quick.aot_impl` decorates: the kernel, its grid, and its sizes in symbols."""

    def implement(*descriptions: Any) -> Any:
        shapes = {
            name: description.shape_expr
            for name, description in zip(INPUTS, descriptions, strict=False)
        }
        launch = quick.KernelLaunchParams()
        launch.grid_x = shapes["lengths"][0]  # a program for each row
        launch.block_x = kernel.num_threads
        launch.shared_mem = kernel.shared_bytes
        sizes = quick.SymIntExprs(len(SIZES))
        for i, size in enumerate(SIZES):
            operand, axis = _DIMENSIONS[size]
            sizes[i] = quick.SymInt32(shapes[operand][axis])
        return KERNEL_NAME, ptx, launch, sizes

    returns = tuple[str, str, quick.KernelLaunchParams, quick.SymIntExprs]
    return _with_signature(implement, quick, "outputs", "tactic", returns=returns)


def _descriptions(quick: Any) -> Any:
    return tuple[(quick.TensorDesc,) * len(OUTPUTS)]  # type: ignore[misc]


def _with_signature(
    function: Callable[..., Any], quick: Any, *after: str, returns: Any
) -> Callable[..., Any]:
    """`function` with the signature that TensorRT reads: the op's inputs, then `after`."""
    kinds = {"outputs": _descriptions(quick), "tactic": int}
    parameters = [
        Parameter(
            name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kinds.get(name, quick.TensorDesc)
        )
        for name in (*INPUTS, *after)
    ]
    function.__signature__ = Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=returns
    )
    return function
