"""`dspark::DSparkVerify` as a TensorRT plugin: `IPluginV3` around the kernel of `plugin.launch`.

`trt` is the module to work with, `tensorrt` or `tensorrt_rtx`; their classes have the same names.
To build an engine:

    trt = import_tensorrt_rtx()
    register(trt, compile_kernels([89]))
    ...                                         # parse the ONNX file
    check_network(trt, network)
    ...                                         # build

To run one: `register(trt)`, then deserialize. The kernels are fields of the plugin, which TensorRT
keeps in the engine: a plan file needs nothing beside it and cannot meet kernels of another version.

The parser makes one PLUGIN_V3 layer of a node whose plugin is registered. Otherwise it expands the
node's function body.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import EngineError
from dspark_batch.models.plugin.contract import (
    DOMAIN,
    INPUT_NAMES,
    OP_TYPE,
    OPERANDS,
    OUTPUT_NAMES,
    PLUGIN_VERSION,
)
from dspark_batch.models.plugin.launch import (
    STAGES,
    CudaLauncher,
    Kernel,
    Launcher,
    VerifyCall,
    workspace_bytes,
)

MakeLauncher = Callable[[Sequence[Kernel]], Launcher]
# By module: TensorRT's registry does not keep a Python creator alive.
_creators: dict[str, Any] = {}
_CUBIN, _LAUNCH = "cubin_sm_", "launch_sm_"  # names of fields, before architecture and stage


@cache
def import_tensorrt_rtx() -> Any:
    """Import TensorRT-RTX so that its ONNX parser can add plugins; only the first import can do it.

    When the parser adds one it opens `libtensorrt_rtx.so`, in the folder that it was itself loaded
    from. The wheel (1.7.1) has `libtensorrt_rtx.so.1` alone, and the process dies in
    `std::terminate`. So both libraries are loaded here first, from a folder of links that has the
    missing name too, and the bindings find them loaded.

    Raises:
        EngineError: TensorRT-RTX is not installed.
    """
    assert "tensorrt_rtx" not in sys.modules, "its parser was loaded without the missing name"
    wheel = find_spec("tensorrt_rtx_libs")
    if wheel is None or wheel.origin is None:
        raise EngineError(
            "TensorRT-RTX is not installed", hint='pip install "dspark-batch[tensorrt-rtx]"'
        )
    libraries = [
        Path(wheel.origin).with_name(name)
        for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
    ]
    if all(library.exists() for library in libraries):  # other systems, other names
        # The parser looks for the name late: the folder stays until the process ends.
        folder = Path(tempfile.mkdtemp(prefix="dspark-batch-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        links = [folder / library.name for library in libraries]
        for link, library in zip(links, libraries, strict=True):
            link.symlink_to(library)
        (folder / "libtensorrt_rtx.so").symlink_to(libraries[0])
        for link in links:
            ctypes.CDLL(str(link))
    return import_module("tensorrt_rtx")


def import_library(name: str) -> Any:
    """`tensorrt` or `tensorrt_rtx` as the module to work with.

    Raises:
        EngineError: it is not installed.
    """
    if name == "tensorrt_rtx":
        return import_tensorrt_rtx()
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be imported ({error})",
            hint='pip install "dspark-batch[tensorrt]"',
        ) from error


def register(
    trt: Any, kernels: Iterable[Kernel] = (), *, make_launcher: MakeLauncher = CudaLauncher
) -> Any:
    """Make the plugin known to TensorRT, in place of an earlier one; returns its creator.

    `kernels` go into the engines that are built. Running one takes them from there.
    """
    registry = trt.get_plugin_registry()
    earlier = _creators.pop(trt.__name__, None)
    if earlier is not None:
        registry.deregister_creator(earlier)
    creator = _creator_class(trt)(tuple(kernels), make_launcher)
    if not registry.register_creator(creator, DOMAIN):
        raise EngineError(f"TensorRT refused to register the plugin {DOMAIN}::{OP_TYPE}")
    _creators[trt.__name__] = creator
    return creator


def check_network(trt: Any, network: Any) -> None:
    """Refuse a parsed network that does not hold the plugin once, fed as its kernel needs it.

    Raises:
        EngineError: no plugin layer or several, an operand of another type, or a draft vocabulary
            that does not ascend.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    if len(plugins) != 1:
        raise EngineError(
            f"the network has {len(plugins)} plugin layers and must have one, {DOMAIN}::{OP_TYPE}",
            hint="register the plugin before parsing the graph",
        )
    operands = {name: plugins[0].get_input(i) for i, name in enumerate(INPUT_NAMES)}
    for name, operand in operands.items():
        wanted = _data_type(trt, name)
        if operand.dtype != wanted:
            raise EngineError(
                f"{OP_TYPE}: {name} is {operand.dtype} and must be {wanted}",
                hint="cast the logits of a graph in half precision to float32 before verification",
            )
    for layer in layers:
        if layer.get_output(0).name == operands["draft_vocab"].name:
            _check_ascending(trt, layer)


def _check_ascending(trt: Any, layer: Any) -> None:
    """The kernel finds a token's draft id by bisection. A constant can be checked, an input not."""
    if layer.type == trt.LayerType.CONSTANT:
        layer.__class__ = trt.IConstantLayer  # how the bindings cast
        if (np.diff(layer.weights) <= 0).any():
            raise EngineError(
                f"{OP_TYPE}: the draft vocabulary must be ascending target ids, each once",
                hint="sort the rows of the draft's head by target id and export again",
            )


