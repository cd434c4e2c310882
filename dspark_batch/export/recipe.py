"""Recipes: what an engine is built from (`export/*.toml`).

Unknown keys are errors with a suggestion, so that a typo cannot silently mean a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dspark_batch.drafters import LOOKUPS, LookupSettings, lookup_source
from dspark_batch.engine.runtimes import RUNTIMES
from dspark_batch.errors import UsageError, did_you_mean
from dspark_batch.export.recipe_file import problems, read_sections
from dspark_batch.models.weights import PACKAGE_PREFIX

RECIPE_FOLDER = "export"
NO_DRAFT = "none"

Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TargetSection(_Section):
    """`[target]`: the model whose text is wanted."""

    weights: Text
    """A GGUF file, a Hugging Face folder or `package:DISTRIBUTION/path`; see `weights`."""
    license: str | None = None
    """SPDX expression of the weights; goes into the manifest."""


class DraftSection(_Section):
    """`[draft]`: what proposes. A network, a lookup, or a lookup ahead of a network.

    Keys that are not fields are settings of the lookup (`lookup.LookupSettings`).
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    drafter: Text = "dspark"
    """The method that a network was trained for, a lookup, or `none` to never draft."""
    weights: Text | None = None
    """As for the target; a lookup has none."""
    block_size: Annotated[int, Field(ge=1)] = 7
    """γ of a lookup; a network brings its own."""
    lookup: Text = "ngram"
    """What is tried before a network; or `none`."""

    @model_validator(mode="after")
    def _fits_the_drafter(self) -> Self:
        fields = set(type(self).model_fields) - {"drafter"}
        given = self.model_fields_set & fields
        if self.drafter == NO_DRAFT:
            wrong = given | set(self.model_extra or ())
        elif self.drafter in LOOKUPS:
            wrong = given & {"weights", "lookup"}
        else:
            wrong = given & {"block_size"}
            if self.weights is None:
                raise _draft_error("weights is missing")
            if self.lookup not in (*LOOKUPS, NO_DRAFT):
                known = ", ".join([*LOOKUPS, NO_DRAFT])
                raise _draft_error(f"lookup = {self.lookup!r} is not known; known: {known}")
        if wrong:
            raise _draft_error(f"{sorted(wrong)[0]} is not for drafter {self.drafter!r}")
        self._check_settings()
        return self

    def _check_settings(self) -> None:
        """Raise for keys that the lookup does not know, and for values that it does not take."""
        kind = lookup_source(self.lookup_drafter).Settings if self.lookup_drafter else None
        known = [*type(self).model_fields, *(kind.model_fields if kind else ())]
        for key in self.model_extra or ():
            if key in known:
                continue
            if any(key in lookup_source(name).Settings.model_fields for name in LOOKUPS):
                raise _draft_error(f"{key} is for a lookup, and lookup is {self.lookup!r}")
            raise _draft_error(f"unknown key {key}{did_you_mean(key, known)}")
        try:
            _ = self.lookup_settings
        except ValidationError as error:
            raise _draft_error("; ".join(_value_problem(each) for each in error.errors())) from None
        except ValueError as error:
            raise _draft_error(str(error)) from None

    @property
    def lookup_drafter(self) -> str | None:
        """The lookup that proposes, alone or ahead of a network; None where there is none."""
        if self.drafter in LOOKUPS:
            return self.drafter
        return None if NO_DRAFT in (self.lookup, self.drafter) else self.lookup

    @property
    def lookup_settings(self) -> LookupSettings | None:
        """Its settings, with defaults filled in."""
        if self.lookup_drafter is None:
            return None
        settings = lookup_source(self.lookup_drafter).Settings.model_validate(self.model_extra)
        return settings.settled(beside_network=self.drafter not in LOOKUPS)


def _draft_error(text: str) -> PydanticCustomError:
    return PydanticCustomError("draft", "{text}", {"text": text})


def _value_problem(detail: Any) -> str:
    where = f"{detail['loc'][-1]} = {detail['input']!r}: " if detail["loc"] else ""
    return f"{where}{detail['msg']}"


