"""The memory benchmark, which also shows that an export does not hold the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from export_memory import main

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_building_holds_no_more_of_a_larger_model(precision: str, tmp_path: Path) -> None:
    sizes = ("--billions", "0.02", "--billions", "0.08", "--vocabulary", "64")
    result = CliRunner().invoke(main, [*sizes, "--precision", precision, "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| checking target.onnx" in result.stdout
    record = json.loads(result.stdout.splitlines()[-1])
    small, large = record["exports"]
    assert (small["layers"], large["layers"]) == (1, 5)
    more = large["parameters"] - small["parameters"]
    assert more > 60e6
    assert large["engine_bytes"] - small["engine_bytes"] > more
    (step,) = (name for name in small["steps"] if name.startswith("building target.onnx"))
    grown = {
        kind: large["steps"][step][kind] - small["steps"][step][kind] for kind in ("own", "total")
    }
    # A whole model in memory would add at least 60 MiB in int8, or 120 in the source's bfloat16.
    assert max(grown.values()) < 45 * MIB, grown
    assert not list(tmp_path.iterdir())
