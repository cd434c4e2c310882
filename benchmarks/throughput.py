"""New tokens per second: plain decoding, fixed speculation and the scheduler, in one run.

`dspark-batch bench` with a developer's record: the commit and the command are part of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from report import BenchmarkCommand, origin

from dspark_batch.bench import PER_ROW, ROWS, run_bench


@click.command(name="throughput", cls=BenchmarkCommand)
@click.option(
    "--engine",
    "engine_folder",
    type=click.Path(path_type=Path),
    default=Path("engines/model"),
    show_default=True,
    help="Engine folder that `export` built.",
)
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    default=Path("jobs/prompts.parquet"),
    show_default=True,
    help="Parquet file as for `run`; a column `source` adds figures by source.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    multiple=True,
    default=ROWS,
    show_default=True,
    help="Concurrent rows; may be given again.",
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option(
    "--per-row",
    type=click.IntRange(min=1),
    default=PER_ROW,
    show_default=True,
    help="Prompts for each concurrent row; 16 prompts in all at the least.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many rows of the file.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Times that every mode is run.",
)
@click.option(
    "--measure-costs",
    "fresh_costs",
    is_flag=True,
    help="Measure the cost table anew for this benchmark; the engine keeps its own.",
)
@click.pass_context
def main(
    ctx: click.Context,
    engine_folder: Path,
    prompts_path: Path,
    rows: tuple[int, ...],
    new_tokens: int,
    per_row: int,
    limit: int | None,
    repeat: int,
    fresh_costs: bool,
) -> None:
    """Compare the throughput of plain, fixed and scheduled decoding; one JSON line at the end.

    \b
    Example:
      python benchmarks/throughput.py --rows 16 --prompts jobs/prompts.parquet
    """
    bench = run_bench(
        engine_folder,
        prompts_path,
        rows=rows,
        new_tokens=new_tokens,
        per_row=per_row,
        limit=limit,
        repeat=repeat,
        fresh_costs=fresh_costs,
        progress=lambda text: click.echo(text, err=True),
    )
    click.echo("\n".join(bench.lines()))
    click.echo(json.dumps(origin(ctx) | bench.to_json()))


if __name__ == "__main__":
    main()
