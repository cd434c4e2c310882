"""The rooms of the package: what `ls` shows, doors, and what must stay light.

Which room may import which is in pyproject.toml (`make lint` runs import-linter), and so is which
room may use which library (ruff, TID251).
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import dspark_batch

ROOT = Path(dspark_batch.__file__).parent
HEAVY = {"onnx", "onnxruntime", "torch", "pyarrow", "polars", "gguf", "safetensors", "transformers"}
ROOMS = sorted(
    str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.rglob("*/__init__.py")
)
OUTSIDE = (ROOT.parent / "tests", ROOT.parent / "benchmarks")


def sources(folder: Path = ROOT) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> list[tuple[str, str]]:
    """Module and name of every import from our own package, wherever the statement stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "dspark_batch"]


def libraries(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dspark_batch", "lazy_loader"}


def door(room: str) -> dict[str, str]:
    """The names that a room shows, and the module that each is from ("" for a module)."""
    stub = ROOT / room.replace(".", "/") / "__init__.pyi"
    found = {}
    for node in ast.parse(stub.read_text()).body:
        assert isinstance(node, ast.ImportFrom), f"{stub}: a door has nothing but imports"
        assert node.level == 1, f"{stub}: only its own modules"
        for alias in node.names:
            assert alias.name == alias.asname, f"{stub}: import {alias.name} as itself"
            found[alias.name] = node.module or ""
    return found


def test_ls_shows_a_dozen_entries_at_the_most() -> None:
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 12, sorted(entries)


def test_the_package_itself_shows_its_version_alone() -> None:
    assert dspark_batch.__all__ == ["__version__"]
    assert not imported(ROOT / "__init__.py")


@pytest.mark.parametrize("path", sources(), ids=named)
def test_no_module_reaches_behind_a_door(path: Path) -> None:
    """From another room: only `from dspark_batch.ROOM import name`, and the name is in its door."""
    own = ".".join(("dspark_batch", *path.parent.relative_to(ROOT).parts))
    for module, name in imported(path):
        if module in (own, "dspark_batch", "dspark_batch.errors"):
            continue
        if module.rpartition(".")[0] == own and module.removeprefix("dspark_batch.") not in ROOMS:
            continue
        room = module.removeprefix("dspark_batch.")
        assert room in ROOMS, f"{named(path)} imports {module}: go through the room's door"
        assert name in door(room), f"{named(path)}: {name} is not in the door of {room}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_shows_what_is_there_and_what_others_use(room: str) -> None:
    if room == "training":
        pytest.importorskip("torch")
    package = importlib.import_module(f"dspark_batch.{room}")
    assert package.__doc__, "a room says what it is for"
    shown = door(room)
    assert set(package.__all__) == set(shown)
    modules = {path.stem for path in (ROOT / room.replace(".", "/")).glob("*.py")}
    for name, module in shown.items():
        assert not module or name not in modules, f"{name} is a module of {room} as well"
        assert hasattr(package, name)
    places = [path for path in sources() if path.parent != ROOT / room.replace(".", "/")]
    places += [path for folder in OUTSIDE for path in sources(folder)]
    used = {name for path in places for at, name in imported(path) if at == f"dspark_batch.{room}"}
    assert set(shown) <= used | {"main"}, f"nobody uses {set(shown) - used}"


@pytest.mark.parametrize("path", sources(ROOT / "decode"), ids=named)
def test_decoding_needs_numpy_alone(path: Path) -> None:
    assert libraries(path) <= {"numpy"}


def test_the_loop_names_no_runtime_and_a_runtime_no_file_format() -> None:
    loop = (ROOT / "decode" / "loop.py").read_text().lower()
    assert not [word for word in ("onnx", "tensorrt", "runtimes", "parquet") if word in loop]
    for path in sources(ROOT / "engine" / "runtimes"):
        text = path.read_text().lower()
        assert not [word for word in ("parquet", "pyarrow", "polars") if word in text], path


def test_an_engine_is_opened_without_heavy_libraries_of_its_own() -> None:
    for path in (ROOT / "engine").glob("*.py"):
        assert not libraries(path) & HEAVY, path


def test_a_door_opens_nothing_until_it_is_used() -> None:
    rooms = ", ".join(f"dspark_batch.{room}" for room in ROOMS)
    code = f"import sys, {rooms}; print(sorted({HEAVY | {'numpy', 'pydantic'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_module_says_what_it_is_for() -> None:
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path
    banned = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not banned & {path.name for path in sources()}
