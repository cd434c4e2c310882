"""`benchmarks/gpu.py` on the CPU with a tiny pair: what it keeps, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import gpu
import gpu_report
import gpu_steps
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

import dspark_batch

pytestmark = pytest.mark.slow

SCRIPT = Path(gpu.__file__)
ROOT = Path(dspark_batch.__file__).parents[1]
SMALL = ["--rows", "1", "--rows", "2", "--new-tokens", "6", "--repeat", "1", "--bandwidth", "10"]
MODES = ("off", "on", "auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an fp32 pair, prompts of two sources, a reference and GPU tests."""
    folder = tmp_path_factory.mktemp("gpu")
    target = write_target(folder / "target", target_config("llama"))
    export_pair(folder, target, write_draft(folder / "draft", draft_config()))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in range(3, 15)]
    columns = {"prompt_token_ids": prompts, "source": ["gsm8k", "mbpp"] * 6}
    pq.write_table(pa.table(columns), folder / "prompts.parquet")
    tests = folder / "tests"
    tests.mkdir()
    (tests / "test_card.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_works(): pass\n"
        "def test_is_not_of_a_gpu(): assert False\n"
    )
    (tests / "test_other.py").write_text("import a_library_that_is_not_here\n")
    written = ["--write-reference", str(folder / "reference.json"), "--texts", "3"]
    code, said = finish(start(folder, *written, "--text-tokens", "8"))
    assert code == 0, said
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = ["--engine", str(folder / "engines/tiny"), "--prompts", str(folder / "prompts.parquet")]
    paths += ["--set", "gsm8k", "--tests", str(folder / "tests")]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *paths, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all that was said."""
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


def perform(folder: Path, output: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, records and page of a run."""
    code, said = finish(start(folder, "--output", str(output), *SMALL, *arguments))
    assert (output / "gpu.md").exists(), said
    return code, records_of(output), (output / "gpu.md").read_text()


def records_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "gpu.jsonl").read_text().splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def test_all_that_was_asked_is_kept(folder: Path, tmp_path: Path) -> None:
    reference = ["--reference", str(folder / "reference.json")]
    code, records, page = perform(folder, tmp_path / "out", *reference)
    assert code == 0, page
    assert [record["kind"] for record in records][:2] == ["begin", "facts"]
    (facts,) = of_kind(records, "facts")
    assert facts["bandwidth"] == 10e9
    assert facts["runtime"] == "onnxruntime"
    assert "onnxruntime" in facts["versions"]
    # Neither the test without the mark nor the file that cannot be imported counts.
    (tests,) = of_kind(records, "tests")
    assert (tests["counts"], tests["failing"], tests["code"]) == ({"passed": 1}, [], 0)
    texts = of_kind(records, "text")
    assert [text["spec"] for text in texts] == ["off", "on"]
    for text in texts:
        assert (text["num_rows"], text["num_rounding"], text["num_faults"]) == (3, 0, 0)
        assert text["num_tokens"] > 3
    runs = {(run["rows"], run["spec"]): run for run in of_kind(records, "run")}
    cells = of_kind(records, "cell")
    assert [(c["rows"], c["spec"]) for c in cells] == [(n, mode) for n in (1, 2) for mode in MODES]
    weights, per_token = gpu_steps.target_reads(folder / "engines/tiny") or (0, 0)
    for cell in cells:
        run, plain = runs[cell["rows"], cell["spec"]], runs[cell["rows"], "off"]
        assert run["num_prompts"] >= max(1, cell["rows"])
        assert run["num_new_tokens"] == plain["num_new_tokens"] > 0
        assert cell["tokens_per_second"] == run["num_new_tokens"] / run["seconds"]
        ratio = run["tokens_per_second"] / plain["tokens_per_second"]
        assert cell["ratio_to_plain"] == pytest.approx(ratio)
        floor = run["target_bytes"] / 10e9
        assert cell["share_of_floor"] == pytest.approx(floor / run["seconds"])
        cached = run["target_bytes"] - run["num_rounds"] * weights
        assert 0 < cached < per_token * 96 * run["num_prompts"] * 6
        assert cell["round_ms"]["verify"] == 1e3 * run["verify_seconds"] / run["num_rounds"]
        assert cell["ratio_to_vllm"] is None  # another model
        line = f"| {cell['rows']} | {cell['num_prompts']} | {cell['spec']} | "
        line += f"{cell['tokens_per_second']:,.1f} | {ratio:.2f} | {cell['accepted_length']:.2f}"
        assert line in " ".join(page.split())
    assert runs[1, "off"]["num_drafted_rounds"] == 0
    assert runs[1, "on"]["num_drafted_rounds"] == runs[1, "on"]["num_rounds"] > 0
    assert records[-1]["kind"] == "end"
    assert records[-1]["exit_code"] == 0
    assert "Missing" not in page
    assert "3 of 3 rows equal" in page


