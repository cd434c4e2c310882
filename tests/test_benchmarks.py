"""The benchmark commands on a tiny pair: what they print, and that they notice a wrong token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import accepted_length
import calibration
import host
import identity
import numpy as np
import precision
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import throughput
from click.testing import CliRunner, Result
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.bench import speed as bench
from dspark_batch.bench import workload
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.engine.costs import read_costs
from dspark_batch.engine.engine import Engine, open_engine
from dspark_batch.errors import UsageError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 12
SOURCES = ("even", "odd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with `target`, `engines/tiny` and 20 prompts of 3 to 22 tokens."""
    folder = tmp_path_factory.mktemp("benchmarks")
    target = write_target(folder / "target", target_config("llama"))
    draft = write_draft(folder / "draft", draft_config())
    export_pair(folder, target, draft)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in range(3, 23)]
    sources = [SOURCES[row % 2] for row in range(len(prompts))]
    # Temperatures are to be ignored: the benchmarks are greedy.
    columns = {"prompt_token_ids": prompts, "source": sources, "temperature": [1.0] * len(prompts)}
    pq.write_table(pa.table(columns), folder / "prompts.parquet", row_group_size=7)
    return folder


def invoke(command: Any, folder: Path, *arguments: str) -> Result:
    paths = ["--engine", str(folder / "engines/tiny"), "--prompts", str(folder / "prompts.parquet")]
    return CliRunner().invoke(command, [*paths, "--new-tokens", str(NEW_TOKENS), *arguments])


def last_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def corrupt(monkeypatch: pytest.MonkeyPatch, module: Any, mode: str) -> None:
    """From here on, `mode` gets the last token of its first row wrong."""

    def decode_all(engine: Engine, prompts: Any, spec: str) -> workload.Decoded:
        run = workload.decode_all(engine, prompts, spec)
        if spec != mode:
            return run
        first, *others = run.completions
        wrong = (*first.token_ids[:-1], (first.token_ids[-1] + 1) % VOCAB)
        return replace(run, completions=(replace(first, token_ids=wrong), *others))

    monkeypatch.setattr(module, "decode_all", decode_all)


def test_throughput_compares_all_modes_at_every_concurrency(folder: Path) -> None:
    result = invoke(throughput.main, folder, "--rows", "5", "--rows", "1", "--repeat", "2")
    assert result.exit_code == 0, result.output
    record = last_json(result)
    assert [part["rows"] for part in record["concurrencies"]] == [1, 5]
    assert [part["num_prompts"] for part in record["concurrencies"]] == [16, 20]
    for part in record["concurrencies"]:
        assert list(part["modes"]) == ["off", "on", "auto"]
        plain = part["modes"]["off"]
        assert plain["accepted_length"] == 1.0
        assert plain["num_drafted_rounds"] == 0
        assert part["modes"]["on"]["num_drafted_rounds"] == part["modes"]["on"]["num_rounds"]
        for values in part["modes"].values():
            assert values["num_differing_rows"] == 0
            assert values["num_new_tokens"] == plain["num_new_tokens"] > 0
            speed = values["tokens_per_second"]
            seconds = values["seconds"]
            assert speed["all"] == [values["num_new_tokens"] / s for s in seconds]
            assert len(seconds) == 2
            assert speed["median"] == pytest.approx(sum(speed["all"]) / 2)
            plainly = plain["tokens_per_second"]
            ratios = [a / b for a, b in zip(speed["all"], plainly["all"], strict=True)]
            assert values["ratio_to_plain"]["median"] == pytest.approx(sum(ratios) / 2)
            best = speed["best"] / plainly["best"]
            assert values["ratio_to_plain"]["best"] == pytest.approx(best)
            assert sum(values["time_shares"].values()) == pytest.approx(1.0)
            assert all(share >= 0 for share in values["time_shares"].values())
            assert sorted(values["accepted_length_by_source"]) == sorted(SOURCES)


def test_throughput_says_what_it_ran_on(folder: Path) -> None:
    result = invoke(throughput.main, folder, "--rows", "2", "--repeat", "1", "--limit", "4")
    record = last_json(result)
    engine = open_engine(folder / "engines/tiny")
    engine.close()
    assert record["hardware"] == engine.hardware_key
    assert record["engine"]["fingerprint"] == engine.fingerprint
    assert record["command"].startswith("python benchmarks/throughput.py --engine ")
    assert record["command"].endswith("--limit 4")
    assert {"python", "numpy", "onnxruntime"} <= set(record["versions"])
    assert record["num_file_prompts"] == 4
    assert record["concurrencies"][0]["num_prompts"] == 4


