"""Options that several commands share, and what a command prints."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

import click

from dspark_batch.job import Job

Command = TypeVar("Command", bound=Callable[..., object])

_SHORT_FLAGS = {"output": "-o"}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
progress_option = click.option(
    "--progress",
    "progress_mode",
    type=click.Choice(["auto", "bar", "plain", "none"]),
    default="auto",
    show_default=True,
    help="Progress on stderr: a bar, a line every 30 s, or nothing. auto: a bar on a terminal.",
)


class Report(Protocol):
    """The result of a command."""

    def lines(self) -> list[str]:
        """Lines of text for a terminal."""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""


def show(report: Report, *, as_json: bool) -> None:
    """Print a report to stdout."""
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))


def job_options(command: Command) -> Command:
    """One option for every field of `Job` but the input; left out, the job file's value holds."""
    for name, field in reversed(Job.model_fields.items()):
        if name != "input":
            command = _option(name, field.annotation, field.description or "", field.default)(
                command
            )
    return command


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """The options that were typed."""
    return {name: value for name, value in flags.items() if value not in (None, ())}


def _option(name: str, annotation: Any, text: str, default: object) -> Callable[[Command], Command]:
    flag = f"--{name.replace('_', '-')}"
    flags = [flag, name] + ([_SHORT_FLAGS[name]] if name in _SHORT_FLAGS else [])
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    optional = get_origin(annotation) in (Union, types.UnionType)
    kind = kinds[0] if optional else annotation
    if default not in (None, "", ()):
        text = f"{text}  [default: {_shown(default)}]"
    if kind is bool:
        flags[0] = f"{flag}/--no-{flag[2:]}"
        return click.option(*flags, default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(*flags, type=click.Choice(get_args(kind)), help=text)
    if get_origin(kind) is tuple:
        return click.option(*flags, multiple=True, help=f"{text} Can be repeated.")
    if kind is Path:
        return click.option(*flags, type=click.Path(path_type=Path), help=text)
    return click.option(*flags, type=kind, help=text)


def _shown(default: object) -> str:
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)