def test_a_wrong_token_is_a_fault_and_a_near_one_rounding(folder: Path, tmp_path: Path) -> None:
    reference = json.loads((folder / "reference.json").read_text())
    row = reference["rows"][1]
    assert row["best"][0][0] == [row["tokens"][0], 0.0]
    other, gap = row["best"][0][1]
    row["tokens"][0] = other
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(reference))
    settings = gpu_steps.Settings(
        folder / "engines/tiny", folder / "prompts.parquet", None, (1,), 6, 1, 3, 8, gap / 2,
        wrong, None,
    )  # fmt: skip
    for text in gpu_steps.text(settings, progress=lambda line: None):
        assert (text["num_faults"], text["num_rounding"]) == (1, 0)
        (difference,) = text["differences"]
        assert (difference["row"], difference["position"]) == (1, 0)
        assert difference["gap"] == pytest.approx(gap)
    arguments = ["--reference", str(wrong), "--max-gap", str(gap / 2), "--rows", "1"]
    code, records, page = perform(folder, tmp_path / "out", *arguments)
    assert code == 1
    assert [text["num_faults"] for text in of_kind(records, "text")] == [1, 1]
    assert "1 by a fault" in page
    assert len(of_kind(records, "cell")) == 6  # the rest is measured all the same
    near = gpu_steps.text(gpu_steps.replace(settings, max_gap=2 * gap), progress=lambda line: None)
    assert [(t["num_faults"], t["num_rounding"]) for t in near] == [(0, 1), (0, 1)]