def test_throughput_prints_the_engine_s_costs_or_fresh_ones(folder: Path) -> None:
    engine_folder = folder / "engines/tiny"
    arguments = ("--rows", "2", "--repeat", "1", "--limit", "2")
    used = last_json(invoke(throughput.main, folder, *arguments))
    kept = read_costs(engine_folder, used["hardware"])
    assert kept is not None
    assert {key: used["costs"][key] for key in kept.to_json()} == kept.to_json()
    fresh = invoke(throughput.main, folder, *arguments, "--measure-costs")
    costs = last_json(fresh)["costs"]
    assert costs["rows"] == [1, 2]
    assert costs["draft_seconds"] != kept.to_json()["draft_seconds"][:2]
    assert read_costs(engine_folder, used["hardware"]) == kept
    shown = f"{costs['draft_seconds'][0] * 1e3:.1f} | {costs['verify_seconds'][0][0] * 1e3:.1f}"
    assert any(shown in " ".join(line.split()) for line in fresh.stdout.splitlines())


def test_throughput_counts_rows_that_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, bench, "auto")
    result = invoke(throughput.main, folder, "--rows", "2", "--repeat", "2", "--limit", "6")
    modes = last_json(result)["concurrencies"][0]["modes"]
    assert [modes[mode]["num_differing_rows"] for mode in workload.MODES] == [0, 0, 1]
    assert "Greedy texts differ: 6 rows; differ from plain: off 0, on 0, auto 1" in result.stdout


def test_accepted_length_is_told_by_source_and_engine(folder: Path, tmp_path: Path) -> None:
    lookup = export_pair(tmp_path, folder / "target", 'drafter = "ngram"\nblock_size = 3')
    result = invoke(
        accepted_length.main, folder, "--engine", str(lookup), "--rows", "4", "--speed", "1"
    )
    assert result.exit_code == 0, result.output
    record = last_json(result)
    assert list(record["engines"]) == [str(folder / "engines/tiny"), str(lookup)]
    trained, ngram = record["engines"].values()
    assert (trained["drafter"], ngram["drafter"]) == ("dspark", "ngram")
    for engine in (trained, ngram):
        assert engine["num_differing_rows"] == 0
        sources = engine["sources"]
        assert [(name, found["num_rows"]) for name, found in sources.items()] == [
            ("even", 10),
            ("odd", 10),
            ("all", 20),
        ]
        for found in sources.values():
            shares = found["acceptance_by_position"]
            assert len(shares) == engine["block_size"]
            assert found["accepted_length"] == pytest.approx(1 + sum(shares))
        rounds = [sources[name]["num_rounds"] for name in ("even", "odd", "all")]
        assert rounds[0] + rounds[1] == rounds[2]
        assert list(engine["speed"]) == ["even", "odd", "all"]
        assert all(set(speeds) == set(workload.MODES) for speeds in engine["speed"].values())
    assert (
        trained["sources"]["all"]["num_drafted_rounds"] == trained["sources"]["all"]["num_rounds"]
    )
    assert 0 < ngram["sources"]["all"]["num_drafted_rounds"] < ngram["sources"]["all"]["num_rounds"]
    assert ngram["sources"]["all"]["accepted_length"] > 1
    # The table says the same.
    taus = [engine["sources"]["odd"]["accepted_length"] for engine in (trained, ngram)]
    assert f"odd | 10 | {taus[0]:.2f} | {taus[1]:.2f}" in " ".join(result.stdout.split())
    assert "are identical" in result.stdout


def test_accepted_length_of_sampled_rows(folder: Path) -> None:
    arguments = ("--rows", "4", "--temperature", "1.5", "--new-tokens", "16")
    result = invoke(accepted_length.main, folder, *arguments)
    found = last_json(result)["engines"]["tiny"]["sources"]["all"]
    again = invoke(accepted_length.main, folder, *arguments)
    assert last_json(again)["engines"]["tiny"]["sources"]["all"] == found  # seeds are the rows'
    assert "temperature 1.5, at most 16 new tokens" in result.stdout
    assert "identical" not in result.stdout
    greedy = last_json(invoke(accepted_length.main, folder, *arguments[:2], *arguments[4:]))
    assert greedy["engines"]["tiny"]["sources"]["all"] != found
    refused = invoke(accepted_length.main, folder, *arguments, "--speed", "1")
    assert refused.exit_code == UsageError.exit_code
    assert "no --temperature" in refused.output


