"""The commands: parse, call one function, print.

Summaries go to stdout, everything else to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from dspark_batch import __version__
from dspark_batch.cli.options import (
    Report,
    given,
    job_options,
    json_option,
    progress_option,
    show,
)
from dspark_batch.errors import DSparkError, InputError, UsageError
from dspark_batch.job import load_job

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_ARGV = "dspark_batch.argv"
_EXPORT_FOLDER, _ENGINES_FOLDER = Path("export"), Path("engines")
_DRAFTS_FOLDER = _EXPORT_FOLDER / "drafts"


class _Commands(click.Group):
    """Prints an error of ours with its hint and exits with its code; Ctrl-C is 130."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments as they were typed."""
        ctx.meta[_ARGV] = list(args)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command, and give every error the same form."""
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False}) or sys.exit(0)
        except DSparkError as exc:
            _fail(exc.message, exc.hint, exc.exit_code)
        except click.exceptions.NoArgsIsHelpError as exc:
            click.echo(exc.format_message(), err=True)
            sys.exit(exc.exit_code)
        except click.UsageError as exc:
            command = exc.ctx.command_path if exc.ctx else "dspark-batch"
            message = exc.format_message().rstrip(".")
            _fail(f"{message[:1].lower()}{message[1:]}", f"{command} --help", exc.exit_code)
        except click.ClickException as exc:
            _fail(exc.format_message(), None, exc.exit_code)
        except (click.Abort, KeyboardInterrupt):
            message = "interrupted: finished parts are kept"
            click.echo(f"{message}\n\nhint: run the same command to continue", err=True)
            sys.exit(130)


def _fail(message: str, hint: str | None, exit_code: int) -> NoReturn:
    click.echo(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""), err=True)
    sys.exit(exit_code)


@click.group("dspark-batch", cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="dspark-batch")
def main() -> None:
    """Run a language model over Parquet files of prompts, faster by speculative decoding.

    Build an engine once with export, then run jobs with it. Greedy text is exactly the model's own,
    and sampled text has the model's distribution.

    \b
    Exit codes: 0 done, 1 internal error, 2 usage, 3 input, 4 too many row errors, 5 engine,
    6 storage, 7 output locked, 75 stopped early (run again to continue), 130 Ctrl-C.

    \b
    Example:
      dspark-batch run jobs/prompts.parquet
    """


@main.command()
@click.argument("recipe", default="model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Engine folder to write.")
@click.option("--force", is_flag=True, help="Build again, and replace an engine that is there.")
@click.option(
    "--runtime", help="Build for onnxruntime, onnxruntime-cuda, tensorrt-rtx or tensorrt instead."
)
@click.option("--precision", help="Build in another precision: fp32, int8, fp16, bf16, ...")
@click.option(
    "--gpu-arch",
    "gpu_archs",
    type=int,
    multiple=True,
    help="GPU to build a TensorRT engine for; 89 is sm_89. Can be repeated.",
)
@progress_option
def export(
    recipe: str,
    output: Path | None,
    force: bool,
    runtime: str | None,
    precision: str | None,
    gpu_archs: tuple[int, ...],
    progress_mode: str,
) -> None:
    """Build an engine from RECIPE.

    RECIPE is a TOML file, or the name of one in export/; by default it is model. An engine is a
    folder with everything that run needs: the target model's graph, the draft's, the
    tokenizer and what was measured. It goes to engines/NAME, or to engines/NAME-RUNTIME with
    --runtime. An engine that is up to date is kept.

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
@click.option(
    "--from-job",
    metavar="OUTPUT",
    type=click.Path(path_type=Path),
    help="Tune the draft on the rows of a finished job.",
)
@click.option("--overwrite", is_flag=True, help="Train from the start, and replace the old draft.")
@click.option("--deadline", type=float, help="Stop after this many seconds; continue later.")
@progress_option
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    recipe: str,
    from_job: Path | None,
    overwrite: bool,
    deadline: float | None,
    progress_mode: str,
    as_json: bool,
) -> None:
    """Train a draft model from RECIPE.

    RECIPE is a TOML file, or the name of one in export/drafts/. The draft of
    export/drafts/NAME.toml goes to export/drafts/NAME, and with --from-job to
    export/drafts/NAME-tuned. Stopped, the same command continues.

    \b
    Examples:
      dspark-batch train export/drafts/tutorial.toml
      dspark-batch train tutorial --from-job jobs/prompts.completions
    """
    from dspark_batch.job import open_progress

    try:
        from dspark_batch.training import train as train_draft
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise UsageError(
            "training needs PyTorch, which is not installed",
            hint='pip install "dspark-batch[train]"',
        ) from missing

    with open_progress(progress_mode) as progress:
        summary = train_draft(
            Path(recipe) if recipe.endswith(".toml") else _DRAFTS_FOLDER / f"{recipe}.toml",
            progress=progress,
            argv=ctx.meta[_ARGV],
            overwrite=overwrite,
            deadline=deadline,
            from_job=from_job,
        )
    show(summary, as_json=as_json)


