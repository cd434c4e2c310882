"""From a training recipe to a draft, step by step; the same command goes on where one stopped.

target      the engine with the training's taps       `engine/`      kept while it fits the recipe
            or the target in torch                    in memory
responses   the target's answers to the prompts       `responses/`   kept part by part
start       the draft that training starts from       `start/`       written once
training    steps, evaluations, checkpoints           `training/`    kept every few minutes
finish      evaluate, calibrate, describe             the draft folder appears whole or not at all

All but the last are in the work folder, `NAME.training/` beside the recipe `NAME.toml`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dspark_batch.engine import (
    Tokenizer,
    check_replaceable,
    open_engine,
    write_json,
    write_tokenizer,
)
from dspark_batch.errors import OutputLocked, StoppedEarly, UsageError
from dspark_batch.export import Recipe, build
from dspark_batch.job import EngineText, Progress, Stop, difference
from dspark_batch.models.weights import Weights, open_weights
from dspark_batch.training.card import DRAFT_FILES, LOG, Facts, TrainingSummary, write_draft_folder
from dspark_batch.training.checkpoint import CONFIG, WEIGHTS, load_draft, save_draft
from dspark_batch.training.decoder import Decoder
from dspark_batch.training.draft import DSparkDraft
from dspark_batch.training.evaluation import calibrate, evaluation_of, score_sequences
from dspark_batch.training.features import FeatureSource, TargetFeatures
from dspark_batch.training.recipe import TrainingRecipe, load_training_recipe
from dspark_batch.training.responders import JobResponder, Responder, TorchResponder
from dspark_batch.training.responses import Responses, Sequences
from dspark_batch.training.start import check_start, resolved_taps, start_draft
from dspark_batch.training.target import (
    EngineFeatures,
    TargetTables,
    TargetText,
    TorchFeatures,
    context_layer_ids,
)
from dspark_batch.training.trainer import Trainer

_CAPTURE_ROWS = 4  # more would not run faster, and every row reserves cache
_HELD_OUT_SHARE = 0.25  # of the memory for features, at most


def train(
    recipe_path: Path,
    *,
    progress: Progress,
    argv: Sequence[str],
    overwrite: bool = False,
    deadline: float | None = None,
    from_job: Path | None = None,
) -> TrainingSummary:
    """Train the draft of a recipe, or what is left of it, and say what came of it.

    With `from_job`, the output of a finished job, the recipe's draft is tuned on its rows, as
    `NAME-tuned`. With `overwrite` training starts again; the engine and the responses are kept as
    far as the recipe still asks for the same.

    Raises:
        UsageError: the recipe is wrong, or not the one that the work folder was begun with.
        InputError: the prompts or responses cannot be used.
        EngineError: the target, or the draft to start from, cannot be used.
        StoppedEarly: SIGTERM or the deadline; what was trained is kept.
    """
    recipe = load_training_recipe(recipe_path)
    if from_job is not None:
        recipe = recipe.tuned_on(from_job)
    stop = Stop(deadline=deadline, clock=time.monotonic)
    end = None if deadline is None else time.monotonic() + deadline
    with stop.on_sigterm(), _locked(recipe):
        work = _Training(
            recipe, progress=progress, argv=argv, stop=stop, end=end, overwrite=overwrite
        )
        return work.run()


@contextmanager
def _locked(recipe: TrainingRecipe) -> Iterator[None]:
    folder = recipe.work_folder
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputLocked(f"another process trains in {folder}") from None
    try:
        yield
    finally:
        lock.release()
        if is_new and [path.name for path in folder.iterdir()] in ([], ["lock"]):
            shutil.rmtree(folder)


@dataclass(frozen=True, slots=True)
class _OpenTarget:
    """What a training asks of its target, and the folder with its tokenizer."""

    text: EngineText
    text_folder: Path
    respond: Responder
    features: TargetFeatures


@dataclass(frozen=True, slots=True)
class _Files:
    """The names in a work folder."""

    folder: Path

    @property
    def settings(self) -> Path:
        return self.folder / "recipe.json"

    @property
    def engine(self) -> Path:
        return self.folder / "engine"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def training(self) -> Path:
        return self.folder / "training"

    @property
    def finished(self) -> Path:
        return self.folder / "finished.json"


class _Training:
    """One training; the steps in their order."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        *,
        progress: Progress,
        argv: Sequence[str],
        stop: Stop,
        end: float | None,
        overwrite: bool,
    ) -> None:
        self._recipe, self._progress, self._argv = recipe, progress, argv
        self._stop, self._end, self._overwrite = stop, end, overwrite
        self._files = _Files(recipe.work_folder)
        self._options = recipe.training.options
        self._device = _device(recipe.training.device)
        self._in_torch = recipe.target.runtime == "torch" or (
            recipe.target.runtime == "auto" and self._device.type == "cuda"
        )

    def run(self) -> TrainingSummary:
        """Every step that is not done yet."""
        self._begin()
        if self._files.finished.exists() and (self._recipe.draft_folder / WEIGHTS).exists():
            values = json.loads(self._files.finished.read_text())
            self._progress.phase(f"{self._recipe.draft_folder} is trained; --overwrite trains anew")
            return TrainingSummary.from_json(values)
        with open_weights(self._recipe.target_source) as weights:
            taps, tables = resolved_taps(self._recipe, weights), TargetTables.from_weights(weights)
            if not self._has_started:
                check_start(self._recipe, weights, tables)
            with self._open_target(weights, tables, taps) as target:
                responses = Responses(
                    self._recipe,
                    target.text,
                    target.respond,
                    progress=self._progress,
                    overwrite=self._overwrite,
                )
                sequences = responses.sequences()
                if not self._has_started:
                    self._progress.phase("making the draft to start from")
                    draft = start_draft(
                        self._recipe, weights, tables, sequences, text_folder=target.text_folder
                    )
                    save_draft(draft, self._files.start, dtype=torch.float32)
                return self._train(weights, target.features, tables, sequences)

    @property
    def _has_started(self) -> bool:
        return (self._files.start / CONFIG).exists()

    def _begin(self) -> None:
        """Check that the work folder is this recipe's; empty it where training starts again."""
        files, draft_folder = self._files, self._recipe.draft_folder
        self._recipe.check_files()
        settings = {key: json.dumps(value) for key, value in self._recipe.settings().items()}
        settings["target.runtime"] = json.dumps("torch" if self._in_torch else "engine")
        if self._overwrite:
            check_replaceable(draft_folder, DRAFT_FILES, mark=LOG)  # before hours of work
            files.finished.unlink(missing_ok=True)
            for path in (files.start, files.training):
                shutil.rmtree(path, ignore_errors=True)
        elif not files.settings.exists() and draft_folder.exists():
            raise UsageError(
                f"{draft_folder} holds a draft that was not trained here",
                hint="rename the recipe, or move the draft away; --overwrite replaces it if "
                "dspark-batch trained it",
            )
        # Before there is a draft, what is kept of a changed recipe is checked by its own steps.
        if files.start.exists():
            changed = difference(json.loads(files.settings.read_text()), settings)
            if changed:
                raise UsageError(
                    f"{self._recipe.path} is not the recipe that {files.folder} was begun with: "
                    f"{changed}",
                    hint="change it back, rename it, or start again with --overwrite",
                )
        else:
            write_json(files.settings, settings)

    @contextmanager
    def _open_target(
        self, weights: Weights, tables: TargetTables, taps: Sequence[int]
    ) -> Iterator[_OpenTarget]:
        if self._in_torch:
            yield self._torch_target(weights, tables, taps)
            return
        self._build_engine(taps, num_layers=tables.spec.num_layers)
        with closing(open_engine(self._files.engine, max_rows=_CAPTURE_ROWS)) as engine:
            respond = JobResponder(
                self._files.engine,
                progress=self._progress,
                argv=self._argv,
                end=self._end,
                overwrite=self._overwrite,
            )
            features = EngineFeatures(engine, tables, num_taps=len(taps))
            yield _OpenTarget(engine, self._files.engine, respond, features)

    def _build_engine(self, taps: Sequence[int], *, num_layers: int) -> None:
        target = self._recipe.target
        recipe = Recipe.model_validate(
            {
                "target": {"weights": self._recipe.target_source, "license": target.license},
                "draft": None,
                "engine": {
                    "precision": target.precision,
                    "max_rows": target.max_rows,
                    "max_tokens": target.max_tokens,
                },
                "path": self._recipe.path,
            }
        )
        build(
            recipe,
            output=self._files.engine,
            progress=self._progress.phase,
            context_layer_ids=context_layer_ids(taps, num_layers),
        )

    def _torch_target(
        self, weights: Weights, tables: TargetTables, taps: Sequence[int]
    ) -> _OpenTarget:
        self._progress.phase(f"loading the target to {self._device}")
        folder = self._files.tokenizer
        folder.mkdir(exist_ok=True)
        write_tokenizer(weights, folder)
        text = TargetText(
            Tokenizer.open(folder) if Tokenizer.present(folder) else None,
            self._recipe.target.max_tokens,
            tables.spec.vocab_size,
        )
        decoder = Decoder(tables.spec, weights.tensor, device=self._device, dtype=self._dtype)
        respond = TorchResponder(
            decoder,
            weights,
            num_bytes=round(self._recipe.training.memory_gb * 1e9),
            progress=self._progress,
            check=self._check_stop,
            overwrite=self._overwrite,
        )
        return _OpenTarget(text, folder, respond, TorchFeatures(decoder, taps))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._options.bf16 else torch.float32

    def _train(
        self,
        weights: Weights,
        features: TargetFeatures,
        tables: TargetTables,
        sequences: Sequences,
    ) -> TrainingSummary:
        dtype = self._dtype
        limit = round(self._recipe.training.memory_gb * 1e9)
        held_limit = round(limit * _HELD_OUT_SHARE)
        held_out = FeatureSource(
            features, sequences.held_out, max_bytes=held_limit, dtype=dtype, device=self._device
        )
        source = FeatureSource(
            features,
            sequences.training,
            max_bytes=limit - held_limit,
            dtype=dtype,
            device=self._device,
        )
        draft = self._load(self._files.start, tables)
        draft.dropout.p = self._recipe.training.dropout
        trainer = Trainer(
            draft,
            source,
            options=self._options,
            folder=self._files.training,
            held_out=held_out,
            report=self._progress.update,
        )
        words = f"{len(source):,} responses on {self._device}"
        self._progress.phase(f"training on {words}")
        trainer.run(stopped=lambda: self._stop.reason is not None)
        if trainer.progress < 1.0:
            raise self._stopped_early(f"at step {trainer.step:,} ({trainer.progress:.0%})")
        self._progress.phase("evaluating and calibrating")
        best = self._load(self._files.training / "export", tables)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._options.bf16):
            scores = score_sequences(best, held_out, seed=self._options.seed)
        facts = Facts.gather(
            self._recipe,
            weights,
            sequences,
            best,
            log=self._files.training / "log.jsonl",
            num_steps=trainer.step,
            seconds=trainer.seconds,
            device=str(self._device),
            features=self._features_words(),
            evaluation=evaluation_of(scores),
            by_source={
                name: evaluation_of([scores[index] for index in indices])
                for name, indices in _by_source(sequences).items()
            },
            temperatures=calibrate(scores),
        )
        summary = write_draft_folder(
            self._recipe, facts, draft=best, log=self._files.training / "log.jsonl"
        )
        write_json(self._files.finished, summary.to_json())
        return summary

    def _features_words(self) -> str:
        if self._in_torch:
            return f"the target in torch, {'bf16' if self._options.bf16 else 'fp32'}"
        return f"the {self._recipe.target.precision} engine"

    def _load(self, folder: Path, tables: TargetTables) -> DSparkDraft:
        draft = load_draft(folder, embed_tokens=tables.embed, lm_head=tables.head)
        return draft.to(self._device)

    def _check_stop(self) -> None:
        if self._stop.reason is not None:
            raise self._stopped_early("while responses were generated")

    def _stopped_early(self, where: str) -> StoppedEarly:
        words = [word for word in self._argv if word != "--overwrite"]
        again = shlex.join(["dspark-batch", *words])
        return StoppedEarly(
            f"stopped early for {self._stop.reason} {where}; continue with: {again}"
        )


def _by_source(sequences: Sequences) -> dict[str, list[int]]:
    """Held-out sequences by where they come from; empty where there is one source only."""
    found: dict[str, list[int]] = {}
    for index, sequence in enumerate(sequences.held_out):
        found.setdefault(sequence.source, []).append(index)
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"[training] device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"[training] device {name!r}: torch finds no CUDA device here")
    return device
