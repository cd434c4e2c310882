"""Engines of a TensorRT runtime, built by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake_trt import fake_gpus
from pydantic import ValidationError
from tiny import VOCAB, draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.engine.hardware import Gpus
from dspark_batch.engine.manifest import PlansInfo, describe_file, read_manifest
from dspark_batch.errors import EngineError
from dspark_batch.export import pipeline, trt_plans
from dspark_batch.export.recipe import EngineSection
from dspark_batch.export.trt_plans import DEFAULT_RTX_ARCHS, plan_files_info
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.builder import FLOAT16, GraphBuilder
from dspark_batch.models.plugin.trt_build import PlanReport, PlanRequest, build_plan
from dspark_batch.models.weights import open_weights

pytest.importorskip("tensorrt_rtx_libs")
pytest.importorskip("triton")

Reports = dict[str, PlanReport]
RTX = 'runtime = "tensorrt-rtx"\n'
# Draft tensors: γ = 4, two layers.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[int]]] = {
    "llama": (target_config("llama"), draft_config(), "fp16", [89, 120]),
    "qwen3": (
        target_config("qwen3", tie_word_embeddings=True),
        draft_config(markov_head_type="gated"),
        "bf16",
        [86],
    ),
    "gemma3": (
        target_config("gemma3_text", final_logit_softcapping=2.0),
        draft_config(markov_head_type="rnn"),
        "int8-weights",
        [120],
    ),
}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Reports of the plan files that the exports of a test build."""
    found: Reports = {}
    build = trt_plans.build_plan_files

    def recorded(*arguments: Any, **options: Any) -> Reports:
        found.update(build(*arguments, **options))
        return found

    monkeypatch.setattr(pipeline, "build_plan_files", recorded)
    return found


def export_tiny(folder: Path, family: str, **options: Any) -> Path:
    target, draft, precision, archs = PAIRS[family]
    sources = write_target(folder / "target", target), write_draft(folder / "draft", draft)
    archs_line = f"gpu_archs = {options.pop('gpu_archs', archs)}\n"
    return export_pair(folder, *sources, precision=precision, engine=RTX + archs_line, **options)


@pytest.mark.parametrize("family", PAIRS)
def test_a_pair_becomes_plan_files_with_tensorrts_own_layers(
    family: str, tmp_path: Path, reports: Reports
) -> None:
    told: list[str] = []
    folder = export_tiny(tmp_path, family, progress=told.append)
    manifest = read_manifest(folder)
    _, _, precision, archs = PAIRS[family]
    assert (manifest.runtime, manifest.precision) == ("tensorrt-rtx", precision)
    named = manifest.model_copy(update={"name": "model-tensorrt-rtx"})
    command = f"dspark-batch export model --runtime tensorrt-rtx --precision {precision} --force"
    assert named.export_command == command
    made = manifest.plans
    assert made is not None
    assert (made.library, made.gpu_archs) == ("tensorrt_rtx", tuple(archs))
    assert made.library_version == reports["target"].library_version
    # 96 tokens of a row, 96 of a chunk of a prompt, 4 drafts and their anchor.
    assert made.capacity == 96 + 96 + 5
    assert list(made.profiles) == ["decode", "prefill"]
    assert made.profiles["decode"].tokens == (1, 10, 20)
    assert made.profiles["prefill"].row_tokens == (1, 96, 96)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    names = {"target.onnx", "target.onnx.data", "target.plan"}
    names |= {"draft.onnx", "draft.onnx.data", "draft.plan"}
    assert set(manifest.files) == names == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for name in ("target.plan", "draft.plan"):
        assert manifest.files[name] == describe_file(folder / name)
    assert any(line.startswith("built draft.plan: ") and " s, " in line for line in told)
    # Calibrated without a GPU.
    assert manifest.draft is not None
    assert all(0 < share < 1 for share in manifest.draft.acceptance)
    assert len({*manifest.draft.acceptance, 0.5}) > 1
    for name, num_layers in (("target", tiny.LAYERS), ("draft", 2)):
        check_report(reports[name], num_layers, verifies=name == "target", precision=precision)


