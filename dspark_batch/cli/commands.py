"""The commands: parse, call one function, print.

Summaries go to stdout, everything else to stderr. `_Commands` is the one place that turns an
error into a line and an exit code. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

import click

from dspark_batch import __version__
from dspark_batch.errors import DSparkError, InputError, UsageError
from dspark_batch.job import Job, load_job

_Command = TypeVar("_Command", bound=Callable[..., object])

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_ARGV = "dspark_batch.argv"
_SHORT_FLAGS = {"output": "-o"}
_EXPORT_FOLDER, _ENGINES_FOLDER = Path("export"), Path("engines")
_DRAFTS_FOLDER = _EXPORT_FOLDER / "drafts"


class _Commands(click.Group):
    """Prints an error of ours with its hint and exits with its code; Ctrl-C is 130."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments as they were typed."""
        ctx.meta[_ARGV] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except DSparkError as exc:
            click.echo(f"error: {exc}", err=True)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; finished parts are kept", err=True)
            ctx.exit(130)


def _job_options(command: _Command) -> _Command:
    """One option for every field of `Job` but the input; absent means the job file's value."""
    for name, field in reversed(Job.model_fields.items()):
        if name != "input":
            command = _option(name, field.annotation, field.description or "", field.default)(
                command
            )
    return command


def _option(
    name: str, annotation: Any, text: str, default: object
) -> Callable[[_Command], _Command]:
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
        return click.option(*flags, multiple=True, help=f"{text} May be given again.")
    if kind is Path:
        return click.option(*flags, type=click.Path(path_type=Path), help=text)
    return click.option(*flags, type=kind, help=text)


def _shown(default: object) -> str:
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)


def _given(flags: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in flags.items() if value not in (None, ())}


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_progress_option = click.option(
    "--progress",
    "progress_mode",
    type=click.Choice(["auto", "bar", "plain", "none"]),
    default="auto",
    show_default=True,
    help="How to show progress on stderr.",
)


class _Report(Protocol):
    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


def _print(report: _Report, *, as_json: bool) -> None:
    click.echo(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))


@click.group(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="dspark-batch")
def main() -> None:
    """Offline batch processing of Parquet prompts with DSpark speculative decoding.

    \b
    Exit codes: 0 done, 1 internal, 2 usage, 3 input, 4 too many row errors, 5 engine,
    6 storage, 7 output locked, 75 stopped early (run again to continue), 130 Ctrl-C.

    \b
    Example:
      dspark-batch run jobs/prompts.parquet
    """


@main.command()
@click.argument("recipe", default="model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Engine folder to write.")
@click.option("--force", is_flag=True, help="Replace an engine that is there.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt-rtx", "tensorrt"]),
    help="Build for another runtime than the recipe's.",
)
@click.option("--precision", help="Of another precision: fp16, bf16, int8-weights, ...")
@click.option(
    "--gpu-arch",
    "gpu_archs",
    type=int,
    multiple=True,
    help="GPU that a TensorRT engine is for: 89 is sm_89. May be given again.",
)
@_progress_option
def export(
    recipe: str,
    output: Path | None,
    force: bool,
    runtime: str | None,
    precision: str | None,
    gpu_archs: tuple[int, ...],
    progress_mode: str,
) -> None:
    """Build an engine from a RECIPE: a TOML file, or the name of one in export/.

    The engine goes to engines/NAME unless -o says otherwise; with --runtime of a GPU to
    engines/NAME-RUNTIME.

    \b
    Example:
      dspark-batch export model
    """
    from dspark_batch.export import export as build
    from dspark_batch.job import open_progress

    path = Path(recipe) if recipe.endswith(".toml") else _EXPORT_FOLDER / f"{recipe}.toml"
    suffix = "" if runtime in (None, "onnxruntime") else f"-{runtime}"
    output = output or _ENGINES_FOLDER / f"{path.stem}{suffix}"
    with open_progress(progress_mode) as progress:
        folder = build(
            path,
            output=output,
            force=force,
            runtime=runtime,
            precision=precision,
            gpu_archs=gpu_archs,
            progress=progress.phase,
        )
    click.echo(folder)


