"""A recipe file, TOML, read into pydantic sections. Errors name the file and every wrong key."""

from __future__ import annotations

import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dspark_batch.errors import UsageError, did_you_mean

Recipe = TypeVar("Recipe", bound=BaseModel)


def read_sections(path: Path, model: type[Recipe]) -> Recipe:
    """Read the file into a `model`, whose field `path` is the file's own.

    Raises:
        UsageError: it is not TOML, or keys are unknown, missing or wrong: all of them are named.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    wrong = []
    if "path" in table:
        wrong.append(_unknown_key(("path",), model))
        del table["path"]
    try:
        recipe = model.model_validate({**table, "path": path})
    except ValidationError as error:
        wrong += problems(error, model)
    if wrong:
        raise UsageError(f"{path}: " + "; ".join(wrong))
    return recipe


def problems(
    error: ValidationError, model: type[BaseModel], *, section: str | None = None
) -> list[str]:
    """What is wrong with a `model`, or with the `section` of it that was validated alone."""
    outer = () if section is None else (section,)
    return [_problem({**detail, "loc": outer + detail["loc"]}, model) for detail in error.errors()]


def _problem(detail: Any, model: type[BaseModel]) -> str:
    location = tuple(detail["loc"])
    words = [str(part) for part in location if isinstance(part, str)]
    if detail["type"] == "extra_forbidden":
        return _unknown_key(location, model)
    if detail["type"] in model.model_fields:  # of a section, and of no single key
        return f"[{detail['type']}] {detail['msg']}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not words:
        return message
    where = f"[{words[0]}] " + " ".join(words[1:])
    if detail["type"] == "missing":
        return f"{where.strip()} is missing"
    if detail["type"] == "value_error":
        return f"{where.strip()}: {message}"
    return f"{where.strip()} = {detail['input']!r}: {message}"


def _unknown_key(location: tuple[Any, ...], section: type[BaseModel]) -> str:
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = _model(section.model_fields[part].annotation) or section
    words = [str(part) for part in location if isinstance(part, str)]
    where = f"[{words[0]}] " if len(words) > 1 else ""
    known = [name for name in section.model_fields if name != "path"]
    return f"{where}unknown key {words[-1]}{did_you_mean(words[-1], known)}"


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation: itself, optional, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        found = [_model(part) for part in get_args(annotation)]
        return next((model for model in found if model is not None), None)
    return None
