"""The ahead-of-time quick plugin: its PTX, and what TensorRT is given, by a fake of its module."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from interpreted import interpret_as_quick_plugin, prepare
from verify_calls import SETTINGS, Call, assert_same, make_call

from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import launch, quick_body
from dspark_batch.models.plugin.launch import Kernel, compile_kernels, parameter_bytes
from dspark_batch.models.plugin.onnx_body import DOMAIN, INPUTS, OP_TYPE, OUTPUTS, PLUGIN_VERSION

pytest.importorskip("torch")
pytest.importorskip("triton")

POINTER, INT = 8, 4
PTX = (
    ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry dspark_verify(\n\t"
    + ",\n\t".join(
        f".param .{'u32' if 11 <= i < 16 else 'u64 .ptr .global .align 1'} dspark_verify_param_{i}"
        for i in range(20)
    )
    + "\n)\n.reqntid 512\n{\n\tret;\n}\n"
)
KERNEL = Kernel(arch=90, num_threads=512, shared_bytes=256, cubin=b"-", ptx=PTX)
SHAPES = {
    "logits": ("N", "V"),
    "logit_rows": ("R", "K1"),
    "draft_tokens": ("R", "K"),
    "draft_logits": ("R", "G", "D"),
    "draft_vocab": ("D",),
    "uniforms": ("R", "G1"),
}


# PTX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", launch.ARCHS)
def test_the_ptx_has_the_parameters_of_the_op_and_assembles(arch: int, tmp_path: Path) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    (kernel,) = compile_kernels([arch])
    ptx = quick_body.ptx_of_op(kernel)
    assert parameter_bytes(ptx) == [POINTER] * 11 + [INT] * 5 + [POINTER] * 2
    assert ptx[ptx.index("{") :] == kernel.ptx[kernel.ptx.index("{") :]
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx)
    target = f"sm_{arch}" + ("a" if arch >= 90 else "")
    command = [get_ptxas(arch).path, f"--gpu-name={target}", source, "-o", cubin]
    subprocess.run(command, check=True, capture_output=True)
    assert cubin.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", launch.ARCHS)
def test_whoever_assembles_the_ptx_rounds_alike(arch: int) -> None:
    """An assembler may fuse a product and a sum, unless they say how they round."""
    (kernel,) = compile_kernels([arch])
    found = re.findall(r"\b(?:add|sub|mul|fma|mad)\.[\w.]*f(?:32|64)", kernel.ptx)
    assert len(found) > 300
    assert {name.split(".")[1] for name in found} == {"rn"}
    assert not [name for name in found if name[:3] in ("fma", "mad")]


def test_code_that_reads_a_hidden_pointer_is_not_stripped() -> None:
    ptx = PTX.replace("ret;", "ld.param.b64 \t%rd1, [dspark_verify_param_18];\n\tret;")
    with pytest.raises(AssertionError):
        quick_body.ptx_of_op(Kernel(90, 512, 256, b"-", ptx))


# what TensorRT is given ---------------------------------------------------------------------------


class TensorDesc:
    """A tensor with symbols for a shape."""

    def __init__(self, *shape_expr: str) -> None:
        self.shape_expr = shape_expr

    def like(self) -> TensorDesc:
        return TensorDesc(*self.shape_expr)


class SymInt32:
    """A symbol; a number is one too."""

    def __init__(self, value: str | int) -> None:
        self.value = value


class SymIntExprs(list[SymInt32 | None]):
    """As many symbols as it was made for."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


@dataclass
class KernelLaunchParams:
    """The defaults of TensorRT."""

    grid_x: Any = 1
    grid_y: Any = 1
    grid_z: Any = 1
    block_x: Any = 1
    block_y: Any = 1
    block_z: Any = 1
    shared_mem: Any = 0


@dataclass
class AutoTuneCombination:
    """Types and layouts, of inputs and then of outputs."""

    io_types: str
    layouts: str


