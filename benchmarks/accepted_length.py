"""Accepted length τ of drafts, by source of the prompts: engine beside engine, one table.

Whole blocks (`--spec on`), so the figures are the drafts' alone: no schedule, no cost and no clock
is in them. Engines of one target and one precision must give the same greedy text, whatever
proposes it; rows that differ are counted. With a `--temperature` texts differ and laws do not.
`--speed` adds what counts in the end: tokens per second of one row at a time, as a ratio to plain
decoding in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from report import BenchmarkCommand, provenance, table

from dspark_batch.bench import MODES, Decoded, Workload, decode_all, read_workload
from dspark_batch.decode import SamplingParams, SpecCounts
from dspark_batch.decode.algorithm import metrics
from dspark_batch.engine import Engine, ensure_costs, open_engine
from dspark_batch.errors import UsageError

_ALL = "all"
_WARM_UP_TOKENS = 8

Texts = dict[int, tuple[int, ...]]
"""New tokens by row."""


@click.command(name="accepted_length", cls=BenchmarkCommand)
@click.option(
    "--engine",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    default=(Path("engines/model"),),
    show_default=True,
    help="Engine folder that `export` built; may be given again.",
)
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    default=Path("jobs/prompts.parquet"),
    show_default=True,
    help="Parquet file as for `run`; its column `source` makes the table's rows.",
)
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of every row; 0 is greedy.",
)
@click.option(
    "--per-source",
    type=click.IntRange(min=1),
    help="Prompts of each source, evenly over them.  [default: all]",
)
@click.option(
    "--speed",
    "num_timed",
    type=click.IntRange(min=1),
    metavar="N",
    help="Time N prompts of each source, one row at a time, in every mode.",
)
@click.pass_context
def main(
    ctx: click.Context,
    folders: tuple[Path, ...],
    prompts_path: Path,
    rows: int,
    new_tokens: int,
    temperature: float,
    per_source: int | None,
    num_timed: int | None,
) -> None:
    """Tell how many tokens a round commits, by source and engine; one JSON line at the end.

    \b
    Example:
      python benchmarks/accepted_length.py --engine engines/model --prompts jobs/prompts.parquet
    """
    if num_timed and temperature:
        raise UsageError(
            "--speed times greedy rows, which end alike in every mode: no --temperature"
        )
    names = _names(folders)
    texts: dict[tuple[object, ...], Texts] = {}
    record: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    for name, folder in names.items():
        with closing(open_engine(folder, max_rows=rows)) as engine:
            if not engine.block_size:
                raise UsageError(f"{folder} has no draft: there is nothing to measure")
            found = provenance(ctx, engine)
            record = record or {key: found[key] for key in found if key != "engine"}
            whole = read_workload(prompts_path, engine, new_tokens=new_tokens, limit=None)
            workload = _sampled(whole.of_each_source(per_source), temperature)
            click.echo(f"{name}: decoding {len(workload.prompts)} rows", err=True)
            run = _decode(engine, workload, "on")
            own = {completion.row: completion.token_ids for completion in run.completions}
            expected = texts.setdefault(_target(engine), own)
            figures = {
                "folder": str(folder),
                "precision": engine.manifest.precision,
                "drafter": engine.manifest.draft.drafter if engine.manifest.draft else None,
                "block_size": engine.block_size,
                "num_rejected": whole.num_rejected,
                "num_differing_rows": sum(
                    own[row] != expected[row] for row in own.keys() & expected.keys()
                ),
                "seconds": run.seconds,
                "num_new_tokens": run.stats.num_new_tokens,
                "sources": {
                    source: _figures(counts, num_rows)
                    for source, (counts, num_rows) in _by_source(run, workload).items()
                },
            }
        if num_timed:
            with closing(open_engine(folder, max_rows=1)) as engine:
                ensure_costs(engine, progress=lambda text: click.echo(text, err=True))
                click.echo(f"{name}: timing {num_timed} rows of each source", err=True)
                figures["speed"] = _speed(engine, workload.of_each_source(num_timed))
        engines[name] = found["engine"] | figures
    record |= {
        "prompts": str(prompts_path),
        "rows": rows,
        "new_tokens": new_tokens,
        "temperature": temperature,
        "engines": engines,
    }
    click.echo(_report(record))
    click.echo(json.dumps(record))


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """What to call each engine: its folder's name where that is enough."""
    last = [folder.name for folder in folders]
    return {
        str(folder) if last.count(folder.name) > 1 else folder.name: folder for folder in folders
    }


def _target(engine: Engine) -> tuple[object, ...]:
    """What decides the text: engines that agree in it must agree in every row."""
    target = engine.manifest.target
    return (engine.manifest.precision, *sorted(target.files.values()))


def _sampled(workload: Workload, temperature: float) -> Workload:
    """The workload at another temperature, each row with a seed of its own."""
    prompts = [
        replace(prompt, params=replace(prompt.params, temperature=temperature, seed=prompt.row))
        for prompt in workload.prompts
    ]
    return replace(workload, prompts=tuple(prompts))


def _decode(engine: Engine, workload: Workload, mode: str) -> Decoded:
    """The workload, rows of like length together as in `run`; completions in its own order."""
    order = sorted(workload.prompts, key=lambda prompt: len(prompt.token_ids))
    run = decode_all(engine, order, mode)
    completions = {completion.row: completion for completion in run.completions}
    return replace(run, completions=tuple(completions[prompt.row] for prompt in workload.prompts))


