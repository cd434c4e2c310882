"""What the package shows, and which module may import what."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import dspark_batch

ROOT = Path(dspark_batch.__file__).parent
HEAVY = {"onnx", "onnxruntime", "torch", "pyarrow", "polars", "gguf", "safetensors", "transformers"}
LOOP = ("decode/loop.py", "decode/schedule.py")


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def imports(name: str) -> set[str]:
    """Every module that a file imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)


def test_the_public_surface_is_small() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert assigned <= {"__version__", "__all__"}
    shown = set(getattr(dspark_batch, "__all__", ["__version__"]))
    assert shown == {"__version__"}


@pytest.mark.parametrize(
    "name",
    [n for n in sources() if n.startswith("algorithm/") or n in ("types.py", *LOOP)],
)
def test_the_algorithm_needs_numpy_alone(name: str) -> None:
    assert top(imports(name)) <= {"numpy", "dspark_batch"}
    own = {module for module in imports(name) if module.startswith("dspark_batch.")}
    allowed = ("dspark_batch.decode.algorithm", "dspark_batch.decode.types")
    if name in LOOP:  # the engine for type checkers only
        allowed = (*allowed, "dspark_batch.engine.engine", "dspark_batch.decode.schedule")
    assert all(module.startswith(allowed) for module in own)


def test_the_engine_knows_no_cache_and_no_library() -> None:
    assert not top(imports("engine/engine.py")) & HEAVY


def test_every_module_says_what_it_is_for() -> None:
    for name in sources():
        assert ast.get_docstring(ast.parse((ROOT / name).read_text())), name
    banned = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not banned & {Path(name).name for name in sources()}