def _data_type(trt: Any, name: str) -> Any:
    return trt.DataType.FLOAT if OPERANDS[name].dtype == "float32" else trt.DataType.INT64


@cache
def _creator_class(trt: Any) -> Any:
    """The creator's class, derived from that of `trt`."""
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates the plugin for the parser, with kernels, and for an engine, from its fields."""

        def __init__(self, kernels: tuple[Kernel, ...], make_launcher: MakeLauncher) -> None:
            super().__init__()
            self.name, self.plugin_namespace, self.plugin_version = OP_TYPE, DOMAIN, PLUGIN_VERSION
            self.field_names = trt.PluginFieldCollection([])
            self._kernels, self._make_launcher = kernels, make_launcher

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            kernels = self._kernels
            if phase == trt.TensorRTPhase.RUNTIME:
                kernels = kernels_from_arrays({field.name: field.data for field in fields})
            if not kernels:
                raise EngineError(
                    f"{OP_TYPE} was registered without kernels, so no engine can be built"
                )
            return plugin_class(kernels, self._make_launcher(kernels))

    return Creator


@cache
def _plugin_class(trt: Any) -> Any:
    """The plugin's class, derived from those of `trt`."""

    class Plugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """All three capabilities in one object. It has no state but its kernels."""

        def __init__(self, kernels: tuple[Kernel, ...], launch: Launcher) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = OP_TYPE, DOMAIN
            self.plugin_version = PLUGIN_VERSION
            self.num_outputs = len(OUTPUT_NAMES)
            self._kernels, self._launch = kernels, launch
            # A PluginField points to its array and does not keep it.
            self._arrays = arrays_from_kernels(kernels)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self._kernels, self._launch)

        # build

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [_data_type(trt, name) for name in OUTPUT_NAMES]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            num_rows = inputs[INPUT_NAMES.index("lengths")][0]
            return [trt.DimsExprs([num_rows]) for _ in OUTPUT_NAMES]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            tensor = in_out[pos].desc
            wanted = _data_type(trt, (*INPUT_NAMES, *OUTPUT_NAMES)[pos])
            return bool(tensor.format == trt.TensorFormat.LINEAR and tensor.type == wanted)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            most = {
                name: tuple(tensor.max) for name, tensor in zip(INPUT_NAMES, inputs, strict=True)
            }
            num_rows, num_drafts = most["draft_tokens"]
            return workspace_bytes(num_rows, num_drafts, most["logits"][1], most["draft_logits"][2])

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_fields_to_serialize(self) -> Any:
            kinds = {1: trt.PluginFieldType.INT8, 4: trt.PluginFieldType.INT32}
            fields = [
                trt.PluginField(name, array, kinds[array.itemsize])
                for name, array in self._arrays.items()
            ]
            return trt.PluginFieldCollection(fields)

        # run

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def enqueue(
            self,
            input_desc: Any,
            output_desc: Any,
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            shapes = {
                name: tuple(tensor.dims)
                for name, tensor in zip(INPUT_NAMES, input_desc, strict=True)
            }
            num_rows, num_drafts = shapes["draft_tokens"]
            num_logits, vocab_size = shapes["logits"]
            _, block_size, draft_vocab_size = shapes["draft_logits"]
            call = VerifyCall(
                pointers=(*inputs, *outputs),
                num_rows=num_rows,
                num_logits=num_logits,
                vocab_size=vocab_size,
                draft_vocab_size=draft_vocab_size,
                num_drafts=num_drafts,
                block_size=block_size,
                workspace=workspace,
            )
            self._launch(call, stream)

    return Plugin


def arrays_from_kernels(kernels: Iterable[Kernel]) -> dict[str, NDArray[Any]]:
    """The plugin's fields in an engine, by name: two for each stage of each architecture."""
    arrays: dict[str, NDArray[Any]] = {}
    for kernel in kernels:
        launch = [kernel.num_threads, kernel.shared_bytes]
        arrays[f"{_LAUNCH}{kernel.arch}_{kernel.stage}"] = np.array(launch, np.int32)
        arrays[f"{_CUBIN}{kernel.arch}_{kernel.stage}"] = np.frombuffer(kernel.cubin, np.int8)
    return arrays


def kernels_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> tuple[Kernel, ...]:
    """Inverse of `arrays_from_kernels`, but for the order: stages are in that of their launch.

    Raises:
        EngineError: the engine has the kernel of a version without these stages.
    """
    names = (name.removeprefix(_CUBIN) for name in arrays if name.startswith(_CUBIN))
    kernels = []
    for name in names:
        arch, _, stage = name.partition("_")
        if stage not in STAGES:
            raise EngineError(
                "the engine has the verification kernel of another version of this program",
                hint="export the engine again",
            )
        num_threads, shared_bytes = map(int, arrays[_LAUNCH + name])
        cubin = arrays[_CUBIN + name].tobytes()
        kernels.append(Kernel(int(arch), stage, num_threads, shared_bytes, cubin))
    return tuple(sorted(kernels, key=lambda kernel: (kernel.arch, STAGES.index(kernel.stage))))