def test_an_engine_can_be_the_reference_and_a_wrong_one_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    settings = gpu_steps.Settings(
        folder / "engines/tiny", folder / "prompts.parquet", "mbpp", (1,), 6, 1, 2, 8, 0.2,
        folder / "engines/tiny", None,
    )  # fmt: skip
    found = list(gpu_steps.text(settings, progress=lambda line: None))
    assert [(text["num_rows"], text["differences"]) for text in found] == [(2, []), (2, [])]
    changed = json.loads((folder / "reference.json").read_text()) | {"target": "another"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    with pytest.raises(gpu_steps.UsageError, match="other weights"):
        list(gpu_steps.text(gpu_steps.replace(settings, reference=other), progress=print))
    with pytest.raises(gpu_steps.UsageError, match="there are gsm8k, mbpp"):
        list(gpu_steps.text(gpu_steps.replace(settings, source="gsm"), progress=print))


def test_a_token_that_no_gap_is_known_of_is_a_fault() -> None:
    expected = {"tokens": [4, 5], "best": [[[4, 0.0], [7, 0.1]], [[5, 0.0], [4, 0.3]]]}
    gaps = [gpu_steps._difference(0, expected, ours) for ours in ([7, 5], [4, 9], [4], [4, 5])]
    assert [found and found["gap"] for found in gaps] == [0.1, float("inf"), float("inf"), None]


def test_without_time_it_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    code, records, page = perform(folder, tmp_path / "out", "--minutes", "0")
    assert code == 3
    assert [record["step"] for record in of_kind(records, "cut")] == [
        "facts", "tests", "costs", "speed 1", "speed 2",
    ]  # fmt: skip
    assert "speed 2: no time was left" in page
    code, said = finish(start(folder, "--output", str(tmp_path / "out"), "--minutes", "0"))
    assert (code, "has results already" in said) == (2, True)


def test_sigterm_ends_a_step_that_hangs_and_keeps_what_there_is(
    folder: Path, tmp_path: Path
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_card.py").write_text(
        "import pathlib, pytest, time\n@pytest.mark.gpu\ndef test_passes(): pass\n"
        f"@pytest.mark.gpu\ndef test_hangs():\n    pathlib.Path({str(tmp_path)!r}, 'on').touch()\n"
        "    time.sleep(600)\n"
    )
    output = tmp_path / "out"
    process = start(folder, "--output", str(output), *SMALL, "--tests", str(tests))
    end = time.monotonic() + 60
    while not (tmp_path / "on").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 3
    records = records_of(output)
    assert len(of_kind(records, "facts")) == 1
    assert of_kind(records, "tests")[0]["counts"] == {"passed": 1}
    cut = of_kind(records, "cut")
    assert [record["step"] for record in cut] == ["tests", "costs", "speed 1", "speed 2"]
    assert {record["problem"] for record in cut} == {"SIGTERM came"}
    assert "1 passed" in (output / "gpu.md").read_text()


def test_a_failing_test_or_a_broken_step_fails(folder: Path, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    mark = "import pytest\n@pytest.mark.gpu\n"
    (tests / "test_card.py").write_text(mark + "def test_breaks(): assert False\n")
    arguments = ["--tests", str(tests), "--set", "nothing"]
    code, records, page = perform(folder, tmp_path / "out", *arguments)
    assert code == 1
    (found,) = of_kind(records, "tests")
    assert found["counts"] == {"failed": 1}
    assert [name.rpartition("::")[2] for name in found["failing"]] == ["test_breaks"]
    assert [record["step"] for record in of_kind(records, "failed")] == ["speed 1", "speed 2"]
    assert "no prompt has the source 'nothing'" in page


def test_wheels_are_installed_and_found(folder: Path, tmp_path: Path) -> None:
    """A made-up version of a package shows up in the facts, so the steps found the wheel."""
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "cuda_bindings-99.0.dist-info"
    meta = "Metadata-Version: 2.1\nName: cuda-bindings\nVersion: 99.0\n"
    with zipfile.ZipFile(wheels / "cuda_bindings-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", meta)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "scratch").mkdir()
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--rows", "1", "--new-tokens", "2", "--repeat", "1"]
    scratch = str(tmp_path / "scratch")
    code, said = finish(start(folder, *arguments, "--wheels", str(wheels), TMPDIR=scratch))
    assert code == 0, said
    (facts,) = of_kind(records_of(output), "facts")
    assert facts["versions"]["cuda-bindings"] == "99.0"
    assert not list((tmp_path / "scratch").glob("dspark-wheels-*"))
    empty = tmp_path / "empty"
    empty.mkdir()
    code, said = finish(start(folder, "--output", str(tmp_path / "no"), "--wheels", str(empty)))
    assert (code, "there is no wheel" in said) == (1, True)


def test_a_card_is_found_by_its_whole_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L40S": "l40s",
        "NVIDIA L40": None,
    }
    assert {name: gpu_steps.catalogue_key(name) for name in names} == names


def test_ratios_are_of_one_turn_and_vllm_s_of_its_model() -> None:
    run = {"kind": "run", "rows": 1, "num_prompts": 1, "accepted_length": 1.0, "num_rounds": 10}
    run |= {f"{phase}_seconds": 0.1 for phase in ("draft", "verify", "host", "prefill")}
    run |= {"seconds": 2.0, "target_bytes": None}
    speeds = [("off", 0, 100.0), ("on", 0, 150.0), ("on", 1, 100.0), ("off", 1, 50.0)]
    records = [{"kind": "facts", "target": "SmolLM2-135M-Instruct", "bandwidth": None}]
    records += [run | {"spec": s, "turn": t, "tokens_per_second": v} for s, t, v in speeds]
    plain, drafted = gpu_report.cells(records)
    assert (plain["ratio_to_plain"], drafted["ratio_to_plain"]) == (1.0, 1.75)
    assert plain["ratio_to_vllm"] == 75 / 28_391
    assert drafted["ratio_to_vllm"] == 125 / 45_540
    assert drafted["share_of_floor"] is None
    # Cut before a turn's plain run: the speed stays, without a ratio.
    (alone,) = gpu_report.cells([records[0], records[2]])
    assert (alone["tokens_per_second"], alone["ratio_to_plain"]) == (150.0, None)