def check_report(report: PlanReport, num_layers: int, *, verifies: bool, precision: str) -> None:
    layers = report.layers
    assert layers["KV_CACHE_UPDATE"] == 2 * num_layers
    assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == num_layers
    # A draft rotates queries and keys separately: they belong to different tokens.
    assert layers["ROTARY_EMBEDDING"] == num_layers if verifies else 2 * num_layers
    assert layers.get("PLUGIN_V3", 0) == int(verifies)
    half = "BF16" if precision == "bf16" else "HALF"
    for name in ("past_key_0", "past_value_1"):
        assert report.inputs[name] == half
        assert report.outputs[name.replace("past", "present")] == half
    assert (
        report.inputs["draft_logits"] == "FLOAT" if verifies else report.inputs["context"] == half
    )
    wanted = {"context": half, "num_accepted": "INT64", "bonus": "INT64"}
    if not verifies:
        wanted = {"draft_tokens": "INT64", "confidence": "FLOAT", "draft_logits": "FLOAT"}
    found = {name: t for name, t in report.outputs.items() if not name.startswith("present_")}
    assert found == wanted


def test_an_engine_without_a_draft_is_told_that_its_proposals_are_certain(
    tmp_path: Path, reports: Reports
) -> None:
    target = write_target(tmp_path / "target", PAIRS["llama"][0])
    lines = 'drafter = "ngram"\nblock_size = 3'
    folder = export_pair(
        tmp_path, target, lines, precision="int4-weights", engine=RTX + "gpu_archs = [89]\n"
    )
    assert (folder / "target.plan").exists()
    assert reports["target"].inputs["certain"] == "INT64"
    assert "draft" not in reports
    draft = read_manifest(folder).draft
    assert draft is not None
    assert draft.lookup is not None


def test_an_engine_is_built_again_when_its_plan_files_are_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[PlansInfo] = []

    def build(folder: Path, made: PlansInfo, **_: Any) -> Reports:
        (folder / "target.plan").write_bytes(b"-")
        built.append(made)
        return {}

    monkeypatch.setattr(pipeline, "build_plan_files", build)
    target = write_target(tmp_path / "target", PAIRS["llama"][0])

    def export_again(*archs: int, precision: str = "fp16", **options: Any) -> None:
        options["engine"] = f"{RTX}gpu_archs = {list(archs)}\n" if archs else ""
        export_pair(tmp_path, target, None, precision=precision, **options)

    export_again(89)
    export_again(89)
    assert len(built) == 1
    export_again(89, 120)
    export_again(89, max_rows=2)
    assert [made.gpu_archs for made in built] == [(89,), (89, 120), (89,)]
    export_again(89, max_rows=2, precision="int8-weights")
    assert len(built) == 4
    export_again(max_rows=2, precision="fp32")
    assert len(built) == 4
    assert read_manifest(tmp_path / "engines" / "tiny").plans is None
    export_again(89, max_rows=2)
    monkeypatch.setattr(trt_plans, "version", lambda _: "9.9")
    export_again(89, max_rows=2)
    assert [made.library_version == "9.9" for made in built[-2:]] == [False, True]


def test_a_plan_file_is_about_as_large_as_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, weights = [], []
    for name, vocab in (("small", 64), ("large", 60_000)):
        monkeypatch.setattr(tiny, "VOCAB", vocab)
        monkeypatch.setattr(tiny, "HIDDEN", 128)
        source = write_target(tmp_path / name, target_config("llama", vocab_size=vocab))
        graph = write_graph(tmp_path / name, source)
        sizes.append(build_plan(request(graph)).num_bytes)
        weights.append(graph.with_suffix(".onnx.data").stat().st_size)
    assert weights[1] - weights[0] > 25e6
    assert sizes[1] - sizes[0] == pytest.approx(weights[1] - weights[0], rel=0.05)