class EngineSection(_Section):
    """`[engine]`: what is built and measured."""

    runtime: Text = "onnxruntime"
    precision: Text
    """One of those in `runtimes.RUNTIMES`; the first where none is given."""
    gpu_archs: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Compute capabilities times ten (89 is sm_89) that TensorRT builds for; empty: its choice."""
    weight_streaming: bool = False
    """Build plans whose weights may stay on the host where the GPU has no room for all of them."""
    max_rows: Annotated[int, Field(ge=1)] = 32
    """Concurrent rows that the cost table is measured for."""
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    """Prompt and new tokens of one row."""

    @model_validator(mode="before")
    @classmethod
    def _default_precision(cls, values: Any) -> Any:
        runtime = values.get("runtime", "onnxruntime")
        if not isinstance(runtime, str) or runtime not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            message = f"runtime = {runtime!r} is not known; known: {known}"
            raise PydanticCustomError("engine", "{text}", {"text": message})
        return {"precision": RUNTIMES[runtime].precisions[0], **values}

    @model_validator(mode="after")
    def _fits_the_runtime(self) -> Self:
        entry = RUNTIMES[self.runtime]
        message = None
        if self.precision not in entry.precisions:
            listed = ", ".join(entry.precisions)
            message = (
                f"precision {self.precision!r} is not for {self.runtime}; choose from {listed}"
            )
        elif self.gpu_archs and not entry.library:
            message = f"gpu_archs is not for {self.runtime}, whose graphs run on any device"
        elif self.weight_streaming and not entry.library:
            message = f"weight_streaming is not for {self.runtime}"
        if message:
            raise PydanticCustomError("engine", "{text}", {"text": message})
        return self


class Recipe(_Section):
    """One recipe file. Without `[draft]` it gets prompt lookup, which needs no weights."""

    target: TargetSection
    draft: DraftSection | None = DraftSection(drafter="ngram")
    """None (in a file: drafter `none`): the engine decodes plainly."""
    engine: EngineSection = EngineSection.model_validate({})
    path: Path = Field(exclude=True)
    """The file it was read from; no key of it."""

    @field_validator("draft")
    @classmethod
    def _none_is_none(cls, draft: DraftSection | None) -> DraftSection | None:
        return None if draft is None or draft.drafter == NO_DRAFT else draft

    @property
    def name(self) -> str:
        """The recipe's name, which is also its engine's: `model` for `export/model.toml`."""
        return self.path.stem

    def with_engine(
        self, *, runtime: str | None, precision: str | None, gpu_archs: tuple[int, ...]
    ) -> Recipe:
        """With other settings of the engine; None and empty keep the recipe's.

        Another runtime has other precisions, and its default if none is given.
        """
        values = self.engine.model_dump()
        if runtime is not None and runtime != self.engine.runtime:
            del values["precision"], values["gpu_archs"], values["weight_streaming"]
        given = {"runtime": runtime, "precision": precision, "gpu_archs": gpu_archs or None}
        values |= {name: value for name, value in given.items() if value is not None}
        try:
            engine = EngineSection.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(problems(error, Recipe, section="engine"))
            raise UsageError(f"{self.path}: {wrong}") from error
        return self.model_copy(update={"engine": engine})

    @property
    def target_source(self) -> str:
        """What to give to `open_weights`. Raises `UsageError` if nothing is there."""
        return self._source(self.target.weights, "target")

    @property
    def draft_source(self) -> str | None:
        """What to give to `open_weights`; None without weights. Raises `UsageError` as above."""
        weights = self.draft.weights if self.draft else None
        return None if weights is None else self._source(weights, "draft")

    def _source(self, weights: str, section: str) -> str:
        """A package source as it is; a path from the workspace, or else the recipe's folder."""
        if weights.startswith(PACKAGE_PREFIX):
            return weights
        folder = self.path.resolve().parent
        bases = [folder.parent, folder] if folder.name == RECIPE_FOLDER else [folder]
        candidates = list(dict.fromkeys(base / Path(weights).expanduser() for base in bases))
        for candidate in candidates:
            if candidate.exists():
                return str(candidate)
        raise UsageError(
            f"{self.path}: [{section}] weights = {weights!r} is not there",
            hint="looked for " + " and ".join(str(candidate) for candidate in candidates),
        )


def load_recipe(path_or_name: str) -> Recipe:
    """Read a recipe by path, or by name from `export/` in the current folder.

    Raises `UsageError`, which names the file and every wrong key, or the recipes that exist.
    """
    path = Path(path_or_name).expanduser()
    if path.suffix != ".toml" and len(path.parts) == 1:
        path = Path(RECIPE_FOLDER, f"{path_or_name}.toml")
    if not path.is_file():
        raise _no_recipe(path)
    return read_sections(path, Recipe)


def _no_recipe(path: Path) -> UsageError:
    there = sorted(file.stem for file in path.parent.glob("*.toml"))
    hint = f"recipes in {path.parent}/: {', '.join(there)}"
    if not there:
        hint = f"run from the workspace, the folder that holds {RECIPE_FOLDER}/ with the recipes"
    return UsageError(f"there is no recipe {path}{did_you_mean(path.stem, there)}", hint=hint)
