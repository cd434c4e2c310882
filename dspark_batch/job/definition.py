"""A job: which prompts, how to generate, where to write. A TOML file, options of `run`, or both.

`Job` is the one place with the defaults; `cli` makes an option of every field. In a job file the
paths `input`, `output` and `engine` are relative to the file.
"""

from __future__ import annotations

import glob
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspark_batch.decode import CONFIDENCE_THRESHOLD, SamplingParams
from dspark_batch.errors import InputError, StorageError, UsageError, did_you_mean

_DEFAULTS = SamplingParams()
_OPTIONS = "the options"
_MAX_SEED = 2**63 - 1  # the output column `seed` is int64

RESULT_FIELDS = (
    "chat_template",
    "system",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "token_ids",
    "output_prefix",
)
"""Settings that decide what the output holds. A run continues only where they are unchanged.

So must the prompt column be, and `limit` and `part_rows` as far as they change which rows a part
has. Everything else may differ from one run to the next.
"""


class Job(BaseModel):
    """What to run. Invariant: every value is valid by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = Field(description="A Parquet file, a folder of them, or a glob pattern.")
    output: Path | None = Field(
        None, description="Folder to write.  [default: INPUT.completions, beside the input]"
    )
    engine: Path = Field(Path("engines/model"), description="Engine folder, built by export.")
    prompt_column: str | None = Field(None, description="Column that holds the prompt as text.")
    messages_column: str | None = Field(None, description="Column that holds chat messages.")
    token_ids_column: str | None = Field(
        None, description="Column that holds prompts as token ids."
    )
    chat_template: bool = Field(
        True, description="Apply the model's chat template to text prompts."
    )
    system: str | None = Field(None, description="System message for every prompt that has none.")
    max_new_tokens: int = Field(_DEFAULTS.max_new_tokens, description="Most new tokens per row.")
    temperature: float = Field(_DEFAULTS.temperature, description="0 is greedy decoding.")
    top_p: float = Field(
        _DEFAULTS.top_p, description="Sample from the tokens that make up this probability."
    )
    top_k: int = Field(_DEFAULTS.top_k, description="Sample from this many tokens; 0 is all.")
    seed: int = Field(
        _DEFAULTS.seed, description="Seed of the job; each row draws from it and its index."
    )
    stop: tuple[str, ...] = Field(_DEFAULTS.stop, description="End the text before this string.")
    spec: Literal["auto", "on", "off"] = Field(
        "auto", description="Speculative decoding: where it pays, always, or never."
    )
    scheduler: Literal["early-stop", "async", "threshold", "whole"] | None = Field(
        None,
        description="How much of a draft to verify.  [default: early-stop; whole with --spec on]",
    )
    confidence_threshold: float = Field(
        CONFIDENCE_THRESHOLD,
        ge=0,
        le=1,
        description="Verify no further than this confidence, with --scheduler threshold.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Rows at a time, per worker.  [default: the engine's limit]"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to run; auto is the GPU if the engine can use one."
    )
    workers: int | None = Field(
        None, ge=1, description="Processes that decode.  [default: one per GPU, else 1]"
    )
    part_rows: int = Field(1024, ge=1, description="Most rows per output file.")
    limit: int | None = Field(None, ge=1, description="Read only the first N rows.")
    token_ids: bool = Field(False, description="Also write the column output_token_ids.")
    output_prefix: str = Field("", description="Prefix of our output columns.")
    max_error_rate: float = Field(
        0.1, ge=0, le=1, description="Exit with 4 if more than this share of rows failed."
    )
    deadline: float | None = Field(None, gt=0, description="Start no row after this many seconds.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = invalid_params(self.params)
        if problem:
            raise ValueError(problem)
        if "confidence_threshold" in self.model_fields_set and self.scheduler != "threshold":
            raise ValueError("confidence_threshold goes with scheduler = threshold only")
        return self

    @property
    def needs_costs(self) -> bool:
        """Whether its schedule weighs what passes cost."""
        weighs = self.spec == "auto" or self.scheduler in ("early-stop", "async")
        return weighs and self.spec != "off"

    @property
    def params(self) -> SamplingParams:
        """The sampling values of a row that overrides none (but for its seed)."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
        )

    @property
    def output_folder(self) -> Path:
        """`output`, or the input's name with `.completions`. Raises `UsageError` for a glob."""
        if self.output is not None:
            return self.output
        source = Path(self.input)
        if not source.exists() and glob.has_magic(self.input):
            raise UsageError(
                f"there is no default output for the pattern {self.input}", hint="add -o FOLDER"
            )
        if source.suffix == ".parquet" and not source.is_dir():
            return source.with_suffix(".completions")
        folder = source.resolve()
        return folder.with_name(f"{folder.name}.completions")


def load_job(source: str, flags: Mapping[str, object]) -> Job:
    """The job of `run SOURCE`: `source` is a job file (`.toml`) or the input; flags win.

    Raises `UsageError` for an unknown key or a bad value, `InputError` for a missing job file.
    """
    if not source.endswith(".toml"):
        return _job({"input": source}, flags=flags, source=_OPTIONS)
    path = Path(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no job file {path}") from None
    except OSError as exc:
        raise StorageError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    for key in ("input", "output", "engine"):
        if isinstance(values.get(key), str):
            values[key] = str(path.parent / values[key])
    return _job(values, flags=flags, source=source)


def _job(values: Mapping[str, object], *, flags: Mapping[str, object], source: str) -> Job:
    try:
        return Job.model_validate({**values, **flags})
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            key = ".".join(str(part) for part in error["loc"])
            message = error["msg"].removeprefix("Value error, ")
            if error["type"] == "extra_forbidden":
                guess = did_you_mean(key, Job.model_fields)
                problems.append(f"{source}: unknown key {key!r}{guess}")
            elif error["type"] == "missing":
                problems.append(f"{source}: the key {key!r} is missing")
            elif key in flags:
                problems.append(f"--{key.replace('_', '-')}: {message}")
            else:
                place = "" if source == _OPTIONS else f"{source}: "
                problems.append(f"{place}{key}: {message}" if key else f"{place}{message}")
        raise UsageError("; ".join(problems)) from exc


def invalid_params(params: SamplingParams) -> str | None:
    """What is wrong with the sampling values of a job or a row; None if nothing is."""
    if params.max_new_tokens < 1:
        return f"max_new_tokens must be at least 1, not {params.max_new_tokens}"
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"temperature must be a number from 0 on, not {params.temperature}"
    if not 0 < params.top_p <= 1:
        return f"top_p must be above 0 and at most 1, not {params.top_p}"
    if params.top_k < 0:
        return f"top_k must be 0 (no limit) or more, not {params.top_k}"
    if not 0 <= params.seed <= _MAX_SEED:
        return f"seed must be from 0 to 2**63 - 1, not {params.seed}"
    if "" in params.stop:
        return "stop must not hold an empty string"
    return None
