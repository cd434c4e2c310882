"""Which input columns a job reads: the prompt, and what a row overrides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dspark_batch.errors import InputError, UsageError, did_you_mean
from dspark_batch.job.definition import Job

PROMPT_COLUMNS = {
    "prompt": ("string",),
    "messages": ("messages",),
    "prompt_token_ids": ("integers",),
}
"""The columns that can hold the prompt, by their default names, and the kinds they may have."""

PARAM_COLUMNS = {
    "max_new_tokens": ("integer", "number"),
    "temperature": ("integer", "number"),
    "top_p": ("integer", "number"),
    "top_k": ("integer", "number"),
    "seed": ("integer", "number"),
    "stop": ("string", "strings"),
}
"""The columns that override a setting of the job row by row. Whole numbers may come as floats:
pandas writes integers with gaps so."""

KIND_NAMES = {
    "string": "text",
    "strings": "a list of texts",
    "integer": "a whole number",
    "number": "a number",
    "integers": "a list of whole numbers",
    "messages": "a list of structs with role and content",
}


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """The input columns that a job reads; the others only pass through."""

    kind: str
    """Which of `PROMPT_COLUMNS` the prompt column stands for."""
    name: str
    params: tuple[str, ...]
    """The `PARAM_COLUMNS` that the input has."""


def choose_columns(kinds: Mapping[str, str], types: Mapping[str, str], job: Job) -> PromptColumns:
    """Find the prompt column and the parameter columns; never guesses between two.

    `kinds[name]` is what a column can serve as (a key of `KIND_NAMES`, `null` or `other`),
    `types[name]` its type in words. Raises `InputError` naming the flag to type.
    """
    flags = {
        "prompt": job.prompt_column,
        "messages": job.messages_column,
        "prompt_token_ids": job.token_ids_column,
    }
    given = {kind: name for kind, name in flags.items() if name is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(map(_flag, given))} exclude each other", hint="give one")
    if given:
        kind, name = next(iter(given.items()))
        if name not in kinds:
            raise InputError(
                f"the input has no column {name!r}{did_you_mean(name, kinds)}",
                hint=f"its columns are {_listed(kinds)}",
            )
    else:
        present = [name for name in PROMPT_COLUMNS if name in kinds]
        if not present:
            raise InputError(
                f"the input has no column {_listed(PROMPT_COLUMNS, 'or')}; its columns are "
                f"{_listed(kinds)}",
                hint="name the one with the prompts: --prompt-column NAME",
            )
        if len(present) > 1:
            raise InputError(
                f"the input has the columns {_listed(present)}, and each could hold the prompts",
                hint=" or ".join(f"{_flag(name)} {name}" for name in present),
            )
        kind = name = present[0]
    _check_kind(name, kind, PROMPT_COLUMNS[kind], kinds, types)
    params = tuple(param for param in PARAM_COLUMNS if param in kinds and param != name)
    for param in params:
        _check_kind(param, param, PARAM_COLUMNS[param], kinds, types)
    return PromptColumns(kind, name, params)


def _check_kind(
    name: str,
    role: str,
    allowed: tuple[str, ...],
    kinds: Mapping[str, str],
    types: Mapping[str, str],
) -> None:
    if kinds[name] not in (*allowed, "null"):
        wanted = " or ".join(KIND_NAMES[kind] for kind in allowed)
        raise InputError(
            f"column {name!r} has the type {types[name]}, but {role} must be {wanted}",
            hint="rename the column or convert it",
        )


def _flag(kind: str) -> str:
    return f"--{kind.removeprefix('prompt_').replace('_', '-')}-column"


def _listed(names: Collection[str], word: str = "and") -> str:
    items = list(names) or ["none"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
