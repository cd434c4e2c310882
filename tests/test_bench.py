"""The command `bench`: measured here, simulated here and elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from agreeing import write_agreeing_pair
from click.testing import CliRunner, Result
from tiny import VOCAB, export_pair

from dspark_batch.bench.forecast.rounds import read_rounds
from dspark_batch.cli import main

pytestmark = pytest.mark.slow

FIGURES = ["frontier.png", "queries.png", "throughput.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with `engines/tiny` and 6 prompts."""
    folder = tmp_path_factory.mktemp("bench")
    export_pair(folder, *write_agreeing_pair(folder, stops=True))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in range(3, 9)]
    # Temperatures are to be ignored: benches are greedy.
    columns = {"prompt_token_ids": prompts, "temperature": [1.0] * len(prompts)}
    pq.write_table(pa.table(columns), folder / "prompts.parquet")
    return folder


def bench(folder: Path, *arguments: object) -> Result:
    engine = ["--engine", str(folder / "engines/tiny"), "--progress", "none"]
    return CliRunner().invoke(main, ["bench", *engine, *map(str, arguments)])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def simulate(folder: Path, output: Path, *arguments: object) -> Result:
    prompts = folder / "prompts.parquet"
    return bench(folder, prompts, "--simulate", "--new-tokens", 12, "-o", output, *arguments)


def test_bench_measures_every_mode(folder: Path) -> None:
    arguments = ("--rows", 2, "--rows", 1, "--new-tokens", 6, "--repeat", 1, "--limit", 3)
    result = bench(folder, folder / "prompts.parquet", *arguments)
    record = last_json(result)
    assert "simulation" not in record
    assert [part["rows"] for part in record["concurrencies"]] == [1, 2]
    for part in record["concurrencies"]:
        assert list(part["modes"]) == ["off", "on", "auto"]
        for mode in part["modes"].values():
            assert mode["num_differing_rows"] == 0
            assert mode["tokens_per_second"]["median"] > 0
    assert record["engine"]["name"] == "tiny"
    assert {"python", "dspark-batch", "onnxruntime"} <= set(record["versions"])
    assert "Greedy texts are identical: 6 rows" in result.stdout
    ratios = {
        part["rows"]: part["modes"]["auto"]["ratio_to_plain"]["median"]
        for part in record["concurrencies"]
    }
    least = record["least_ratio"]
    assert least["ratio"] == ratios[least["rows"]] == min(ratios.values())
    assert f"{least['ratio']:.3f} at the least, with {least['rows']} rows" in result.stdout
    # Rows get 3 to 6 new tokens: each a share of its own.
    assert 3 * 3 < record["concurrencies"][0]["modes"]["off"]["num_new_tokens"] < 3 * 6
    assert list(folder.iterdir()).count(folder / "prompts.simulation") == 0


def test_bench_simulates_this_machine(folder: Path, tmp_path: Path) -> None:
    result = simulate(folder, tmp_path)
    record = last_json(result)
    assert record["simulation"] is True
    assert record["roofline"] is None
    # The tiny engine was measured up to four rows.
    assert sorted({found["num_rows"] for found in record["results"]}) == [1, 2, 4]
    assert record["left_out_rows"] == [8, 16, 32, 64, 128, 256]
    plain, auto = (
        [found for found in record["results"] if found["strategy"] == name]
        for name in ("plain", "auto")
    )
    assert len(plain) == len(auto) == 3
    assert all(found["accepted_length"] == 1.0 for found in plain)
    assert result.stdout.startswith("SIMULATION, not a measurement")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *FIGURES[:2],
        "rounds.parquet",
        FIGURES[2],
    ]
    rounds = read_rounds(tmp_path / "rounds.parquet")
    assert record["rounds"]["num_rows"] == len(rounds.num_new_tokens) == 6
    assert rounds.num_new_tokens.max() == 12


def test_a_record_serves_other_machines_without_the_engine(folder: Path, tmp_path: Path) -> None:
    last_json(simulate(folder, tmp_path, "--rows", 1))
    runner, path = CliRunner(), tmp_path / "rounds.parquet"
    arguments = ["--engine", "nowhere", "--rounds", path, "--gpu", "l4", "--model", "qwen3-8b"]
    arguments += ["--dtype", "fp8", "--assume", "bandwidth_gbs=150", "--rows", 1, "--rows", 2]
    arguments += ["--floor", 5, "--progress", "none"]
    record = last_json(runner.invoke(main, ["bench", "--simulate", *map(str, arguments)]))
    assert record["machine"] == "NVIDIA L4, Qwen3-8B with DeepSpec's draft, fp8"
    assert record["roofline"]["bandwidth_gbs"] == 150.0
    assert record["roofline"]["block_size"] == record["rounds"]["block_size"] == 4
    assert record["floor"] == 5.0
    assert record["carried"]["auto"]["num_rows"] == 2.0
    assert (tmp_path / "frontier.png").exists()


def test_the_output_lies_beside_the_prompts(folder: Path) -> None:
    prompts = folder / "prompts.parquet"
    last_json(bench(folder, prompts, "--simulate", "--new-tokens", 4, "--limit", 2, "--rows", 1))
    assert (folder / "prompts.simulation" / "rounds.parquet").exists()
    result = bench(folder, folder, "--simulate")
    assert result.exit_code == 2
    assert "add -o FOLDER" in result.stderr


def test_without_matplotlib_there_is_a_table_and_a_hint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record = last_json(simulate(folder, tmp_path, "--rows", 1, "--limit", 1))
    assert record["results"]
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.parquet"]
    assert "pip install 'dspark-batch[plots]'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "PROMPTS is missing"),
        (("--simulate",), "give PROMPTS to record, or --rounds FILE"),
        (("p.parquet", "--simulate", "--rounds", "r.parquet"), "not both"),
        (("p.parquet", "--gpu", "h100"), "--gpu needs --simulate"),
        (("p.parquet", "--floor", "5"), "--floor needs --simulate"),
        (("p.parquet", "--simulate", "--measure-costs"), "--measure-costs does not go with"),
        (("p.parquet", "--simulate", "--gpu", "h100"), "add --model NAME"),
        (("p.parquet", "--simulate", "--model", "qwen3-4b"), "add --gpu NAME"),
        (("p.parquet", "--simulate", "--gpu", "x", "--model", "qwen3-4b"), "no GPU 'x'"),
        (
            ("p.parquet", "--simulate", "--gpu", "l4", "--model", "qwen3-4b", "--assume", "x=1"),
            "no assumption 'x'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = bench(folder, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_an_engine_without_a_draft_is_refused(folder: Path, tmp_path: Path) -> None:
    export_pair(tmp_path, folder / "target", None)
    for arguments in ((), ("--simulate",)):
        result = bench(tmp_path, folder / "prompts.parquet", *arguments)
        assert result.exit_code == 2
        assert "no draft" in result.stderr
