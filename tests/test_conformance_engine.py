"""The exported pair against what the reference implementation computed, array by array."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import export_pair

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, RunningRow, SamplingParams, VerifyPlan
from dspark_batch.engine.engine import Engine, open_engine

SHARED = Path(__file__).parents[2] / "shared" / "conformance"
SETS = sorted(path.parent for path in SHARED.glob("*/manifest.json"))
pytestmark = pytest.mark.skipif(not SETS, reason="the reference's arrays are not here")


@pytest.fixture(scope="module", params=SETS, ids=lambda path: path.name)
def conformance(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Path]]:
    folder: Path = request.param
    scratch = tmp_path_factory.mktemp(folder.name)
    engine = open_engine(export_pair(scratch, folder / "target", folder / "draft", max_tokens=128))
    yield engine, folder
    engine.close()


def rounds(arrays: Any, run: str) -> list[dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in arrays.files:
        parts = name.split("/")
        if parts[0] == run and len(parts) == 3:
            found.setdefault(parts[1], {})[parts[2]] = arrays[name]
    return [found[name] for name in sorted(found)]


def prompt_arrays(folder: Path) -> list[Any]:
    return [np.load(path) for path in sorted(folder.glob("prompt_*.npz"))]


@pytest.mark.parametrize("run", ["greedy", "threshold", "stop"])
def test_every_round_drafts_and_verifies_as_the_reference(
    run: str, conformance: tuple[Engine, Path]
) -> None:
    """With the lengths that the reference verified: whole blocks, confident prefixes."""
    engine, folder = conformance
    lengths = set()
    for arrays in prompt_arrays(folder):
        prompt = arrays["prompt_ids"].reshape(-1).tolist()
        sequence = RunningRow(
            prompt=Prompt(0, tuple(prompt), SamplingParams(max_new_tokens=64)),
            slot=0,
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
        )
        engine.admit(sequence)
        sequence.tokens.append(int(engine.prefill([sequence])[0]))
        checked = 0
        for step in rounds(arrays, run):
            assert sequence.anchor_position == int(step["start"])
            block = engine.draft_raw([sequence])
            np.testing.assert_array_equal(block.tokens[0], step["draft_tokens"].reshape(-1))
            if "confidence_logits_full" in step:
                np.testing.assert_allclose(
                    block.confidence[0], step["confidence_logits_full"].reshape(-1), atol=1e-4
                )
            # A round that ends the text records what it kept as its length.
            stopped = bool(step["stopped"])
            length = engine.block_size if stopped else int(step["proposal_len"])
            lengths.add(length)
            plan = VerifyPlan(np.array([length]))
            result = engine.verify([sequence], block, plan)
            if not stopped:
                assert int(result.num_accepted[0]) == int(step["accepted"])
                assert int(result.bonus[0]) == step["next_token"].item()
            accepted = block.tokens[0, : int(result.num_accepted[0])].tolist()
            sequence.tokens += [*accepted, int(result.bonus[0])]
            checked += 1
        assert checked > 3
        engine.release(sequence)
    assert len(lengths) > 2 if run == "threshold" else lengths == {engine.block_size}


@pytest.mark.parametrize("spec", ["off", "on", "auto"])
def test_greedy_text_is_the_reference_s(conformance: tuple[Engine, Path], spec: str) -> None:
    engine, folder = conformance
    prompts, expected = [], []
    stop = engine.stop_token_ids
    for row, arrays in enumerate(prompt_arrays(folder)):
        ids = arrays["prompt_ids"].reshape(-1).tolist()
        output = arrays["plain_greedy/output_ids"].reshape(-1).tolist()
        new = output[len(ids) :] if output[: len(ids)] == ids else output
        prompts.append(Prompt(row, tuple(ids), SamplingParams(max_new_tokens=len(new))))
        end = next((i + 1 for i, token in enumerate(new) if token in stop), len(new))
        expected.append(new[:end])
    stats = DecodeStats()
    found = {c.row: c for c in decode(prompts, engine, spec=spec, stats=stats)}
    assert [list(found[row].token_ids) for row in range(len(prompts))] == expected
    if spec == "on":
        assert stats.spec.accepted_length > 1.5


def stopping_at(engine: Engine, token: int) -> Engine:
    """The same engine with another stop token."""
    target = engine.manifest.target.model_copy(update={"stop_token_ids": (token,)})
    changed = copy.copy(engine)
    changed.manifest = engine.manifest.model_copy(update={"target": target})
    return changed


@pytest.mark.parametrize("spec", ["off", "on"])
def test_text_ends_at_a_stop_token_as_the_reference_s_does(
    conformance: tuple[Engine, Path], spec: str
) -> None:
    engine, folder = conformance
    for arrays in prompt_arrays(folder):
        ids = arrays["prompt_ids"].reshape(-1).tolist()
        token = int(arrays["stop/stop_token"])
        output = arrays["stop/output_ids"].reshape(-1).tolist()
        wanted = output[len(ids) :] if output[: len(ids)] == ids else output
        assert wanted.index(token) == len(wanted) - 1
        prompt = Prompt(0, tuple(ids), SamplingParams(max_new_tokens=64))
        (found,) = decode([prompt], stopping_at(engine, token), spec=spec, stats=DecodeStats())
        assert list(found.token_ids) == wanted


@pytest.mark.parametrize("new_tokens", [1, 2, 7, 8])
def test_text_is_cut_where_the_limit_is(conformance: tuple[Engine, Path], new_tokens: int) -> None:
    """Within a block, at its end, and by the first token alone."""
    engine, folder = conformance
    for arrays in prompt_arrays(folder):
        ids = arrays["prompt_ids"].reshape(-1).tolist()
        output = arrays["greedy/output_ids"].reshape(-1).tolist()
        whole = output[len(ids) :] if output[: len(ids)] == ids else output
        prompt = Prompt(0, tuple(ids), SamplingParams(max_new_tokens=new_tokens))
        (found,) = decode([prompt], engine, spec="on", stats=DecodeStats())
        assert list(found.token_ids) == whole[:new_tokens]


def test_manifest_says_what_the_checkpoint_says(conformance: tuple[Engine, Path]) -> None:
    engine, folder = conformance
    config = json.loads((folder / "draft" / "config.json").read_text())
    draft = engine.manifest.draft
    assert draft is not None
    assert draft.block_size == config["block_size"] == engine.block_size
    assert list(draft.target_layer_ids) == config["target_layer_ids"]
    assert draft.markov_rank == config["markov_rank"]


def test_an_engine_opened_without_its_draft_decodes_plainly(
    conformance: tuple[Engine, Path],
) -> None:
    engine, folder = conformance
    prompt = prompt_arrays(folder)[0]["prompt_ids"].reshape(-1).tolist()
    texts = []
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=3)
        plain = open_engine(engine.folder, with_draft=False)
        assert plain.block_size == 0
        assert plain.fingerprint == engine.fingerprint
        stats = DecodeStats()
        (found,) = decode([Prompt(0, tuple(prompt), params)], plain, spec="auto", stats=stats)
        assert stats.spec.num_draft_tokens == 0
        texts.append(found.token_ids)
        plain.close()
    params = SamplingParams(max_new_tokens=20)
    (found,) = decode([Prompt(0, tuple(prompt), params)], engine, spec="on", stats=DecodeStats())
    assert found.token_ids == texts[0]
