"""Training recipes: what a draft is trained on, and how (`export/drafts/*.toml`).

`export/drafts/NAME.toml` makes the draft `export/drafts/NAME/`, and keeps what it needs on the way
in `export/drafts/NAME.training/`. Unknown keys are errors with a suggestion. Paths are relative to
the workspace (the folder that holds `export/`), or to the recipe's own folder.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark_batch.decode import SamplingParams
from dspark_batch.errors import InputError, UsageError
from dspark_batch.export import RECIPE_FOLDER, read_sections
from dspark_batch.job import invalid_params, read_finished_job
from dspark_batch.models.weights import PACKAGE_PREFIX
from dspark_batch.training.losses import LossWeights
from dspark_batch.training.options import TrainingOptions

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Files = Annotated[tuple[Text, ...], Field(strict=False)]

_OPTIONS = TrainingOptions(num_steps=1)
_LOSS = LossWeights()
_DEFAULT_SECONDS = 3600.0


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TargetSection(_Section):
    """`[target]`: the model that the draft is for, as it will be served."""

    weights: Text
    """A GGUF file, a Hugging Face folder or `package:DISTRIBUTION/path`."""
    license: str | None = None
    precision: Literal["fp32", "int8"] = "int8"
    """Of the engine that the draft will serve in: its features are what the draft sees."""
    runtime: Literal["auto", "engine", "torch"] = "auto"
    """What runs the target: that engine, or torch on the training's device; `auto`: torch on
    CUDA."""
    max_rows: Count = 32
    """Rows that the engine generates at a time."""
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """Prompt and response of one row."""


class _Rows(_Section):
    """Parquet files and the columns to read, as `run` has them."""

    files: Files
    """Files, folders or glob patterns."""
    prompt_column: str | None = None
    messages_column: str | None = None
    token_ids_column: str | None = None
    chat_template: bool = True
    system: str | None = None
    source_column: str | None = None
    """Names where a row comes from; results are given by source as well."""
    limit: Count | None = None
    """Rows read of each entry of `files`."""


class PromptsSection(_Rows):
    """`[prompts]`: what the target responds to."""

    files: Files = ()
    self_written: Annotated[int, Field(ge=0)] = 0
    """User turns that the target writes itself; unfinished and repeated ones are dropped."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.files and not self.self_written:
            raise ValueError("give files, self_written, or both")
        return self


class ImportedSection(_Rows):
    """`[[imported]]`: prompts with the target's responses, as `run` writes them."""

    output_column: Text = "output_token_ids"
    """Token ids of the response, or its text."""
    finish_column: str | None = None
    """Says `stop` where the target ended a text itself, which does not show its stop token."""


class ResponsesSection(_Section):
    """`[[responses]]`: one way to sample responses; every prompt gets `samples` of them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    samples: Count = 1
    max_new_tokens: Count = 256
    seed: int = 0

    def params(self, sample: int = 0) -> SamplingParams:
        """What decoding takes, for the given one of the samples."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed + sample,
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = invalid_params(self.params())
        if problem:
            raise ValueError(problem)
        if not self.temperature and self.samples > 1:
            raise ValueError("greedy responses are all the same: samples must be 1")
        return self