@main.command()
@click.argument("recipe")
@click.option("--overwrite", is_flag=True, help="Train anew, and replace a draft that is there.")
@click.option("--deadline", type=float, help="Seconds after which to stop, to be continued.")
@_progress_option
@_json_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    recipe: str,
    overwrite: bool,
    deadline: float | None,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Train a draft from a RECIPE: a TOML file, or the name of one in export/drafts/.

    The draft of export/drafts/NAME.toml goes to export/drafts/NAME. The same command again
    continues where it was stopped.

    \b
    Example:
      dspark-batch train export/drafts/tutorial.toml
    """
    from dspark_batch.job import open_progress
    from dspark_batch.training import train as train_draft

    with open_progress(progress_mode) as progress:
        summary = train_draft(
            Path(recipe) if recipe.endswith(".toml") else _DRAFTS_FOLDER / f"{recipe}.toml",
            progress=progress,
            argv=ctx.meta[_ARGV],
            overwrite=overwrite,
            deadline=deadline,
        )
    _print(summary, as_json=as_json)


@main.command()
@click.argument("input")
@_job_options
@click.option("--overwrite", is_flag=True, help="Start over, and replace what the output holds.")
@_progress_option
@_json_option
@click.pass_context
def run(
    ctx: click.Context,
    /,
    input: str,
    overwrite: bool,
    progress_mode: str,
    as_json: bool,
    **flags: object,
) -> None:
    """Complete the prompts of INPUT: a Parquet file, a folder of them, a glob, or a job file.

    The same command again continues where a run was stopped. Flags win over the job file.

    \b
    Example:
      dspark-batch run jobs/prompts.parquet --max-new-tokens 64 --temperature 0.7 --overwrite
    """
    job = load_job(input, _given(flags))

    from dspark_batch.decode import DecodeStats, decode
    from dspark_batch.job import open_crew, open_measured, open_progress
    from dspark_batch.job import run as run_job

    with open_progress(progress_mode) as progress:
        summary = run_job(
            job,
            open_engine=partial(open_measured, job=job, progress=progress.phase),
            decode=decode,
            stats=DecodeStats(),
            progress=progress,
            argv=ctx.meta[_ARGV],
            overwrite=overwrite,
            crew=open_crew(job, open_engine=open_measured, decode=decode),
        )
    _print(summary, as_json=as_json)
    if summary.failure:
        raise summary.failure


@main.command()
@click.argument("input")
@_job_options
@_json_option
def check(input: str, as_json: bool, **flags: object) -> None:
    """Read, render and tokenize every row of INPUT as run would, and decode none.

    Exits with 3 if a row is invalid.

    \b
    Example:
      dspark-batch check jobs/prompts.parquet --max-new-tokens 64
    """
    job = load_job(input, _given(flags))

    from dspark_batch.job import check_job, read_engine

    report = check_job(job, read_engine(job.engine))
    _print(report, as_json=as_json)
    if report.num_errors:
        raise InputError(
            f"{report.num_errors} of {report.num_rows} rows are invalid; {report.first_error}"
        )


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@_json_option
def status(output: Path, as_json: bool) -> None:
    """Show how far OUTPUT is, from its files alone.

    \b
    Example:
      dspark-batch status jobs/prompts.completions
    """
    from dspark_batch.job import read_status

    _print(read_status(output), as_json=as_json)


@main.command()
@click.option("--verify", is_flag=True, help="Compare engine files by hash, not by size.")
@_json_option
def doctor(verify: bool, as_json: bool) -> None:
    """Say what this machine has, which engines run here, and what to type next.

    Looks at the workspace in the current folder. What it finds wrong is a line, not a failure.

    \b
    Example:
      dspark-batch doctor
    """
    from dspark_batch.cli.diagnosis import diagnose

    _print(diagnose(verify=verify), as_json=as_json)


@main.command()
@click.argument("prompts", required=False, type=click.Path(path_type=Path))
@click.option("--engine", type=click.Path(path_type=Path), default=Path("engines/model"))
@click.option("--rows", type=click.IntRange(min=1), multiple=True, help="Concurrent rows.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many rows of PROMPTS.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--measure-costs", is_flag=True, help="Measure the cost table anew for this run.")
@click.option("--simulate", is_flag=True, help="Replay recorded rounds by a cost table instead.")
@click.option("--rounds", type=click.Path(path_type=Path), help="Recorded rounds, for PROMPTS.")
@click.option("--gpu", help="Simulate this GPU by its roofline, such as h100.")
@click.option("--model", help="The size to simulate on it, such as qwen3-4b.")
@click.option("--dtype", help="Of its weights.  [default: the GPU's first]")
@click.option("--assume", multiple=True, metavar="NAME=VALUE", help="Replace an assumption of it.")
@click.option(
    "--floor",
    type=click.FloatRange(min=0, min_open=True),
    help="Tokens/s that every simulated row is to get.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the figures.")
@_progress_option
def bench(
    prompts: Path | None,
    engine: Path,
    rows: tuple[int, ...],
    new_tokens: int,
    limit: int | None,
    repeat: int,
    measure_costs: bool,
    simulate: bool,
    progress_mode: str,
    **planning: Any,
) -> None:
    """Measure plain and speculative decoding of PROMPTS here, or simulate it elsewhere.

    Every mode decodes the prompts --repeat times at each number of rows; a table is printed, then
    one JSON line. Options from --rounds on are for --simulate (docs/planning.md).

    \b
    Example:
      dspark-batch bench jobs/prompts.parquet --rows 2 --new-tokens 8 --limit 4 --repeat 1
    """
    wrong = [] if simulate else list(_given(planning))
    wrong += ["measure_costs"] if simulate and measure_costs else []
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise UsageError(f"{flag} {'does not go with' if simulate else 'needs'} --simulate")

    from dspark_batch.job import open_progress

    common: dict[str, Any] = {"rows": rows, "new_tokens": new_tokens, "limit": limit}
    report: _Report
    with open_progress(progress_mode) as progress:
        if simulate:
            from dspark_batch.bench.forecast import Question, forecast

            question = Question(prompts=prompts, engine=engine, **common, **planning)
            report = forecast(question, progress=progress.phase)
        else:
            from dspark_batch.bench import run_bench

            if prompts is None:
                raise UsageError("give PROMPTS, a Parquet file as for run")
            report = run_bench(
                engine,
                prompts,
                **common,
                repeat=repeat,
                fresh_costs=measure_costs,
                progress=progress.phase,
            )
    _print(report, as_json=False)
    _print(report, as_json=True)