@pytest.mark.parametrize("case", ["keys-as-values", "e2b"])
def test_a_gemma4_target_builds(case: str, tmp_path: Path) -> None:
    """Its layers have two shapes, and some read the keys of others."""
    gemma4 = pytest.importorskip("test_gemma4")
    gemma4.write_gemma4(tmp_path / "target", **gemma4.CASES[case])
    graph = write_graph(tmp_path, tmp_path / "target")
    report = build_plan(request(graph))
    with open_weights(tmp_path / "target") as weights:
        num_caches = len(decoder_spec(weights.config).cache_shapes)
    assert num_caches == (3 if case == "e2b" else 6)
    assert report.layers["KV_CACHE_UPDATE"] == 2 * num_caches
    assert report.layers["ATTENTION_OUTPUT"] == report.layers["ROTARY_EMBEDDING"] == 6
    assert report.layers["PLUGIN_V3"] == 1


def write_graph(folder: Path, source: Path) -> Path:
    with open_weights(source) as weights:
        builder = GraphBuilder("target", folder, FLOAT16)
        graph = DecoderGraph(
            builder, decoder_spec(weights.config), weights.tensor, precision="fp16"
        )
        graph.build(taps=[0], draft_vocab=np.arange(0, VOCAB, 2), max_tokens=64)
        return builder.save()


def request(graph: Path, **changes: Any) -> PlanRequest:
    profile: dict[str, tuple[int, int, int]] = {
        **{"R": (1, 2, 2), "S": (1, 3, 3), "T": (1, 6, 6), "N": (1, 6, 6)},
        **{"K": (0, 2, 2), "K1": (1, 3, 3), "G": (1, 2, 2), "G1": (3, 3, 3)},
    }
    values = {
        "library": "tensorrt_rtx",
        "graph": str(graph),
        "plan": str(graph.with_suffix(".plan")),
        "gpu_archs": [89],
        "constants": {"C": 32},
        "profiles": [profile | changes.pop("profile", {})],
        "verifies": True,
    }
    return PlanRequest(**values | changes)


def test_a_refusal_of_the_builder_says_what_it_is_and_leaves_no_plan_file(tmp_path: Path) -> None:
    graph = write_graph(tmp_path, write_target(tmp_path / "target", target_config("llama")))
    with pytest.raises(
        EngineError, match=r"target\.onnx: .* refuses sizes: .* tokens.* MIN<=OPT<=MAX"
    ):
        build_plan(request(graph, profile={"T": (9, 6, 6)}))
    with pytest.raises(EngineError, match=r"target\.onnx: tensorrt_rtx does not take the graph: "):
        build_plan(request(graph, constants={}))
    with pytest.raises(EngineError, match=r"the TensorRT .* cannot be imported|TensorRT cannot be"):
        build_plan(request(graph, library="tensorrt"))
    assert not list(tmp_path.glob("*.plan*"))