class DraftSection(_Section):
    """`[draft]`: the network. None means: from the target, or from the draft it starts from."""

    layers: Count | None = None
    block_size: Count | None = None
    taps: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Target layers whose outputs the draft reads; -1 is the embedding."""
    markov_head: Literal["vanilla", "gated", "rnn", "none"] | None = None
    """`none` is DFlash."""
    markov_rank: Count | None = None
    confidence_head: bool | None = None
    confidence_with_markov: bool | None = None
    vocab_size: Count | Literal["full"] | None = None
    """Most frequent ids of the responses that the draft can propose."""
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    intermediate_size: Count | None = None


class TrainingSection(_Section):
    """`[training]`: how long, how, and from where."""

    steps: Count | None = None
    seconds: Positive | None = None
    batch_size: Count = _OPTIONS.batch_size
    anchors: Count = 64
    """Blocks per sequence and step."""
    lookup_weight: Annotated[float, Field(gt=0, le=1)] = _OPTIONS.lookup_weight
    """How likely an anchor is drawn where prompt lookup would propose, against others."""
    passes: Count = 4
    """Times that captured sequences are trained on, with fresh anchors, before they are dropped."""
    memory_gb: Positive = 2.0
    """Captured features held at a time, in 10^9 bytes."""
    learning_rate: Positive = _OPTIONS.learning_rate
    warmup_share: Share = _OPTIONS.warmup_share
    max_grad_norm: Positive = _OPTIONS.max_grad_norm
    cross_entropy: Annotated[float, Field(ge=0)] = _LOSS.cross_entropy
    l1: Annotated[float, Field(ge=0)] = _LOSS.l1
    lk: Annotated[float, Field(ge=0)] = _LOSS.lk
    confidence: Annotated[float, Field(ge=0)] = _LOSS.confidence
    decay: Positive = _LOSS.decay
    dropout: Share = 0.0
    ema_decay: Share = 0.995
    """0 keeps no average."""
    seed: int = _OPTIONS.seed
    bf16: bool = True
    compile: bool = False
    device: Text = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where torch finds it."""
    start: Text = "target"
    """`target`: its last layers; `random`; or the folder of a draft."""
    log_every: Count = _OPTIONS.log_every
    checkpoint_seconds: Positive = _OPTIONS.checkpoint_seconds
    evaluate_seconds: Positive = _OPTIONS.evaluate_seconds

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("give steps or seconds, not both")
        return self

    @property
    def options(self) -> TrainingOptions:
        """What the trainer takes."""
        seconds = self.seconds
        if self.steps is None and seconds is None:
            seconds = _DEFAULT_SECONDS
        return TrainingOptions(
            num_steps=self.steps,
            seconds=seconds,
            batch_size=self.batch_size,
            num_anchors=self.anchors,
            lookup_weight=self.lookup_weight,
            num_passes=self.passes,
            learning_rate=self.learning_rate,
            warmup_share=self.warmup_share,
            max_grad_norm=self.max_grad_norm,
            loss=LossWeights(self.cross_entropy, self.l1, self.confidence, self.decay, self.lk),
            bf16=self.bf16,
            compile=self.compile,
            ema_decay=self.ema_decay or None,
            seed=self.seed,
            log_every=self.log_every,
            checkpoint_seconds=self.checkpoint_seconds,
            evaluate_seconds=self.evaluate_seconds,
        )


