"""`pytest --quick`: what someone runs before each commit.

It takes what the program itself needs and no more: whatever is compared with torch, transformers or
a TensorRT builder is skipped, as where they are not installed, and so are real models and the tests
that are marked slow. `python tests/mutants.py` says what both sets catch.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

ORACLES = ("torch", "transformers", "triton", "tensorrt_rtx", "tensorrt_rtx_libs")
LEFT_OUT = ("real", "slow")


class _WithoutOracles:
    """A finder of modules that finds no oracle."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, *rest: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in ORACLES else self._finder.find_spec(name, *rest)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="no oracles, real models or slow tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        sys.meta_path[:] = map(_WithoutOracles, sys.meta_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    out = [item for item in items if any(item.get_closest_marker(name) for name in LEFT_OUT)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]
