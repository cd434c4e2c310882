"""`dspark-batch train` on a tiny target, from prompts to an engine that decodes with the draft."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from tiny import VOCAB, draft_config, target_config, write_draft, write_target
from tokenizers import Tokenizer, models, pre_tokenizers

torch = pytest.importorskip("torch")

from dspark_batch.cli import main  # noqa: E402
from dspark_batch.engine.engine import open_engine  # noqa: E402
from dspark_batch.export.pipeline import build  # noqa: E402
from dspark_batch.export.recipe import Recipe  # noqa: E402
from dspark_batch.models.weights import open_weights  # noqa: E402
from dspark_batch.training import generation, responders, responses, self_written  # noqa: E402
from dspark_batch.training.features import capped  # noqa: E402
from dspark_batch.training.recipe import (  # noqa: E402
    DraftSection,
    HeldOutSection,
    ImportedSection,
    PromptsSection,
    ResponsesSection,
    TargetSection,
    TrainingSection,
    load_training_recipe,
)
from dspark_batch.training.target import (  # noqa: E402
    EngineFeatures,
    TargetTables,
    context_layer_ids,
)
from dspark_batch.training.trainer import Trainer  # noqa: E402

DRAFTS = Path(__file__).parents[1] / "export" / "drafts"
STOP, MASK, WORDS, STEPS = 0, VOCAB - 2, VOCAB - 3, 80
SHORT = "steps = 3\nevaluate_seconds = 1000\n"
"""A training that only has to run."""
RECIPE = """
[target]
weights = "{target}"
precision = "fp32"
max_rows = 8
max_tokens = 96
runtime = "{runtime}"
{data}
[draft]
layers = 1
block_size = 4
mask_token_id = {mask}
{draft}
[training]
anchors = 12
bf16 = false
{training}
[held_out]
{held_out}
"""
PROMPTS = """
[prompts]
files = ["prompts.parquet"]
source_column = "source"
[[responses]]
max_new_tokens = 24
[[responses]]
temperature = 0.8
top_k = 4
max_new_tokens = 24
"""
IMPORTED = """
[[imported]]
files = ["responses/*.parquet"]
token_ids_column = "prompt_token_ids"
"""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums over threads may round otherwise, and here weights are compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def talking_target(folder: Path, family: str = "llama") -> Path:
    """A target that mostly walks a fixed cycle of words, so that there is something to learn."""
    if family == "gemma4_text":
        pytest.importorskip("transformers")
        from test_gemma4 import write_gemma4

        write_gemma4(folder, tie_word_embeddings=False)
        target = folder
    else:
        target = write_target(folder, target_config(family, tie_word_embeddings=False))
    tensors = load_file(target / "model.safetensors")
    added = ("o_proj.weight", "down_proj.weight")
    if family == "gemma4_text":  # which normalises what they give
        added = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    for name, tensor in tensors.items():
        if name.endswith(added):
            tensor *= 0.1
    order = np.random.default_rng(4).permutation(WORDS)
    embed = tensors["model.embed_tokens.weight"]
    head = np.zeros_like(embed)
    head[np.roll(order, 1)] = embed[order]
    tensors["lm_head.weight"] = head
    save_file(tensors, target / "model.safetensors")
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(target / "tokenizer.json"))
    return target


@dataclass(frozen=True)
class Workspace:
    folder: Path

    def recipe(
        self,
        name: str,
        *,
        target: str = "target",
        data: str = IMPORTED,
        draft: str = "",
        training: str = SHORT,
        held_out: str = "count = 8",
        mask: int = MASK,
        runtime: str = "auto",
    ) -> Path:
        path = self.folder / "export" / "drafts" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            RECIPE.format(
                target=target,
                data=data,
                draft=draft,
                training=training,
                held_out=held_out,
                mask=mask,
                runtime=runtime,
            )
        )
        return path

    def draft(self, name: str) -> Path:
        return self.folder / "export" / "drafts" / name

    def log(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "export" / "drafts" / f"{name}.training" / "training" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def train(recipe: Path | str, *words: str) -> dict[str, Any]:
    result = command("train", recipe, "--progress", "none", "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def fails(recipe: Path, *words: str) -> tuple[int, str]:
    result = command("train", recipe, "--progress", "none", *words)
    assert result.exit_code not in (0, 1), result.output
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    talking_target(folder / "target")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(1, WORDS, 1 + n % 6)) for n in range(60)]
    sources = ["even" if i % 2 else "odd" for i in range(60)]
    pq.write_table(pa.table({"prompt": texts, "source": sources}), folder / "prompts.parquet")
    return Workspace(folder)


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> dict[str, Any]:
    """The whole way, from prompts; its responses serve the other tests as imported ones."""
    training = f"steps = {STEPS}\nlearning_rate = 5e-3\nlog_every = 5\nema_decay = 0.9\n"
    training += "cross_entropy = 1.0\n"
    draft = "markov_rank = 8\nvocab_size = 37"
    recipe = workspace.recipe("whole", data=PROMPTS, training=training, draft=draft)
    found = train(recipe)
    parts = workspace.draft("whole.training").glob("responses/prompts-*/data/*.parquet")
    (workspace.folder / "responses").mkdir()
    for i, part in enumerate(parts):
        shutil.copyfile(part, workspace.folder / "responses" / f"{i}.parquet")
    return found


def test_training_raises_the_accepted_length_on_held_out_prompts(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    assert trained["tau_greedy"] > trained["tau_at_start"] + 0.5
    assert trained["num_steps"] == STEPS
    assert trained["num_held_out"] == 8
    evaluations = [entry for entry in workspace.log("whole") if entry["event"] == "evaluation"]
    assert evaluations[-1]["tau_greedy"] == pytest.approx(trained["tau_greedy"], rel=0.05)
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_the_draft_folder_says_what_it_is(workspace: Workspace, trained: dict[str, Any]) -> None:
    folder = workspace.draft("whole")
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "engine.toml", "training.jsonl")
    }
    card = (folder / "README.md").read_text()
    for words in (
        f"{trained['num_responses']:,} responses, {trained['num_response_tokens']:,} tokens",
        f"{STEPS} steps of 8 sequences",
        "37 of the target's 40 ids",
        f"| all | {trained['tau_greedy']:.2f} | {trained['tau_sampled']:.2f} |",
        "| even |",
        "| odd |",
        "1 greedy, 1 at temperature 0.8",
    ):
        assert words in card
    config = json.loads((folder / "config.json").read_text())
    assert len(config["confidence_temperatures"]) == config["block_size"] == 4
    assert str(workspace.folder) not in card + (folder / "engine.toml").read_text()


def accepted_length_at_work(
    workspace: Workspace, name: str, next_command: str, monkeypatch: pytest.MonkeyPatch
) -> float:
    """Type the next command, complete the held-out prompts with the draft and without; its τ."""
    monkeypatch.chdir(workspace.folder)
    words = shlex.split(next_command)
    assert words[0] == "dspark-batch"
    recipe = Path(words[2])  # training knows nothing of the lookup that stands by
    recipe.write_text(recipe.read_text().replace("[draft]\n", '[draft]\nlookup = "none"\n'))
    built = command(*words[1:], "--progress", "none", "--force")
    assert built.exit_code == 0, built.output
    tokens = {}
    for spec in ("on", "off"):
        output = workspace.folder / "runs" / spec
        done = command(
            *("run", workspace.draft(f"{name}.training") / "held-out.parquet"),
            *("--engine", words[-1], "--spec", spec, "-o", output, "--max-new-tokens", "24"),
            *("--overwrite", "--token-ids", "--progress", "none", "--json"),
        )
        assert done.exit_code == 0, done.output
        (part,) = (output / "data").glob("*.parquet")
        tokens[spec] = pq.read_table(part)["output_token_ids"].to_pylist()
        if spec == "on":
            tau = json.loads(done.stdout)["spec"]["accepted_length"]
    assert tokens["on"] == tokens["off"]
    return float(tau)


def test_the_next_command_builds_an_engine_that_accepts_what_training_said(
    workspace: Workspace, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accepted_length_at_work(workspace, "whole", trained["next_command"], monkeypatch)
    assert found == pytest.approx(trained["tau_greedy"], abs=0.1)


@pytest.mark.parametrize(
    ("family", "draft", "start"),
    [
        ("qwen3", 'markov_head = "gated"\nmarkov_rank = 8', "random"),
        ("gemma3_text", 'markov_head = "rnn"\nmarkov_rank = 8\nvocab_size = "full"', "target"),
        ("gemma4_text", "markov_rank = 8", "random"),
        ("llama", 'markov_head = "none"\nconfidence_head = false', "target"),
    ],
    ids=["gated-qwen3", "rnn-gemma3", "vanilla-gemma4", "dflash-llama"],
)
def test_every_head_and_family_trains_exports_and_decodes(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    draft: str,
    start: str,
) -> None:
    target = talking_target(workspace.folder / f"target-{family}", family)
    training = f'steps = 120\nlearning_rate = 5e-3\ncross_entropy = 1.0\nstart = "{start}"\n'
    greedy = PROMPTS[: PROMPTS.rindex("[[responses]]")]
    recipe = workspace.recipe(
        family, target=target.name, data=greedy, draft=draft, training=training
    )
    found = train(recipe)
    assert found["tau_greedy"] > found["tau_at_start"] + 0.1
    at_work = accepted_length_at_work(workspace, family, found["next_command"], monkeypatch)
    assert at_work == pytest.approx(found["tau_greedy"], abs=0.1)


class Killed(BaseException):
    """Ends a command as a kill does: nothing cleans up after it."""


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    workspace: Workspace, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = "steps = 9\ndropout = 0.1\nbatch_size = 4\nmemory_gb = 0.0004\npasses = 2\n"
    training += "checkpoint_seconds = {seconds}\n"
    whole = workspace.recipe("one", training=training.format(seconds=1000))
    train(whole)
    parts = workspace.recipe("two", training=training.format(seconds=1e-9))
    for dies_at in (4, 7):

        def step(self: Trainer, batch: Any, last: int = dies_at, take: Any = Trainer.train_step):
            if self.step == last:
                raise Killed
            return take(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", step)
            with pytest.raises(Killed):
                CliRunner().invoke(
                    main, ["train", str(parts), "--progress", "none"], catch_exceptions=False
                )
    assert not workspace.draft("two").exists()
    engine = workspace.draft("two.training") / "engine" / "target.onnx"
    built = engine.stat().st_mtime_ns
    train(parts)
    assert engine.stat().st_mtime_ns == built
    assert [entry["step"] for entry in workspace.log("two") if entry["event"] == "evaluation"] == [
        *(0, 9)
    ]
    first, second = (workspace.draft(name) / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_the_target_in_torch_does_what_the_engine_does(
    workspace: Workspace, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same greedy responses, the same draft to rounding; and no engine is built for it."""
    data = PROMPTS[: PROMPTS.rindex("[[responses]]")]
    training = "steps = 40\nlearning_rate = 5e-3\ncross_entropy = 1.0\n"
    found, said = {}, {}
    for runtime in ("engine", "torch"):
        recipe = workspace.recipe(runtime, data=data, training=training, runtime=runtime)
        found[runtime] = train(recipe)
        work = workspace.draft(f"{runtime}.training")
        parts = [pq.read_table(part) for part in work.glob("responses*/prompts-*/data/*.parquet")]
        said[runtime] = {
            tuple(prompt): tuple(response)
            for part in parts
            for prompt, response in zip(
                part["prompt_token_ids"].to_pylist(),
                part["output_token_ids"].to_pylist(),
                strict=True,
            )
        }
    assert not (work / "engine").exists()
    status, message = fails(workspace.recipe("torch", data=data, training=training))
    assert status == 2
    assert 'target.runtime was "torch" and is "engine"' in message  # as on a CPU by default
    workspace.recipe("torch", data=data, training=training, runtime="torch")
    assert said["torch"] == said["engine"]
    for key in ("num_responses", "num_response_tokens"):
        assert found["torch"][key] == found["engine"][key]
    assert found["torch"]["tau_greedy"] == pytest.approx(found["engine"]["tau_greedy"], abs=0.1)
    assert found["torch"]["tau_greedy"] > found["torch"]["tau_at_start"] + 0.1
    card = (workspace.draft("torch") / "README.md").read_text()
    assert "Features: the target in torch, fp32." in card
    at_work = accepted_length_at_work(
        workspace, "torch", found["torch"]["next_command"], monkeypatch
    )
    assert at_work == pytest.approx(found["torch"]["tau_greedy"], abs=0.1)