def test_accepted_length_counts_rows_that_differ(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = export_pair(tmp_path, folder / "target", 'drafter = "ngram"')
    decoded = []

    def decode_all(engine: Engine, prompts: Any, spec: str) -> workload.Decoded:
        run = workload.decode_all(engine, prompts, spec)
        decoded.append(len(prompts))
        if len(decoded) == 1:
            return run
        first, *others = run.completions
        return replace(run, completions=(replace(first, token_ids=(1, 2)), *others))

    monkeypatch.setattr(accepted_length, "decode_all", decode_all)
    arguments = ["--engine", str(lookup), "--per-source", "3"]
    result = invoke(accepted_length.main, folder, *arguments)
    assert decoded == [6, 6]
    found = [e["num_differing_rows"] for e in last_json(result)["engines"].values()]
    assert found == [0, 1]
    assert f"rows unlike the first engine of the target: {lookup} 1" in result.stdout


def test_calibration_is_tabulated_and_drawn_for_greedy_and_sampled_rows(
    folder: Path, tmp_path: Path
) -> None:
    engine, figure = folder / "engines/tiny", tmp_path / "reliability.png"
    arguments = [str(engine), "--prompts", str(folder / "prompts.parquet"), "--new-tokens", "40"]
    result = CliRunner().invoke(calibration.main, [*arguments, "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    kinds = last_json(result)["kinds"]
    with closing(open_engine(engine)) as opened:
        draft = opened.manifest.draft
    assert draft is not None
    fitted = {"greedy": draft.confidence_temperatures, "sampled": draft.sampled_temperatures}
    for kind, temperatures in fitted.items():
        found = kinds[kind]
        assert found["temperatures"] == list(temperatures)
        assert found["num_rounds"] > 300
        for name in ("accepted", "error_before", "error_after", "brier_before", "brier_after"):
            assert len(found[name]) == 4
            assert all(0 <= value <= 1 for value in found[name])
        shown = f"{found['error_before'][0]:.1%} | {found['error_after'][0]:.1%}"
        assert any(shown in " ".join(line.split()) for line in result.stdout.splitlines())
    assert kinds["greedy"]["num_rounds"] != kinds["sampled"]["num_rounds"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_identity_finds_no_difference_and_agrees_with_transformers(folder: Path) -> None:
    pytest.importorskip("transformers")
    result = invoke(
        identity.main, folder, "--rows", "4", "--transformers", str(folder / "target"), "5"
    )
    assert result.exit_code == 0, result.output
    record = last_json(result)
    found = record["comparisons"]
    assert list(found) == ["on = off", "auto = off", "off = transformers"]
    assert [values["num_rows"] for values in found.values()] == [20, 20, 5]
    assert all(values["num_differing"] == 0 for values in found.values())
    assert found["on = off"]["num_verified_tokens"] > 0
    assert 20 < record["num_new_tokens"] <= 20 * NEW_TOKENS


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_identity_fails_on_a_wrong_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    corrupt(monkeypatch, identity, mode)
    result = invoke(identity.main, folder, "--rows", "4", "--limit", "5")
    assert result.exit_code == 1
    record = last_json(result)
    found = record["comparisons"][f"{mode} = off"]
    (difference,) = found["differences"]
    assert difference["gap"] == found["max_gap"] > record["max_gap"]
    assert found["num_failed"] == record["num_failed"] == 1
    large = invoke(identity.main, folder, "--rows", "4", "--limit", "5", "--max-gap", "1000")
    assert large.exit_code == 0
    assert last_json(large)["comparisons"][f"{mode} = off"]["num_differing"] == 1


def test_identity_fails_where_transformers_says_otherwise(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    other = write_target(tmp_path / "other", target_config("llama"), seed=9)
    result = invoke(identity.main, folder, "--limit", "3", "--transformers", str(other), "3")
    assert result.exit_code == 1
    found = last_json(result)["comparisons"]["off = transformers"]
    assert found["num_failed"] == 3
    assert all(difference["gap"] > 1e-3 for difference in found["differences"])


def test_a_gap_is_the_worse_token_s_distance_from_the_best_logit() -> None:
    prompts = [Prompt(row, (7, 8), SamplingParams()) for row in (3, 4, 5, 6)]
    expected = [(1, 2, 3), (1, 2, 3), (1, 2), (0,)]
    found = [(1, 2, 3), (1, 0, 3), (1, 2, 9), (2,)]
    asked = []

    def last_logits(token_ids: Any) -> Any:
        asked.append(list(token_ids))
        return np.array([4.0, 5.0, 4.5], np.float32)

    differences = identity.compare(prompts, expected, found, last_logits=last_logits)
    assert asked == [[7, 8, 1], [7, 8]]
    assert [(d.row, d.position, d.tokens, d.gap) for d in differences] == [
        (4, 1, (2, 0), 1.0),
        (5, 2, (None, 9), float("inf")),
        (6, 0, (0, 2), 1.0),
    ]


def test_an_engine_of_another_precision_is_not_compared_with_transformers(
    folder: Path, tmp_path: Path
) -> None:
    engine = export_pair(tmp_path, folder / "target", folder / "draft", precision="int8")
    arguments = ["--engine", str(engine), "--prompts", str(folder / "prompts.parquet")]
    reference = ["--transformers", str(folder / "target"), "1"]
    result = CliRunner().invoke(identity.main, [*arguments, *reference])
    assert result.exit_code == 2
    assert "int8" in result.stderr


def test_an_engine_without_a_draft_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = export_pair(tmp_path, folder / "target", None)
    for command in (throughput.main, identity.main, accepted_length.main):
        arguments = ["--engine", str(engine), "--prompts", str(folder / "prompts.parquet")]
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2
        assert "no draft" in result.stderr


def test_a_limited_workload_spreads_over_the_file(folder: Path) -> None:
    engine = open_engine(folder / "engines/tiny")
    path = folder / "prompts.parquet"
    found = workload.read_workload(path, engine, new_tokens=80, limit=5)
    # Rows 0, 4, 8, 12, 16 have 3, 7, 11, 15, 19 tokens; the engine holds 96.
    assert [prompt.row for prompt in found.prompts] == [0, 4, 8, 12]
    assert found.num_rejected == 1
    assert all(prompt.params == SamplingParams(max_new_tokens=80) for prompt in found.prompts)
    again = found.resized(6)
    lengths = [len(prompt.token_ids) for prompt in again.prompts]
    assert lengths == [3, 3, 7, 7, 11, 15]
    assert [prompt.row for prompt in again.prompts] == list(range(6))
    assert [len(p.token_ids) for p in found.resized(2).prompts] == [3, 11]
    whole = workload.read_workload(path, engine, new_tokens=NEW_TOKENS, limit=None)
    part = whole.of_each_source(2)
    assert [prompt.row for prompt in part.prompts] == [0, 1, 10, 11]
    assert part.sources == ("even", "odd", "even", "odd")
    assert whole.of_each_source(None) == whole
    engine.close()


def test_precision_compares_an_engine_with_its_fp32_twin(folder: Path, tmp_path: Path) -> None:
    candidate = export_pair(tmp_path, folder / "target", folder / "draft", precision="int8")
    prompts = ["--prompts", str(folder / "prompts.parquet"), "--new-tokens", "8", "--limit", "6"]
    engines = [str(folder / "engines/tiny"), str(candidate)]
    result = CliRunner().invoke(precision.main, [*engines, *prompts])
    assert result.exit_code == 0, result.output
    fp32, int8 = last_json(result)["engines"]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8")
    assert (fp32["agreement"], fp32["kl"]) == (1.0, 0.0)
    assert 0.5 < int8["agreement"] <= 1.0
    assert 0 < int8["kl"] < 0.1
    assert int8["tokens_per_second"] > 0
    assert fp32["num_tokens"] == int8["num_tokens"] > 6
    assert (fp32["num_differing"], fp32["gaps"], fp32["largest_difference"]) == (0, [], 0.0)
    assert int8["num_rows"] == fp32["num_rows"] > 1
    assert len(int8["gaps"]) == int8["num_differing"] <= int8["num_rows"]
    assert all(0 < gap <= 2 * int8["largest_difference"] for gap in int8["gaps"])


def test_the_host_s_time_is_that_between_two_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock an answer takes a second, and each look at it a millisecond."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    def slow(answer: Any) -> Any:
        def answered(*arguments: Any) -> Any:
            nonlocal now
            now += 1.0
            return answer(*arguments)

        return answered

    monkeypatch.setattr(host.time, "perf_counter", clock)
    for name in ("DraftBlock", "VerifyResult"):
        monkeypatch.setattr(host, name, slow(getattr(host, name)))
    arguments = ["--rows", "3", "--rounds", "4", "--prompt-tokens", "40"]
    result = CliRunner().invoke(host.main, arguments)
    assert result.exit_code == 0, result.output
    assert "| rows | plain | drafted | with lookup |" in result.stdout
    found = last_json(result)
    assert found["command"].endswith("--rows 3 --rounds 4 --prompt-tokens 40")
    assert found["rows"] == [3]
    plain, drafted, looked_up = (found["host_seconds"][kind][0] for kind in host.KINDS)
    assert 0 < plain < drafted < 0.1
    assert 0 < looked_up < 0.1


def test_the_verification_benchmark_runs_without_a_gpu() -> None:
    """In a process of its own, since Triton is told at import that it interprets."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    sizes = ["--rows", "1", "--vocab", "60", "--drafts", "1", "--repeat", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/verification.py", *sizes],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].split(" | ")[:3] == ["| setting     ", "vocabulary", "rows"]
    record = json.loads(lines[-1])
    assert record["device"] == "interpreter"
    assert [r["setting"] for r in record["results"]] == [
        "greedy",
        "temperature",
        "top-k, top-p",
        "top-p",
    ]
    for result in record["results"]:
        assert result["ms"] > result["floor_ms"] > 0
        assert result["accepted"] in (0, 1)