def _by_source(run: Decoded, workload: Workload) -> dict[str, tuple[SpecCounts, int]]:
    """Counts of rounds and number of rows of each source, then of all."""
    rows = list(zip(workload.sources, run.completions, strict=True))
    names = sorted({source for source in workload.sources if source is not None})
    found = {}
    for name in [*names, _ALL]:
        counts = [c.spec for source, c in rows if name in (source, _ALL)]
        found[name] = (metrics.add(counts), len(counts))
    return found


def _figures(counts: SpecCounts, num_rows: int) -> dict[str, Any]:
    return {
        "num_rows": num_rows,
        "accepted_length": counts.accepted_length,
        "acceptance_rate": counts.acceptance_rate,
        "acceptance_by_position": metrics.acceptance_by_position(
            counts.accepted_histogram
        ).tolist(),
        "num_rounds": counts.num_rounds,
        "num_drafted_rounds": counts.num_drafted_rounds,
    }


def _speed(engine: Engine, workload: Workload) -> dict[str, Any]:
    """New tokens per second of each source and of all, by mode: one row at a time.

    The modes take turns on each source, so that a machine that slows down slows them all.
    """
    short = replace(workload.prompts[0], params=SamplingParams(max_new_tokens=_WARM_UP_TOKENS))
    for mode in MODES:
        decode_all(engine, [short], mode)
    found: dict[str, dict[str, float]] = {}
    tokens, seconds = 0, dict.fromkeys(MODES, 0.0)
    rows = list(zip(workload.sources, workload.prompts, strict=True))
    for turn, source in enumerate(sorted(set(workload.sources), key=str)):
        prompts = [prompt for name, prompt in rows if name == source]
        shift = turn % len(MODES)
        runs = {mode: decode_all(engine, prompts, mode) for mode in MODES[shift:] + MODES[:shift]}
        if source is not None:
            found[source] = {mode: runs[mode].tokens_per_second for mode in MODES}
        tokens += runs[MODES[0]].stats.num_new_tokens
        for mode, run in runs.items():
            seconds[mode] += run.seconds
    return {**found, _ALL: {mode: tokens / seconds[mode] for mode in MODES}}


def _report(record: Mapping[str, Any]) -> str:
    engines: Mapping[str, Any] = record["engines"]
    first = next(iter(engines.values()))
    num_rejected = max(engine["num_rejected"] for engine in engines.values())
    lines = [
        f"{record['hardware']}; load {record['load_average']:.2f}",
        f"{record['prompts']}, {num_rejected} rejected; {_drawn(record)}, at most "
        f"{record['new_tokens']} new tokens, whole blocks, {record['rows']} concurrent rows",
        "\nτ: tokens that a round commits, the bonus counted\n",
        table(
            ["source", "rows", *engines],
            [
                [source, str(found["num_rows"])]
                + [f"{e['sources'][source]['accepted_length']:.2f}" for e in engines.values()]
                for source, found in first["sources"].items()
            ],
        ),
        "\nShare of all rounds whose block was accepted up to a position\n",
        _position_table(engines),
    ]
    if "speed" in first:
        lines += ["\nOne row at a time: new tokens/s of plain decoding, and × plain\n"]
        lines += [_speed_table(engines)]
    if not record["temperature"]:
        lines += ["", *_verdicts(engines)]
    return "\n".join(lines)


def _drawn(record: Mapping[str, Any]) -> str:
    heat = record["temperature"]
    return f"temperature {heat:g}" if heat else "greedy"


def _position_table(engines: Mapping[str, Any]) -> str:
    longest = max(engine["block_size"] for engine in engines.values())
    lines = []
    for name, engine in engines.items():
        found = engine["sources"][_ALL]
        shares = [f"{share:.0%}" for share in found["acceptance_by_position"]]
        drafted = found["num_drafted_rounds"] / max(found["num_rounds"], 1)
        lines.append(
            [name, engine["drafter"], f"{drafted:.0%}", f"{found['acceptance_rate']:.0%}"]
            + shares
            + [""] * (longest - len(shares))
        )
    headers = ["engine", "drafter", "drafted", "of verified", *map(str, range(1, longest + 1))]
    return table(headers, lines)


def _speed_table(engines: Mapping[str, Any]) -> str:
    lines = []
    for name, engine in engines.items():
        for source, speeds in engine["speed"].items():
            plain, *others = (speeds[mode] for mode in MODES)
            ratios = [f"{speed / plain:.2f}" for speed in others]
            lines.append([name, source, f"{plain:.1f}", *ratios])
    return table(["engine", "source", "plain", *(f"`{mode}`" for mode in MODES[1:])], lines)


def _verdicts(engines: Mapping[str, Any]) -> list[str]:
    """Whether engines of one target and precision wrote the same."""
    differing = {n: e["num_differing_rows"] for n, e in engines.items() if e["num_differing_rows"]}
    if not differing:
        return ["Greedy texts of engines of one target and precision are identical."]
    counts = ", ".join(f"{name} {number}" for name, number in differing.items())
    return [f"Greedy texts differ; rows unlike the first engine of the target: {counts}"]


if __name__ == "__main__":
    main()