@main.command()
@click.argument("input")
@job_options
@click.option("--overwrite", is_flag=True, help="Start over, and replace the old output.")
@progress_option
@json_option
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
    """Complete the prompts of INPUT.

    INPUT is a Parquet file, a folder of them, a glob, or a job file (TOML). Every input row becomes
    an output row, in the same order, with all its columns. Stopped, the
    same command continues with the rows that are not there yet. Options win over the job file.

    \b
    Example:
      dspark-batch run jobs/prompts.parquet --max-new-tokens 64 --temperature 0.7 --overwrite
    """
    job = load_job(input, given(flags))

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
    show(summary, as_json=as_json)
    if summary.failure:
        raise summary.failure


@main.command()
@click.argument("input")
@job_options
@json_option
def check(input: str, as_json: bool, **flags: object) -> None:
    """Validate the rows of INPUT without decoding any.

    Reads, renders and tokenizes every row as run would. Exits with 3 if one is invalid.

    \b
    Example:
      dspark-batch check jobs/prompts.parquet --max-new-tokens 64
    """
    job = load_job(input, given(flags))

    from dspark_batch.job import check_job, read_engine

    report = check_job(job, read_engine(job.engine))
    show(report, as_json=as_json)
    if report.num_errors:
        raise InputError(
            f"{report.num_errors} of {report.num_rows} rows are invalid: {report.first_error}",
            hint="run writes an error row for each, and decodes the others",
        )


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@json_option
def status(output: Path, as_json: bool) -> None:
    """Show how far the run that writes to OUTPUT is.

    Reads files only, and never waits.

    \b
    Example:
      dspark-batch status jobs/prompts.completions
    """
    from dspark_batch.job import read_status

    show(read_status(output), as_json=as_json)


@main.command()
@click.option("--verify", is_flag=True, help="Compare engine files by hash instead of by size.")
@json_option
def doctor(verify: bool, as_json: bool) -> None:
    """Show what this machine has, and what runs here.

    Lists hardware, versions and the engines of this folder, and the command to type next. A problem
    that it finds is a line of the report; the exit code is 0.

    \b
    Example:
      dspark-batch doctor
    """
    from dspark_batch.cli.diagnosis import diagnose

    show(diagnose(verify=verify), as_json=as_json)


@main.command()
@click.argument("prompts", required=False, type=click.Path(path_type=Path))
@click.option(
    "--engine",
    type=click.Path(path_type=Path),
    default=Path("engines/model"),
    show_default=True,
    help="Engine folder to measure.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    multiple=True,
    help="Rows at a time. Can be repeated.  [default: 1, 4, 16, 32]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="New tokens per row at most; rows get half to all of them.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only this many rows of PROMPTS.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Turns in which every mode decodes the prompts once.",
)
@click.option("--measure-costs", is_flag=True, help="Measure the cost table again for this bench.")
@click.option("--simulate", is_flag=True, help="Forecast speed from recorded rounds instead.")
@click.option(
    "--rounds", type=click.Path(path_type=Path), help="Recorded rounds to use in place of PROMPTS."
)
@click.option("--gpu", help="GPU to forecast, such as h100.")
@click.option("--model", help="Size of the model to forecast, such as qwen3-4b.")
@click.option("--dtype", help="Type of its weights.  [default: the GPU's first]")
@click.option(
    "--assume", multiple=True, metavar="NAME=VALUE", help="Replace an assumption. Can be repeated."
)
@click.option(
    "--floor",
    type=click.FloatRange(min=0, min_open=True),
    help="Tokens/s that every row is to get at least.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the figures.")
@progress_option
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
    """Measure the speed of this machine.

    Decodes PROMPTS plainly, with speculation on, and with auto. Prints a table, then one JSON line.
    With --simulate it forecasts another machine instead; the
    options from --rounds on belong to that (docs/planning.md).

    \b
    Example:
      dspark-batch bench jobs/prompts.parquet --rows 2 --new-tokens 8 --limit 4 --repeat 1
    """
    wrong = [] if simulate else list(given(planning))
    wrong += ["measure_costs"] if simulate and measure_costs else []
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise UsageError(f"{flag} {'does not go with' if simulate else 'needs'} --simulate")

    from dspark_batch.job import open_progress

    common: dict[str, Any] = {"rows": rows, "new_tokens": new_tokens, "limit": limit}
    report: Report
    with open_progress(progress_mode) as progress:
        if simulate:
            from dspark_batch.bench.forecast import Question, forecast

            question = Question(prompts=prompts, engine=engine, **common, **planning)
            report = forecast(question, progress=progress.phase)
        else:
            from dspark_batch.bench import run_bench

            if prompts is None:
                raise UsageError(
                    "PROMPTS is missing: a Parquet file, as for run",
                    hint="dspark-batch bench jobs/prompts.parquet",
                )
            report = run_bench(
                engine,
                prompts,
                **common,
                repeat=repeat,
                fresh_costs=measure_costs,
                progress=progress.phase,
            )
    show(report, as_json=False)
    show(report, as_json=True)