class HeldOutSection(_Section):
    """`[held_out]`: prompts that are never trained on; `files` as for `[[imported]]`."""

    count: Count | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_new_tokens: Count = 256
    """Of the greedy responses that are generated for them."""
    files: Files = ()
    prompts: Files = ()
    """Files of prompts, which get greedy responses."""
    prompt_column: str | None = None
    messages_column: str | None = None
    token_ids_column: str | None = None
    chat_template: bool = True
    system: str | None = None
    source_column: str | None = None
    limit: Count | None = None
    output_column: Text = "output_token_ids"
    finish_column: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(bool(given) for given in (self.count, self.share, self.files, self.prompts)) > 1:
            raise ValueError("give one of count, share, files and prompts")
        return self

    @property
    def imported(self) -> ImportedSection | None:
        """The held-out responses that are there already."""
        if not self.files:
            return None
        own = {"count", "share", "prompts", "max_new_tokens"}
        return ImportedSection(**self.model_dump(exclude=own))

    @property
    def prompted(self) -> PromptsSection | None:
        """The held-out prompts that responses are generated for, if they are in files."""
        if not self.prompts:
            return None
        own = {"count", "share", "files", "prompts", "max_new_tokens"}
        own |= {"output_column", "finish_column"}
        return PromptsSection(files=self.prompts, **self.model_dump(exclude=own))

    def number(self, num_prompts: int) -> int:
        """How many of `num_prompts` are held out."""
        if self.share is not None:
            return max(1, round(self.share * num_prompts))
        return self.count or min(64, max(1, num_prompts // 10))


class TrainingRecipe(_Section):
    """One training recipe."""

    target: TargetSection
    prompts: PromptsSection | None = None
    responses: Annotated[tuple[ResponsesSection, ...], Field(strict=False)] = ()
    imported: Annotated[tuple[ImportedSection, ...], Field(strict=False)] = ()
    draft: DraftSection = DraftSection()
    training: TrainingSection = TrainingSection()
    held_out: HeldOutSection = HeldOutSection()
    path: Path = Field(exclude=True)
    """The file it was read from; no key of it."""
    variant: str = Field("", exclude=True)
    """Behind the names of its folders; no key either."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompts is None and self.responses:
            raise ValueError("[[responses]] needs [prompts] to respond to")
        return self

    @property
    def sampled(self) -> tuple[ResponsesSection, ...]:
        """The ways to sample responses; by default a greedy one and one at temperature 0.7."""
        if self.prompts is None:
            return ()
        return self.responses or (ResponsesSection(), ResponsesSection(temperature=0.7))

    @property
    def draft_folder(self) -> Path:
        """Where the draft goes."""
        return self.path.with_name(f"{self.path.stem}{self.variant}")

    @property
    def work_folder(self) -> Path:
        """Where everything on the way to it is kept."""
        return self.path.with_name(f"{self.path.stem}{self.variant}.training")

    @property
    def workspace(self) -> Path:
        """The folder that holds `export/`; the recipe's own where there is none."""
        folder = self.path.resolve().parent
        names = [parent.name for parent in (folder, *folder.parents)]
        if RECIPE_FOLDER in names:
            return folder.parents[names.index(RECIPE_FOLDER)]
        return folder

    @property
    def target_source(self) -> str:
        """What to give to `open_weights`."""
        if self.target.weights.startswith(PACKAGE_PREFIX):
            return self.target.weights
        return str(self.find(self.target.weights, "[target] weights"))

    @property
    def start_folder(self) -> Path | None:
        """The draft to start from, if it is one."""
        if self.training.start in ("target", "random"):
            return None
        return self.find(self.training.start, "[training] start")

    def find(self, name: str, key: str) -> Path:
        """An existing path of the recipe. Raises `UsageError`."""
        found = [path for path in self._candidates(name) if path.exists()]
        if not found:
            looked = " and ".join(map(str, self._candidates(name)))
            raise UsageError(f"{self.path}: {key} is not there; looked for {looked}")
        return found[0]

    def find_files(self, pattern: str, key: str) -> str:
        """A path or glob pattern under which there are files. Raises `InputError`."""
        candidates = [str(path) for path in self._candidates(pattern)]
        for candidate in candidates:
            if Path(candidate).exists() or glob.glob(candidate, recursive=True):
                return candidate
        raise InputError(f"{self.path}: {key}: no file {' and none '.join(candidates)}")

    def tuned_on(self, output: Path) -> TrainingRecipe:
        """The recipe that trains this one's draft on the rows of a finished job, as `NAME-tuned`.

        Raises `UsageError` where `output` is not that of a finished job.
        """
        job = read_finished_job(output)
        ids = job.token_ids
        imported = ImportedSection(
            files=(str(output.resolve() / "data"),),
            prompt_column=job.prompt_column,
            messages_column=job.messages_column,
            token_ids_column=job.token_ids_column,
            chat_template=job.chat_template,
            system=job.system,
            output_column=f"{job.output_prefix}{'output_token_ids' if ids else 'completion'}",
            # A stop string ends a text too, and then there is no token that did.
            finish_column=None if ids or job.stop else f"{job.output_prefix}finish_reason",
        )
        start = self.training.start
        if self.draft_folder.exists():
            start = str(self.draft_folder.resolve())
        return self.model_copy(
            update={
                "prompts": None,
                "responses": (),
                "imported": (imported,),
                "training": self.training.model_copy(update={"start": start}),
                "variant": "-tuned",
            }
        )

    def check_files(self) -> None:
        """Raise for the first file or folder that is not there, and where there is no data."""
        if self.prompts is None and not self.imported:
            raise UsageError(
                f"{self.path}: [prompts] or [[imported]] must say what to train on",
                hint=f"or give the output of a job: dspark-batch train {self.path} --from-job "
                "jobs/prompts.completions",
            )
        assert self.target_source
        _ = self.start_folder
        for key, section in (
            ("prompts", self.prompts),
            ("held_out", self.held_out),
            *(("imported", section) for section in self.imported),
        ):
            for pattern in section.files if section is not None else ():
                self.find_files(pattern, f"[{key}] files")
        for pattern in self.held_out.prompts:
            self.find_files(pattern, "[held_out] prompts")

    def _candidates(self, name: str) -> list[Path]:
        bases = dict.fromkeys([self.workspace, self.path.resolve().parent])
        return [base / Path(name).expanduser() for base in bases]

    def settings(self) -> dict[str, object]:
        """Every key that decides what comes out, as `section.key` -> plain value."""
        flat: dict[str, object] = {}
        for section, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                flat |= {f"{section}.{key}": item for key, item in value.items()}
            else:
                flat[section] = value
        return {key: value for key, value in flat.items() if key not in _FREE}


_FREE = {
    *("target.license", "target.max_rows", "training.device", "training.log_every"),
    *("training.checkpoint_seconds", "training.evaluate_seconds"),
}
"""Keys that may change while a training is under way."""


def load_training_recipe(path: Path) -> TrainingRecipe:
    """Read a training recipe; `UsageError` names the file and every wrong key."""
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.glob("*.toml"))) or "none"
        raise UsageError(
            f"there is no training recipe {path}", hint=f"recipes in {path.parent}/: {there}"
        )
    return read_sections(path, TrainingRecipe)
