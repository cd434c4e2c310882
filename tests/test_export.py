"""Exports: what a folder says of itself, when it is rebuilt, and what is never installed."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch import __version__
from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import FinishReason, Prompt, SamplingParams
from dspark_batch.engine.engine import open_engine
from dspark_batch.engine.manifest import FORMAT, describe_file, read_manifest
from dspark_batch.errors import EngineError, StorageError
from dspark_batch.export import pipeline
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.weights import sha256_of


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    target = write_target(folder / "target", target_config("llama"))
    return export_pair(folder, target, write_draft(folder / "draft", draft_config()))


@pytest.fixture
def workspace(built: Path, tmp_path: Path) -> Path:
    """A copy of the built workspace, to be changed; the recipe names the original weights."""
    shutil.copytree(built.parents[1], tmp_path / "copy")
    return tmp_path / "copy"


def export_again(workspace: Path, **changes: Any) -> Path:
    original = Path(str(workspace / "target"))
    return export_pair(workspace, original, workspace / "draft", **changes)


def test_the_manifest_tells_everything(built: Path) -> None:
    manifest = read_manifest(built)
    folder = built.parents[1]
    assert (manifest.format, manifest.name) == (FORMAT, "tiny")
    assert (manifest.runtime, manifest.precision) == ("onnxruntime", "fp32")
    assert manifest.versions["dspark-batch"] == __version__
    assert manifest.versions["onnxruntime"] == version("onnxruntime")
    on_disk = {path.name for path in built.iterdir()} - {"manifest.json", "costs.json"}
    assert set(manifest.files) == on_disk
    assert {"target.onnx", "target.onnx.data", "draft.onnx", "draft.onnx.data"} <= on_disk
    for name, info in manifest.files.items():
        assert info == describe_file(built / name)
    target, draft = manifest.target, manifest.draft
    assert draft is not None
    assert target.source == str(folder / "target")
    for info, source in ((target, folder / "target"), (draft, folder / "draft")):
        weights = source / "model.safetensors"
        assert info.files["model.safetensors"] == sha256_of(weights)
    assert (target.family, target.vocab_size, target.stop_token_ids) == ("llama", 40, (0,))
    assert draft.target_layer_ids == (0, 1)
    assert len(draft.confidence_temperatures) == len(draft.acceptance) == draft.block_size
    assert all(0 < share < 1 for share in draft.acceptance)
    assert set(manifest.parity) >= {"kl", "context_error", "invariance"}
    assert not manifest.has_tokenizer
    assert manifest.fingerprint()["graph"] == manifest.files["target.onnx"].sha256


def test_costs_belong_to_a_machine(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(built, folder)
    engine = open_engine(folder)
    tables = json.loads((folder / "costs.json").read_text())
    assert list(tables) == [engine.hardware_key]
    assert engine.costs is not None
    assert engine.costs.rows == (1, 2, 4)
    engine.close()
    (folder / "costs.json").write_text(json.dumps({"another machine": tables.popitem()[1]}))
    elsewhere = open_engine(folder)
    assert elsewhere.costs is None
    elsewhere.close()


def test_an_engine_is_kept_until_something_changes(workspace: Path) -> None:
    folder = export_again(workspace)  # the sources have moved: built anew
    first = (folder / "manifest.json").stat().st_ino
    assert export_again(workspace) == folder
    assert (folder / "manifest.json").stat().st_ino == first
    export_again(workspace, max_tokens=64)
    second = (folder / "manifest.json").stat().st_ino
    assert second != first
    assert read_manifest(folder).limits.max_tokens == 64
    pipeline.export(workspace / "export" / "tiny.toml", output=folder, force=True)
    assert (folder / "manifest.json").stat().st_ino != second
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["notes.txt", "target", ".", "tokenizer.json"])
def test_an_export_deletes_no_file_of_others(workspace: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "engines" / "engine"
    theirs = {"target": folder / "target/report.txt", ".": folder}.get(name, folder / name)
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("theirs")
    with pytest.raises(StorageError, match=r"engine.* is not a f"):
        pipeline.export(workspace / "export" / "tiny.toml", output=folder, force=True)
    assert theirs.read_text() == "theirs"
    assert [path.name for path in folder.parent.iterdir()] == ["engine"]


@pytest.mark.slow
def test_a_damaged_engine_is_built_again(workspace: Path) -> None:
    folder = export_again(workspace)
    (folder / "draft.onnx").write_bytes(b"")
    export_again(workspace)
    open_engine(folder).close()


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(EngineError, match=f"(?s){message}") as raised:
        open_engine(folder)
    assert f"dspark-batch export {folder.name}" in str(raised.value)


def test_a_folder_that_is_not_what_was_exported_is_refused(built: Path, tmp_path: Path) -> None:
    refuse(tmp_path, "there is no engine in")
    folder = tmp_path / "tiny"
    shutil.copytree(built, folder)
    weights = folder / "target.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    refuse(folder, r"target.onnx.data is not the file that the export wrote.*--force")
    weights.unlink()
    refuse(folder, r"target.onnx.data is missing.*--force")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": "other/9"}))
    refuse(folder, "format 'other/9'")
    (folder / "manifest.json").write_text(json.dumps(manifest | {"precision": 3}))
    refuse(folder, "precision")


def shift_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    build = DecoderGraph.build

    def shifted(self: DecoderGraph, *, taps: Any, **rest: Any) -> None:
        build(self, taps=[tap + 1 for tap in taps], **rest)

    monkeypatch.setattr(DecoderGraph, "build", shifted)


def corrupt_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = DecoderGraph._matrix

    def corrupted(self: DecoderGraph, name: str) -> Any:
        found = np.array(matrix(self, name))
        if name.endswith("layers.1.mlp.down_proj"):
            found[:, 3] = -found[:, 3]
        return found

    monkeypatch.setattr(DecoderGraph, "_matrix", corrupted)


@pytest.mark.parametrize(
    ("breaks", "figure"), [(shift_taps, "context_error"), (corrupt_a_weight, "kl")]
)
def test_a_wrong_graph_is_not_installed_and_the_old_one_stays(
    breaks: Any, figure: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_ino for path in built.iterdir()}
    breaks(monkeypatch)
    with pytest.raises(EngineError, match=rf"(?s)fails its check: {figure}.*nothing was installed"):
        pipeline.export(built.parents[1] / "export" / "tiny.toml", output=built, force=True)
    assert [path.name for path in built.parent.iterdir()] == ["tiny"]
    assert {path.name: path.stat().st_ino for path in built.iterdir()} == before
    open_engine(built).close()


def test_a_source_that_lacks_a_weight_leaves_nothing(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    tensors = load_file(target / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(EngineError, match=r"layers.2.mlp.down_proj"):
        export_pair(tmp_path, target, None)
    assert not list((tmp_path / "engines").iterdir())


@pytest.mark.parametrize(
    ("name", "is_dropped"),
    [
        ("model.layers.1.self_attn.q_proj.bias", False),
        ("model.layers.1.mlp.down_proj.weight_scale", False),
        ("adapter.lora_A.weight", False),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", True),  # transformers drops it too
    ],
)
def test_a_weight_that_the_graph_would_drop_is_refused_by_name(
    tmp_path: Path, name: str, is_dropped: bool
) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    tensors = load_file(target / "model.safetensors") | {name: np.ones(4, np.float32)}
    save_file(tensors, target / "model.safetensors")
    if is_dropped:
        assert (export_pair(tmp_path, target, None) / "target.onnx").exists()
        return
    with pytest.raises(EngineError, match=rf"no llama model has: {re.escape(name)}; "):
        export_pair(tmp_path, target, None)
    assert not list((tmp_path / "engines").iterdir())


def test_an_engine_without_a_draft_and_a_tokenizer_decodes_plainly(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    folder = export_pair(tmp_path, target, None)
    assert not (folder / "draft.onnx").exists()
    engine = open_engine(folder)
    assert (engine.block_size, engine.tokenizer, engine.costs) == (0, None, None)
    prompts = [Prompt(row, (3, row + 1), SamplingParams(6)) for row in range(7)]
    texts = []
    for spec in ("off", "on", "auto"):
        done = list(decode(prompts, engine, spec=spec, stats=DecodeStats()))
        texts.append({c.row: c.token_ids for c in done})
        assert all(c.text is None and c.spec.num_draft_tokens == 0 for c in done)
        assert {c.finish_reason for c in done} <= {FinishReason.LENGTH, FinishReason.STOP}
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 7
    engine.close()


def test_an_engine_for_very_short_rows_can_be_built_and_run(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    engine = open_engine(export_pair(tmp_path, target, draft, max_tokens=12))
    prompts = [Prompt(0, (1, 2, 3, 4, 5, 6, 7), SamplingParams(max_new_tokens=5))]
    texts = {
        spec: [c.token_ids for c in decode(prompts, engine, spec=spec, stats=DecodeStats())]
        for spec in ("off", "on", "auto")
    }
    assert texts["off"] == texts["on"] == texts["auto"]
    engine.close()


@pytest.mark.slow
def test_another_drafter_or_source_is_another_engine(workspace: Path) -> None:
    before = read_manifest(export_again(workspace))
    shutil.copytree(workspace / "draft", workspace / "same-weights")
    after = read_manifest(export_pair(workspace, workspace / "target", workspace / "same-weights"))
    assert before.draft is not None
    assert after.draft is not None
    assert (after.draft.files, after.draft.source) != (before.draft.files, before.draft.source)


@pytest.mark.slow
def test_a_dflash_draft_is_built_and_drafts(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    plain_head = {"markov_rank": 0, "enable_confidence_head": False}
    draft = write_draft(tmp_path / "draft", draft_config(**plain_head))
    folder = export_pair(tmp_path, target, draft)
    recipe = tmp_path / "export" / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("[draft]", '[draft]\ndrafter = "dflash"'))
    engine = open_engine(pipeline.export(recipe, output=folder))
    assert engine.manifest.draft is not None
    assert engine.manifest.draft.drafter == "dflash"
    prompts = [Prompt(0, (1, 2, 3, 4), SamplingParams(max_new_tokens=12))]
    texts = {}
    for spec in ("off", "on"):
        stats = DecodeStats()
        (found,) = decode(prompts, engine, spec=spec, stats=stats)
        texts[spec] = found.token_ids
    assert stats.spec.num_verified_tokens > 0
    assert texts["on"] == texts["off"]
    engine.close()