def test_a_builder_that_dies_is_an_error_and_leaves_no_plan_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text('#!/bin/sh\necho half > "$0.plan"\necho "last words" >&2\nkill -SEGV $$\n')
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    message = r"the builder of tensorrt_rtx died \(signal 11; its last line: last words\)"
    with pytest.raises(EngineError, match=message):
        build_plan(request(tmp_path / "python.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def section(**values: Any) -> EngineSection:
    return EngineSection.model_validate({"runtime": "tensorrt-rtx", **values})


def test_plan_files_whose_weights_may_stay_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PlanRequest] = []

    def build(wanted: PlanRequest) -> PlanReport:
        asked.append(wanted)
        return build_plan(wanted)

    monkeypatch.setattr(trt_plans, "build_plan", build)
    engine = RTX + "gpu_archs = [89]\nweight_streaming = true\n"
    target = write_target(tmp_path / "target", target_config("llama"))
    folder = export_pair(tmp_path, target, 'drafter = "none"', precision="fp16", engine=engine)
    made = read_manifest(folder).plans
    assert made is not None
    assert made.weight_streaming
    assert [wanted.weight_streaming for wanted in asked] == [True]
    with pytest.raises(ValidationError, match="weight_streaming is not for onnxruntime"):
        EngineSection.model_validate({"weight_streaming": True})


def archs(here: int | None, monkeypatch: pytest.MonkeyPatch, **values: Any) -> tuple[int, ...]:
    gpus = fake_gpus(here) if here else Gpus(problem="none")
    monkeypatch.setattr(trt_plans, "find_gpus", lambda: gpus)
    monkeypatch.setattr(trt_plans, "_library_version", lambda *_: "11.4")
    found = plan_files_info(section(**values), block_size=4)
    assert found is not None
    return found.gpu_archs


def test_which_gpus_a_plan_file_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert archs(None, monkeypatch) == DEFAULT_RTX_ARCHS
    assert archs(90, monkeypatch) == DEFAULT_RTX_ARCHS  # which TensorRT-RTX does not know
    assert archs(89, monkeypatch) == (89,)
    assert archs(89, monkeypatch, gpu_archs=[120, 75]) == (120, 75)
    with pytest.raises(
        EngineError, match=r"(?s)not on sm_90; .* 75, 86, 89, 120\n.*--runtime tensorrt,"
    ):
        archs(None, monkeypatch, gpu_archs=[90])
    with pytest.raises(EngineError, match=r"(?s)sm_75 has no bf16.*hint: .* --precision fp16"):
        archs(None, monkeypatch, gpu_archs=[75], precision="bf16")
    assert archs(90, monkeypatch, runtime="tensorrt") == (90,)
    assert archs(90, monkeypatch, runtime="tensorrt", gpu_archs=[90]) == (90,)
    with pytest.raises(
        EngineError, match=r"for the GPU of this machine, sm_90, not for --gpu-arch 89"
    ):
        archs(90, monkeypatch, runtime="tensorrt", gpu_archs=[89])
    with pytest.raises(EngineError, match=r"(?s)this machine has no GPU.*--runtime tensorrt-rtx"):
        archs(None, monkeypatch, runtime="tensorrt")


def test_a_card_that_tensorrt_rtx_never_runs_on_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are there, and no library."""
    monkeypatch.setattr(trt_plans, "packages_distributions", dict)
    recipe = tmp_path / "export" / "tiny.toml"
    recipe.parent.mkdir()
    recipe.write_text(f'[target]\nweights = "nowhere"\n[draft]\ndrafter = "none"\n[engine]\n{RTX}')
    for arch in (80, 90, 100):
        with pytest.raises(EngineError, match=rf"RTX cards only, and not on sm_{arch}") as raised:
            pipeline.export(recipe, output=tmp_path / "engine", gpu_archs=[arch])
        assert "--runtime tensorrt," in str(raised.value.hint)
        assert "--runtime onnxruntime-cuda" in str(raised.value.hint)


def test_a_machine_that_will_not_run_the_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for here, wanted in ((None, ()), (89, ()), (90, [89]), (90, ())):
        gpus = fake_gpus(here) if here else Gpus(problem="none")
        monkeypatch.setattr(trt_plans, "find_gpus", lambda found=gpus: found)
        trt_plans.check_gpus(section(gpu_archs=wanted), progress=said.append)
    assert [line.split(" and ")[0] for line in said] == [
        "this engine is for sm_89",
        "this engine is for sm_86, sm_89, sm_120",
    ]
    assert all("RTX cards only, and Fake is sm_90; a data-centre card" in line for line in said)
    trt_plans.check_gpus(section(runtime="tensorrt"), progress=said.append)
    trt_plans.check_gpus(EngineSection.model_validate({}), progress=said.append)
    assert len(said) == 2


def test_a_missing_library_is_named_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trt_plans, "packages_distributions", dict)
    with pytest.raises(
        EngineError, match=r'(?s)tensorrt_rtx, .*pip install "dspark-batch\[tensorrt-r'
    ):
        plan_files_info(section(), block_size=4)
    with pytest.raises(EngineError, match=r'(?s)tensorrt, which.*"dspark-batch\[tensorrt\]"'):
        plan_files_info(section(runtime="tensorrt"), block_size=4)
    assert plan_files_info(EngineSection.model_validate({}), block_size=4) is None
