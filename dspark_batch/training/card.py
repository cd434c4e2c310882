"""The result of a training: the draft's folder with its model card, and the summary."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dspark_batch import __version__
from dspark_batch.engine import replace_folder
from dspark_batch.errors import UsageError
from dspark_batch.export import RECIPE_FOLDER, load_recipe
from dspark_batch.job import duration
from dspark_batch.models.weights import Weights
from dspark_batch.training.checkpoint import CONFIG, WEIGHTS, save_draft
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.evaluation import Evaluation
from dspark_batch.training.recipe import TrainingRecipe
from dspark_batch.training.responses import Sequences

CARD, LOG, ENGINE_RECIPE = "README.md", "training.jsonl", "engine.toml"
DRAFT_FILES = frozenset([CARD, CONFIG, WEIGHTS, LOG, ENGINE_RECIPE])


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the card says."""

    target: str
    license: str | None
    mask_token: str
    num_responses: int
    num_response_tokens: int
    num_held_out: int
    coverage: float
    """Share of held-out response tokens that the draft has an id for."""
    num_steps: int
    seconds: float
    device: str
    features: str
    """Where they came from, in words."""
    history: tuple[tuple[int, float, float], ...]
    """Step, loss and greedy τ of every evaluation."""
    evaluation: Evaluation
    by_source: dict[str, Evaluation]
    temperatures: tuple[float, ...] | None

    @classmethod
    def gather(
        cls,
        recipe: TrainingRecipe,
        weights: Weights,
        sequences: Sequences,
        draft: DSparkDraft,
        *,
        log: Path,
        num_steps: int,
        seconds: float,
        device: str,
        features: str,
        evaluation: Evaluation,
        by_source: dict[str, Evaluation],
        temperatures: NDArray[np.float64] | None,
    ) -> Self:
        """Count what is in the data and read the log."""
        known = set(draft.draft_vocab.tolist())
        responses = [s.token_ids[s.num_prompt_tokens :] for s in sequences.held_out]
        covered = sum(token in known for ids in responses for token in ids)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        return cls(
            target=_portable(recipe.target.weights),
            license=recipe.target.license,
            mask_token=str(draft.config.mask_token_id),
            num_responses=len(sequences.training),
            num_response_tokens=sum(s.num_response_tokens for s in sequences.training),
            num_held_out=len(sequences.held_out),
            coverage=covered / sum(map(len, responses)),
            num_steps=num_steps,
            seconds=seconds,
            device=device,
            features=features,
            history=tuple(
                (event["step"], event["loss"], event["tau_greedy"])
                for event in events
                if event["event"] == "evaluation"
            ),
            evaluation=evaluation,
            by_source=by_source,
            temperatures=None if temperatures is None else tuple(map(float, temperatures)),
        )


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """The end of a training."""

    draft: Path
    num_responses: int
    num_response_tokens: int
    num_held_out: int
    num_steps: int
    seconds: float
    tau_greedy: float
    tau_sampled: float
    tau_at_start: float
    survival: tuple[float, ...]
    next_command: str
    tau_by_source: dict[str, float] = field(default_factory=dict)
    """Greedy; empty where there is one source only."""

    def lines(self) -> list[str]:
        """Lines of text for a terminal."""
        slots = ", ".join(f"{k}: {share:.0%}" for k, share in enumerate(self.survival, start=1))
        return [
            f"data      {self.num_responses:,} responses, {self.num_response_tokens:,} tokens; "
            f"{self.num_held_out:,} held out",
            f"trained   {self.num_steps:,} steps in {duration(self.seconds)}",
            f"accepted  length {self.tau_greedy:.2f} greedy ({self.tau_at_start:.2f} at the "
            f"start), {self.tau_sampled:.2f} sampled",
            f"          by position {slots}",
            f"draft     {self.draft}",
            f"next      {self.next_command}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        return {**asdict(self), "draft": str(self.draft)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(**{**values, "draft": Path(values["draft"])})


def write_draft_folder(
    recipe: TrainingRecipe, facts: Facts, *, draft: DSparkDraft, log: Path
) -> TrainingSummary:
    """Write checkpoint, card and log; the folder appears whole or not at all."""
    folder = recipe.draft_folder
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    save_draft(draft, scratch, temperatures=facts.temperatures)
    shutil.copyfile(log, scratch / LOG)
    command = _engine_command(recipe, scratch)
    num_bytes = (scratch / WEIGHTS).stat().st_size
    (scratch / CARD).write_text("\n".join(_card(recipe, facts, draft, num_bytes)) + "\n")
    replace_folder(folder, scratch, DRAFT_FILES, mark=LOG)
    return TrainingSummary(
        draft=folder,
        num_responses=facts.num_responses,
        num_response_tokens=facts.num_response_tokens,
        num_held_out=facts.num_held_out,
        num_steps=facts.num_steps,
        seconds=facts.seconds,
        tau_greedy=facts.evaluation.tau_greedy,
        tau_sampled=facts.evaluation.tau_probabilistic,
        tau_at_start=facts.history[0][2],
        survival=facts.evaluation.survival,
        next_command=command,
        tau_by_source={name: found.tau_greedy for name, found in facts.by_source.items()},
    )


def _engine_command(recipe: TrainingRecipe, scratch: Path) -> str:
    """What to type next: the export of a recipe that names this draft, written if there is none."""
    for path in sorted((recipe.workspace / RECIPE_FOLDER).glob("*.toml")):
        with suppress(UsageError):  # a wrong recipe is reported where it is used
            draft = load_recipe(str(path)).draft
            if draft is None or draft.weights is None:
                continue
            if (recipe.workspace / draft.weights).resolve() == recipe.draft_folder.resolve():
                return f"dspark-batch export {path.stem}"
    weights = recipe.target.weights
    if recipe.target_source != weights:  # a path: as seen from the draft's folder
        weights = os.path.relpath(recipe.target_source, recipe.draft_folder.resolve())
    license = f'license = "{recipe.target.license}"\n' if recipe.target.license else ""
    (scratch / ENGINE_RECIPE).write_text(
        f'[target]\nweights = "{weights}"\n{license}\n[draft]\nweights = "."\n\n[engine]\n'
        f'precision = "{recipe.target.precision}"\nmax_rows = {recipe.target.max_rows}\n'
        f"max_tokens = {recipe.target.max_tokens}\n"
    )
    name = recipe.draft_folder.name
    return f"dspark-batch export {recipe.draft_folder / ENGINE_RECIPE} -o engines/{name}"


def _card(recipe: TrainingRecipe, facts: Facts, draft: DSparkDraft, num_bytes: int) -> list[str]:
    config, training = draft.config, recipe.training
    num_target_layers = config.num_target_layers
    assert num_target_layers is not None
    head = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none"
    confidence = "none"
    if config.enable_confidence_head:
        confidence = "with the Markov feature" if config.uses_markov_confidence else "plain"
    vocabulary = f"{config.num_draft_ids:,} of the target's {config.vocab_size:,} ids"
    license = f" Licence of the target: {facts.license}." if facts.license else ""
    norms = ", per-head q/k norms" if config.qk_norm else ""
    return [
        f"# DSpark draft {recipe.draft_folder.name}",
        "",
        f"A draft of block size {config.block_size} for the target `{facts.target}`, in the "
        f"published DeepSpec layout, fp16, {num_bytes / 1e6:,.1f} MB.{license} Written by "
        f"dspark-batch {__version__} from the recipe `{recipe.path.name}`.",
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {config.num_hidden_layers} layers, d {config.hidden_size}, "
        f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}, "
        f"FFN {config.intermediate_size}{norms} |",
        f"| context | outputs of target layers {_listed(config.target_layer_ids)} of "
        f"0 … {num_target_layers - 1} |",
        f"| Markov head | {head} |",
        f"| confidence head | {confidence} |",
        f"| draft vocabulary | {vocabulary}; {facts.coverage:.1%} of the held-out responses |",
        f"| mask token | {facts.mask_token} |",
        "| not in the file | embedding and head: they are the target's |",
        "",
        "## Training",
        "",
        f"- Data: {facts.num_responses:,} responses, {facts.num_response_tokens:,} tokens; "
        f"{facts.num_held_out:,} held out. {_data(recipe)}",
        f"- Start: {_portable(training.start)}. Features: {facts.features}.",
        f"- {facts.num_steps:,} steps of {training.batch_size} sequences with up to "
        f"{training.anchors} blocks each, {duration(facts.seconds)} on {facts.device}; AdamW, peak "
        f"learning rate {training.learning_rate:g}, cosine, gradient clip "
        f"{training.max_grad_norm:g}, {'bf16 autocast' if training.bf16 else 'fp32'}, "
        f"average {training.ema_decay:g}, dropout {training.dropout:g}, seed {training.seed}.",
        f"- Loss: {training.cross_entropy:g} cross-entropy + {training.l1:g} L1 + "
        f"{training.lk:g} LK + {training.confidence:g} confidence, slots weighted by "
        f"exp(-k/{training.decay:g}). Anchors where a lookup would propose: "
        f"{training.lookup_weight:g} of the others' chance.",
        "",
        "Of the checkpoints, this is the one with the highest greedy τ on the held-out responses:",
        "",
        "| step | loss, published mixture | τ greedy |",
        "|---|---|---|",
        *(f"| {step:,} | {loss:.3f} | {tau:.2f} |" for step, loss, tau in facts.history),
        "",
        "## On the held-out responses",
        "",
        "τ counts the bonus token. Sampled: teacher-forced at temperature 1 along the same text.",
        "",
        "| | τ greedy | τ sampled | accepted up to position 1, 2, … (greedy) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {found.tau_greedy:.2f} | {found.tau_probabilistic:.2f} | "
            f"{', '.join(f'{share:.0%}' for share in found.survival)} |"
            for name, found in {"all": facts.evaluation, **facts.by_source}.items()
        ),
        "",
        *_calibration(facts),
    ]


def _data(recipe: TrainingRecipe) -> str:
    ways = [
        f"{way.samples} at temperature {way.temperature:g}" if way.temperature else "1 greedy"
        for way in recipe.sampled
    ]
    parts = [f"Responses to each prompt: {', '.join(ways)}."] if ways else []
    if recipe.imported:
        parts.append("Some were imported." if ways else "All were imported.")
    return " ".join(parts)


def _calibration(facts: Facts) -> list[str]:
    if facts.temperatures is None:
        return ["No confidence head, so nothing to calibrate."]
    listed = ", ".join(f"{value:.2f}" for value in facts.temperatures)
    return [f"Temperatures of the confidence, fitted on the greedy rounds: {listed}."]


def _portable(source: str) -> str:
    """A source without the folders of this machine."""
    return Path(source).name if Path(source).is_absolute() else source


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