@dataclass
class FakeTensorRT:
    """`tensorrt` and `tensorrt.plugin`, which checks signatures as that of 11.4 does."""

    creator: Any = None
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    class IPluginCreatorV3Quick:
        """The creator of a quick plugin."""

    def __post_init__(self) -> None:
        self.module = ModuleType("fake_tensorrt")
        self.module.IPluginCreatorV3Quick = self.IPluginCreatorV3Quick  # type: ignore[attr-defined]
        registry = SimpleNamespace(get_creator=self.get_creator)
        self.module.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
        self.plugin = ModuleType("fake_tensorrt.plugin")
        vars(self.plugin).update(
            TensorDesc=TensorDesc,
            SymInt32=SymInt32,
            SymIntExprs=SymIntExprs,
            KernelLaunchParams=KernelLaunchParams,
            AutoTuneCombination=AutoTuneCombination,
            register=lambda name: self.decorator(name, "register"),
            autotune=lambda name: self.decorator(name, "autotune", "outputs"),
            aot_impl=lambda name: self.decorator(name, "aot_impl", "outputs", "tactic"),
        )

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        assert (name, version, namespace) == (OP_TYPE, PLUGIN_VERSION, DOMAIN)
        return self.creator

    def decorator(self, plugin_id: str, kind: str, *after: str) -> Callable[..., Any]:
        assert plugin_id == "dspark::DSparkVerify"
        assert kind != "register" or "register" not in self.functions, "already has a definition"
        assert kind == "register" or "register" in self.functions, "not registered"

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            signature = inspect.signature(function)
            assert tuple(signature.parameters) == (*INPUTS, *after)
            outputs = tuple[TensorDesc, TensorDesc]
            wanted = {"outputs": outputs, "tactic": int}
            for name, parameter in signature.parameters.items():
                assert parameter.annotation == wanted.get(name, TensorDesc)
            assert signature.return_annotation == {
                "register": outputs,
                "autotune": list[AutoTuneCombination],
                "aot_impl": tuple[str, str, KernelLaunchParams, SymIntExprs],
            }.get(kind)
            if kind == "register":
                self.creator = self.IPluginCreatorV3Quick()
            self.functions[kind] = function
            return function

        return decorate

    @property
    def inputs(self) -> list[TensorDesc]:
        return [TensorDesc(*SHAPES.get(name, ("R",))) for name in INPUTS]

    def outputs(self) -> tuple[TensorDesc, ...]:
        found = self.functions["register"](*self.inputs)
        assert isinstance(found, tuple)
        return found

    def implementation(self) -> tuple[str, str, KernelLaunchParams, list[str | int]]:
        """Name, PTX, launch and extra arguments."""
        name, ptx, params, extra = self.functions["aot_impl"](*self.inputs, self.outputs(), 0)
        assert isinstance(name, str)
        assert isinstance(ptx, str)
        assert isinstance(params, KernelLaunchParams)
        assert isinstance(extra, SymIntExprs)
        assert all(isinstance(size, SymInt32) for size in extra)
        return name, ptx, params, [size.value for size in extra if size]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A TensorRT that nothing is registered with."""
    found = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "fake_tensorrt", found.module)
    monkeypatch.setitem(sys.modules, "fake_tensorrt.plugin", found.plugin)
    return found


def test_the_outputs_have_a_row_each(fake: FakeTensorRT) -> None:
    quick_body.register(fake.module, KERNEL)
    assert set(fake.functions) == {"register", "autotune", "aot_impl"}
    assert [output.shape_expr for output in fake.outputs()] == [("R",)] * len(OUTPUTS)


def test_the_types_are_those_of_the_kernel(fake: FakeTensorRT) -> None:
    quick_body.register(fake.module, KERNEL)
    (found,) = fake.functions["autotune"](*fake.inputs, fake.outputs())
    types = [kind.strip() for kind in found.io_types.split(",")]
    floats = {"logits", "draft_logits", "temperature", "top_p", "uniforms"}
    assert types == ["FP32" if name in floats else "INT64" for name in (*INPUTS, *OUTPUTS)]
    assert found.layouts == "LINEAR"


def test_a_program_for_each_row_and_the_sizes_in_symbols(fake: FakeTensorRT) -> None:
    quick_body.register(fake.module, KERNEL)
    name, ptx, params, sizes = fake.implementation()
    assert f".entry {name}(" in ptx
    assert ptx == quick_body.ptx_of_op(KERNEL)
    assert params == KernelLaunchParams(grid_x="R", block_x=512, shared_mem=256)
    assert sizes == ["N", "V", "D", "K", "G"]


def test_a_later_kernel_takes_the_place_of_an_earlier_one(fake: FakeTensorRT) -> None:
    quick_body.register(fake.module, KERNEL)
    later = Kernel(100, 256, 128, b"-", PTX.replace("sm_90a", "sm_100a"))
    quick_body.register(fake.module, later)
    _, ptx, params, _ = fake.implementation()
    assert ".target sm_100a" in ptx
    assert (params.block_x, params.shared_mem) == (256, 128)


def test_the_quick_plugin_s_version_is_the_node_s() -> None:
    assert PLUGIN_VERSION == "1"  # `tensorrt.plugin` gives no other


# decisions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Processes in which Triton interprets."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=prepare) as executor:
        yield executor


def sizes_of(call: Call) -> dict[str | int, int]:
    """What the symbols are in a call."""
    return {
        symbol: size
        for name in INPUTS
        for symbol, size in zip(SHAPES.get(name, ("R",)), call.feeds[name].shape, strict=True)
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_launch_by_tensorrt_decides_as_the_specification(
    name: str, fake: FakeTensorRT, pool: Executor
) -> None:
    quick_body.register(fake.module, KERNEL)
    _, _, params, symbols = fake.implementation()
    call = make_call(seed=41, **SETTINGS[name] | {"rows": 64})
    size = sizes_of(call)
    block = 256 if "vocab" in SETTINGS[name] else 16
    sizes = [size[symbol] for symbol in symbols]
    found = pool.submit(interpret_as_quick_plugin, call, size[params.grid_x], sizes, block)
    assert_same(call, lambda _: found.result())


# refusals -----------------------------------------------------------------------------------------


def test_a_tensorrt_without_quick_plugins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bare_tensorrt", ModuleType("bare_tensorrt"))
    with pytest.raises(EngineError, match=r"bare_tensorrt has no quick plugins; .*trt_body"):
        quick_body.register(sys.modules["bare_tensorrt"], KERNEL)


def test_a_process_has_one_of_the_two_plugins(fake: FakeTensorRT) -> None:
    fake.creator = object()
    with pytest.raises(EngineError, match=r"registered as the plugin of trt_body; .*in another"):
        quick_body.register(fake.module, KERNEL)
    assert not fake.functions


def test_a_kernel_of_an_engine_has_no_ptx(fake: FakeTensorRT) -> None:
    with pytest.raises(EngineError, match=r"sm_90 has no PTX.*compile it"):
        quick_body.register(fake.module, Kernel(90, 512, 256, b"-"))
    assert not fake.functions


# the real bindings --------------------------------------------------------------------------------


def register_with_tensorrt(kernel: Kernel) -> tuple[bool, list[str]]:
    """Whether TensorRT makes an ahead-of-time plugin of it, and the types of its outputs."""
    import tensorrt as trt

    quick_body.register(trt, kernel)
    creator = trt.get_plugin_registry().get_creator(OP_TYPE, PLUGIN_VERSION, DOMAIN)
    plugin = creator.create_plugin(
        OP_TYPE,
        DOMAIN,
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.UNKNOWN,
    )
    types = [
        trt.DataType.FLOAT if launch.OPERANDS[name] == "*fp32" else trt.DataType.INT64
        for name in INPUTS
    ]
    ranks = [len(SHAPES.get(name, ("R",))) for name in INPUTS]
    found = plugin.get_output_data_types(types, ranks)
    return isinstance(plugin, trt.IPluginV3QuickAOTBuild), [kind.name for kind in found]


def test_the_real_bindings_take_it() -> None:
    pytest.importorskip("tensorrt.plugin", exc_type=ImportError)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(register_with_tensorrt, KERNEL).result()
    assert found == (True, ["INT64", "INT64"])