def longest(parts: list[Any]) -> list[int]:
    """Tokens of the longest response of each part."""
    return [max(map(len, part["output_token_ids"].to_pylist())) for part in parts]


def test_responses_in_torch_go_on_where_they_were_stopped(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_MOST_ROWS", 20)
    recipe = workspace.recipe("waves", data=PROMPTS, runtime="torch")
    take, taken = responders.generate, []

    def dying(decoder: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        if len(taken) == 2:
            raise Killed
        taken.append(take(decoder, prompts, *rest, **options))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(responders, "generate", dying)
        with pytest.raises(Killed):
            CliRunner().invoke(
                main, ["train", str(recipe), "--progress", "none"], catch_exceptions=False
            )
    folder = workspace.draft("waves.training") / "responses-torch"
    parts = sorted(folder.glob("*/data/*.parquet"))
    assert [part.name for part in parts] == ["part-00000000.parquet", "part-00000020.parquet"]
    times = [part.stat().st_mtime_ns for part in parts]
    shorter = workspace.recipe("waves", data=PROMPTS.replace("24", "23"), runtime="torch")
    status, message = fails(shorter)
    assert status == 3
    assert "start again with --overwrite" in message
    recipe = workspace.recipe("waves", data=PROMPTS, runtime="torch")
    monkeypatch.setattr(generation, "_MOST_ROWS", 7)  # parts of another size fit beside them
    status, message = fails(recipe, "--deadline", "0.001")
    assert status == 75
    assert f"continue with: dspark-batch train {recipe}" in message
    train(recipe)
    assert [part.stat().st_mtime_ns for part in parts] == times
    tables = [pq.read_table(part) for part in sorted(parts[0].parent.glob("*.parquet"))]
    assert [table.num_rows for table in tables] == [20, 20, 7, 5]
    prompts = pq.read_table(workspace.draft("waves.training") / "prompts.parquet")
    ids = [ids for table in tables for ids in table["prompt_token_ids"].to_pylist()]
    assert sorted(ids) == sorted(prompts["prompt_token_ids"].to_pylist())
    assert max(longest(tables)) == 24
    shorter = workspace.recipe("waves", data=PROMPTS.replace("24", "23"), runtime="torch")
    foreign = parts[0].with_name("part-mine.parquet")
    pq.write_table(pa.table({"prompt_token_ids": [[1]]}), foreign)
    status, message = fails(shorter, "--overwrite")
    assert f"{foreign} was not written by a training" in message
    foreign.unlink()  # it was left where it is
    train(shorter, "--overwrite")
    tables = [pq.read_table(part) for part in sorted(parts[0].parent.glob("*.parquet"))]
    assert max(longest(tables)) == 23


def make_special(target: Path, token: int) -> None:
    """Let a token of the target be a special one, which no text shows."""
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [
        {"id": token, "content": f"w{token}", "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
    ]
    path.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def jobs(workspace: Workspace, trained: dict[str, Any]) -> dict[str, Path]:
    """The same job with token ids and without; two of its rows failed. Stop tokens are no text."""
    make_special(talking_target(workspace.folder / "target-quiet"), STOP)
    engine = '[target]\nweights = "target-quiet"\n[engine]\nprecision = "fp32"\nmax_tokens = 96\n'
    (workspace.folder / "export" / "plain.toml").write_text(engine)
    output = workspace.folder / "engines" / "plain"
    recipe = workspace.folder / "export" / "plain.toml"
    done = command("export", recipe, "-o", output, "--progress", "none")
    assert done.exit_code == 0, done.output
    table = pq.read_table(workspace.folder / "prompts.parquet")
    texts = [None, *table["prompt"].to_pylist(), None]
    pq.write_table(pa.table({"text": texts}), workspace.folder / "night.parquet")
    found = {}
    for kind, flags in (("ids", ["--token-ids"]), ("text", [])):
        found[kind] = workspace.folder / f"night-{kind}"
        done = command(
            *("run", workspace.folder / "night.parquet", "--engine", output, "-o", found[kind]),
            *("--prompt-column", "text", "--max-new-tokens", "24", "--progress", "none", *flags),
        )
        assert done.exit_code == 0, done.output
    return found


def test_a_draft_is_tuned_on_the_rows_of_a_job(workspace: Workspace, jobs: dict[str, Path]) -> None:
    """From its own weights; text and token ids of the same rows give the same draft."""
    weights, found = {}, {}
    for kind, output in jobs.items():
        recipe = workspace.recipe(f"nightly-{kind}", target="target-quiet", data="")
        status, message = fails(recipe)
        assert status == 2
        assert f"dspark-batch train {recipe} --from-job" in message
        shutil.copytree(workspace.draft("whole"), workspace.draft(f"nightly-{kind}"))
        found[kind] = train(recipe, "--from-job", str(output))
        assert found[kind]["draft"].endswith(f"nightly-{kind}-tuned")
        state = workspace.draft(f"nightly-{kind}-tuned.training") / "training" / "state.pt"
        weights[kind] = torch.load(state, weights_only=True)["parameters"]
    own, old = (workspace.draft(name) / "model.safetensors" for name in ("nightly-ids", "whole"))
    assert own.read_bytes() == old.read_bytes()
    for name, tensor in weights["ids"].items():
        assert torch.equal(tensor, weights["text"][name])
    assert not torch.equal(
        weights["ids"]["fc.weight"].half(), torch.tensor(load_file(old)["fc.weight"])
    )
    (part,) = (jobs["ids"] / "data").glob("*.parquet")
    rows = pq.read_table(part)
    kept = [ids for ids in rows["output_token_ids"].to_pylist() if len(ids or ()) >= 2]
    assert rows["finish_reason"].to_pylist().count("error") == 2
    assert any(ids[-1] == STOP for ids in kept)
    sizes = [(f["num_responses"] + f["num_held_out"]) for f in found.values()]
    assert sizes == [len(kept)] * 2
    # It starts where the recipe's draft is, which knows the target already.
    assert found["ids"]["tau_at_start"] > 1.2


def test_only_a_finished_job_tunes_a_draft(workspace: Workspace, jobs: dict[str, Path]) -> None:
    recipe = workspace.recipe("unfinished", data="")
    status, message = fails(recipe, "--from-job", str(workspace.folder))
    assert status == 2
    assert "is not the output of a run" in message
    cut = workspace.folder / "night-cut"
    shutil.copytree(jobs["text"], cut)
    record = json.loads((cut / "run" / "record.json").read_text())
    (cut / "run" / "record.json").write_text(json.dumps({**record, "state": "stopped"}))
    status, message = fails(recipe, "--from-job", str(cut))
    assert status == 2
    assert "its last run is stopped" in message
    assert f"dspark-batch status {cut}" in message


@pytest.mark.parametrize("runtime", ["engine", "torch"])
def test_a_target_writes_its_own_prompts(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """A user turn is what the template puts between w1 and w0; the answer comes after w2."""
    monkeypatch.setattr(self_written, "OPENINGS", ("w3 w4", "w5"))
    monkeypatch.setattr(responses, "MOST_TOKENS", 24)
    target = talking_target(workspace.folder / f"target-chatting-{runtime}")
    make_special(target, MASK)  # said now and then, as anything at temperature 1
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}w1 {{ m.content }} w0 {% endfor %}"
        "{% if add_generation_prompt %}w2{% endif %}"
    )
    data = PROMPTS.replace('files = ["prompts.parquet"]', "self_written = 120")
    data = data.replace('source_column = "source"\n', "")
    found = []
    for name in ("first", "second"):
        recipe = workspace.recipe(
            f"{name}-{runtime}", target=target.name, data=data, runtime=runtime
        )
        train(recipe)
        work = workspace.draft(f"{name}-{runtime}.training")
        tables = [pq.read_table(work / f"{kind}.parquet") for kind in ("prompts", "held-out")]
        found.append([table["prompt_token_ids"].to_pylist() for table in tables])
    assert found[0] == found[1]
    prompts = [tuple(ids) for kind in found[0] for ids in kind]
    assert len(prompts) == len(set(prompts)) > 20
    parts = work.glob("responses*/user-turns-temperature-1-seed-42/data/*.parquet")
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert len(rows) == 120
    turns = {
        (*row["prompt_token_ids"], *(i for i in row["output_token_ids"][:-1] if i != MASK), 0, 2)
        for row in rows
        if row["output_token_ids"][-1] == STOP and len(row["output_token_ids"]) > 1
    }
    unknown = VOCAB - 1  # whose text would be read as three of it
    assert {ids for ids in prompts if unknown not in ids} == {
        turn for turn in turns if unknown not in turn
    }
    assert {ids[:2] for ids in prompts} == {(1, 3), (1, 5)}
    assert len(rows) > len(prompts)  # some did not end, or were there before


def test_a_target_without_a_chat_template_writes_no_prompts(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    data = PROMPTS.replace('files = ["prompts.parquet"]', "self_written = 120")
    status, message = fails(workspace.recipe("silent", data=data))
    assert status == 3
    assert "no chat template" in message


def test_features_stay_below_their_cap(workspace: Workspace, trained: dict[str, Any]) -> None:
    training = "steps = 30\nbatch_size = 4\nmemory_gb = 0.0004\npasses = 1\nlog_every = 1\n"
    train(workspace.recipe("small", training=training))
    held = [entry["held_bytes"] for entry in workspace.log("small") if entry["event"] == "step"]
    assert len(set(held)) > 2  # chunk after chunk
    assert 0 < max(held) <= 0.75 * 0.0004e9  # a quarter is for the held-out responses


def test_a_stopped_training_says_how_to_go_on_and_does(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    recipe = workspace.recipe("stopped", data=PROMPTS)
    status, message = fails(recipe, "--deadline", "0.001")
    assert status == 75
    assert f"continue with: dspark-batch train {recipe}" in message
    assert train(recipe)["num_steps"] == 3


def test_a_finished_training_stays_until_it_is_overwritten(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    recipe = workspace.recipe("again", data=PROMPTS)
    first = train(recipe)
    model = workspace.draft("again") / "model.safetensors"
    parts = sorted(workspace.draft("again.training").glob("responses/*/data/*.parquet"))
    assert len(parts) == 3
    times = [path.stat().st_mtime_ns for path in (model, *parts)]
    assert train(recipe) == first
    assert [path.stat().st_mtime_ns for path in (model, *parts)] == times
    shutil.rmtree(workspace.draft("again"))
    assert train(recipe)["tau_greedy"] == first["tau_greedy"]  # the work folder has it all
    times[0] = model.stat().st_mtime_ns
    result = command("train", recipe)
    assert "is trained; --overwrite trains anew" in result.stderr

    workspace.recipe("again", data=PROMPTS, training=SHORT + "learning_rate = 1e-3\n")
    status, message = fails(recipe)
    assert status == 2
    assert "training.learning_rate was 0.0006 and is 0.001" in message
    train(recipe, "--overwrite")
    after = [path.stat().st_mtime_ns for path in (model, *parts)]
    assert after[0] != times[0]
    assert after[1:] == times[1:]  # the responses are still those that the recipe asks for

    workspace.recipe("again", data=PROMPTS, training=SHORT + "log_every = 7\n")
    assert fails(recipe)[0] == 2
    workspace.recipe(
        "again", data=PROMPTS, training=SHORT + "learning_rate = 1e-3\nlog_every = 7\n"
    )
    train(recipe)  # what does not decide the weights may change


def test_a_draft_of_another_origin_is_not_replaced(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    recipe = workspace.recipe("foreign")
    write_draft(workspace.draft("foreign"), draft_config())
    status, message = fails(recipe)
    assert status == 2
    assert "was not trained here" in message
    assert not workspace.draft("foreign.training").exists()
    before = {path.name: path.read_bytes() for path in workspace.draft("foreign").iterdir()}
    status, message = fails(recipe, "--overwrite")
    assert status == 6
    assert "foreign/config.json is not a file that dspark-batch wrote" in message
    after = {path.name: path.read_bytes() for path in workspace.draft("foreign").iterdir()}
    assert after == before
    workspace.draft("foreign").rename(workspace.draft("theirs"))
    train(recipe, "--overwrite")
    notes = workspace.draft("foreign") / "notes.txt"
    notes.write_text("theirs")
    status, message = fails(recipe, "--overwrite")
    assert status == 6
    assert "notes.txt is not a file that dspark-batch wrote" in message
    assert notes.read_text() == "theirs"


def test_training_goes_on_from_a_draft_with_a_larger_vocabulary(
    workspace: Workspace, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = f'start = "{workspace.draft("whole")}"\n'
    monkeypatch.chdir(workspace.folder)
    (workspace.folder / "export" / "broken.toml").write_text("[target]\n")
    (workspace.folder / "export" / "with-more.toml").write_text(
        '[target]\nweights = "target"\n[draft]\nweights = "export/drafts/more"\n'
    )
    workspace.recipe("more", draft='vocab_size = "full"', training=SHORT + start)
    found = train("more")
    assert found["next_command"] == "dspark-batch export with-more"
    assert found["tau_at_start"] > trained["tau_at_start"] + 0.3
    card = (workspace.draft("more") / "README.md").read_text()
    assert "- Start: whole." in card
    assert str(workspace.folder) not in card
    tensors = load_file(workspace.draft("more") / "model.safetensors")
    assert len(tensors["markov_head.markov_w2.weight"]) == VOCAB
    assert "d2t" not in tensors
    status, message = fails(
        workspace.recipe("other", draft="markov_rank = 9", training=SHORT + start)
    )
    assert status == 5
    assert "markov_rank 9 is not 8" in message


def test_held_out_prompts_are_in_no_training_sequence(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    held_out = workspace.draft("whole.training") / "held-out.parquet"
    kept = workspace.draft("whole.training") / "prompts.parquet"
    prompts = [
        {tuple(ids) for ids in pq.read_table(path)["prompt_token_ids"].to_pylist()}
        for path in (held_out, kept)
    ]
    assert len(prompts[0]) == 8
    assert not prompts[0] & prompts[1]
    parts = workspace.draft("whole.training").glob("responses/held-out-*/data")
    (data,) = parts
    files = f'files = ["{data}"]\ntoken_ids_column = "prompt_token_ids"'
    found = train(workspace.recipe("apart", held_out=files))
    assert found["num_held_out"] == 8
    assert found["num_responses"] == trained["num_responses"]


def test_held_out_prompts_may_come_from_a_file_of_their_own(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    """The greedy responses that they get are those of the other way; no prompt is on both sides."""
    work = workspace.draft("whole.training")
    table = pq.read_table(work / "held-out.parquet")
    twice = pa.concat_tables([table, table.slice(0, 3)])
    pq.write_table(twice, workspace.folder / "evaluation.parquet")
    held_out = 'prompts = ["evaluation.parquet"]\ntoken_ids_column = "prompt_token_ids"\n'
    held_out += 'source_column = "source"\nmax_new_tokens = 24'
    found = train(workspace.recipe("evaluated", held_out=held_out))
    assert found["num_held_out"] == 8
    assert found["num_responses"] == trained["num_responses"]
    assert set(found["tau_by_source"]) == {"even", "odd"}
    assert found["tau_by_source"].keys() == trained["tau_by_source"].keys()
    (part,) = workspace.draft("evaluated.training").glob("responses/held-out-*/data/*.parquet")
    (first,) = work.glob("responses/held-out-*/data/*.parquet")
    texts = [pq.read_table(path)["output_token_ids"].to_pylist() for path in (part, first)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"data": PROMPTS.replace("prompts.p", "nothing.p")}, 3, "[prompts] files: no file"),
        (
            {"data": PROMPTS.replace("[[resp", 'prompt_column = "promt"\n[[resp', 1)},
            3,
            "no column 'promt'; did you mean prompt?",
        ),
        ({"data": IMPORTED.replace("responses/", "none/")}, 3, "[imported] files: no file"),
        ({"data": IMPORTED + 'output_column = "text"\n'}, 3, "no column 'text'"),
        ({"held_out": 'prompts = ["none"]'}, 3, "[held_out] prompts: no file"),
        ({"data": "[prompts]"}, 2, "give files, self_written, or both"),
        ({"data": ""}, 2, "[prompts] or [[imported]] must say what to train on"),
        ({"mask": 5}, 3, "the mask token 5 appears in"),
        ({"mask": 99}, 3, "mask_token_id 99 is not in the target's vocabulary of 40"),
        ({"draft": "markov_rang = 8"}, 2, "[draft] unknown key markov_rang; did you mean"),
        ({"training": "step = 8"}, 2, "[training] unknown key step; did you mean steps?"),
        ({"training": "steps = 0"}, 2, "[training] steps = 0: Input should be"),
        ({"training": "steps = 8\nseconds = 8.0"}, 2, "give steps or seconds, not both"),
        ({"training": 'device = "abacus"'}, 2, "[training] device 'abacus'"),
        ({"training": 'start = "nowhere"'}, 2, "[training] start is not there"),
        ({"draft": "taps = [0, 7]"}, 5, "taps [0, 7] must increase within -1..2"),
        ({"target": "nothing"}, 2, "[target] weights is not there"),
        ({"held_out": "count = 8\nshare = 0.5"}, 2, "give one of count, share, files and prompts"),
        ({"training": SHORT + "memory_gb = 0.00001"}, 3, "raise [training] memory_gb"),
    ],
)
def test_bad_input_is_named(
    workspace: Workspace,
    trained: dict[str, Any],
    changes: dict[str, Any],
    status: int,
    words: str,
) -> None:
    shutil.rmtree(workspace.draft("bad.training"), ignore_errors=True)
    found, message = fails(workspace.recipe("bad", **changes))
    assert words in message
    assert found == status
    assert not workspace.draft("bad").exists()


def test_a_target_without_a_tokenizer_trains_on_token_ids_only(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    target = talking_target(workspace.folder / "target-mute")
    (target / "tokenizer.json").unlink()
    status, message = fails(workspace.recipe("mute", target=target.name, data=PROMPTS))
    assert status == 3
    assert "no tokenizer" in message
    assert "[prompts] token_ids_column" in message
    recipe = workspace.recipe("mute-ids", target=target.name)
    recipe.write_text(recipe.read_text().replace(f"mask_token_id = {MASK}\n", ""))
    assert "set [draft] mask_token_id" in fails(recipe)[1]
    assert train(workspace.recipe("mute-ids", target=target.name))["num_steps"] == 3


def test_a_draft_for_another_target_is_refused(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    write_draft(workspace.folder / "narrow", draft_config(hidden_size=16))
    recipe = workspace.recipe("narrowed", training=SHORT + 'start = "narrow"\n')
    status, message = fails(recipe)
    assert status == 5
    assert "is for another target: hidden_size and vocab_size (16, 40) are not (32, 40)" in message


def test_a_start_that_does_not_fit_is_refused_before_responses_are_generated(
    workspace: Workspace,
) -> None:
    target = talking_target(workspace.folder / "target-unlike", "gemma4_text")
    status, message = fails(workspace.recipe("unlike", target=target.name, data=PROMPTS))
    assert status == 5
    assert 'set [training] start = "random"' in message
    assert not (workspace.draft("unlike.training") / "responses").exists()


def test_a_recipe_needs_ten_lines(tmp_path: Path) -> None:
    path = tmp_path / "export" / "drafts" / "mine.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[target]\nweights = "target"\n[prompts]\nfiles = ["prompts.parquet"]\n')
    recipe = load_training_recipe(path)
    assert recipe.training.options.seconds == 3600
    assert [way.temperature for way in recipe.sampled] == [0.0, 0.7]
    assert recipe.draft_folder == path.parent / "mine"
    assert recipe.workspace == tmp_path.resolve()


def test_the_documentation_lists_every_key_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    reference = page[page.index("## Recipe") : page.index("## Data")]
    rows = re.findall(r"^\| (`.+?) \| (.*?) \|", reference, re.MULTILINE)
    shown = {key: cell for keys, cell in rows for key in re.findall(r"`([a-z_0-9]+)`", keys)}
    sections = (
        TargetSection,
        PromptsSection,
        ImportedSection,
        ResponsesSection,
        DraftSection,
        TrainingSection,
    )
    fields = {
        key: field
        for section in (*sections, HeldOutSection)
        for key, field in section.model_fields.items()
    }
    assert set(shown) == set(fields)
    for key, field in fields.items():
        numbers = [float(word) for word in re.findall(r"\b[\d.e-]+\b", shown[key])]
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert float(field.default) in numbers, key
        if isinstance(field.default, bool):
            assert str(field.default).lower() in shown[key], key


def test_a_mask_token_is_found_that_no_text_has(
    workspace: Workspace, trained: dict[str, Any]
) -> None:
    target = talking_target(workspace.folder / "target-padded")
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["vocab"][f"w{VOCAB - 2}"]
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"] = [
        {"id": id, "content": f"<{id}>", "normalized": False, **special} for id in (STOP, 3, MASK)
    ]
    path.write_text(json.dumps(tokenizer))
    recipe = workspace.recipe("masked", target=target.name)
    recipe.write_text(recipe.read_text().replace(f"mask_token_id = {MASK}\n", ""))
    train(recipe)
    # 0 ends rows and 3 is in the text.
    config = json.loads((workspace.draft("masked") / "config.json").read_text())
    assert config["mask_token_id"] == MASK


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma4_text"])
def test_features_are_the_hidden_states_of_transformers(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "target"
    if family == "gemma4_text":
        from test_gemma4 import write_gemma4

        write_gemma4(source, final_logit_softcapping=2.0)
    else:
        write_target(source, target_config(family))
    recipe = Recipe.model_validate(
        {
            "target": {"weights": str(source)},
            "engine": {"max_rows": 3, "max_tokens": 400},
            "path": tmp_path / "r.toml",
        }
    )
    taps = (-1, 0, 1)
    with open_weights(source) as weights:
        num_layers = weights.config["num_hidden_layers"]
    layers = context_layer_ids(taps, num_layers)
    folder = build(recipe, output=tmp_path / "engine", context_layer_ids=layers)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, n).tolist() for n in (5, 17, 300, 2, 290)]
    with open_weights(source) as weights:
        engine = open_engine(folder)
        tables = TargetTables.from_weights(weights)
        found = list(EngineFeatures(engine, tables, num_taps=len(taps))(rows))
        engine.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for row, (features, last_hidden) in zip(rows, found, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([row]), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[tap + 1][0] for tap in taps], dim=-1)
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last_hidden, out.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
        logits = capped(last_hidden @ tables.head.T, tables.spec.logit_cap)
        torch.testing.assert_close(logits, out.logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("path", sorted(DRAFTS.glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_that_are_shipped_are_valid(path: Path) -> None:
    """And what is made of a target under other terms than the project's stays out of it."""
    recipe = load_training_recipe(path)
    if recipe.target.license != "Apache-2.0":
        ignored = (DRAFTS.parents[1] / ".gitignore").read_text().splitlines()
        assert f"export/drafts/{path.stem}/" in ignored
