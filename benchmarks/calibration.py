"""How far the draft's confidence can be believed, position by position, on prompts of your choice.

Rounds verify their whole block, greedily and at temperature 1. Survival, the product of
confidences, is compared with whether the block was accepted up to there: without scaling, and with
the temperatures that the engine's export fitted on other prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from report import BenchmarkCommand, provenance, table

from dspark_batch.bench import new_figure, read_workload, save_figure
from dspark_batch.decode import Prompt
from dspark_batch.decode.algorithm import calibration
from dspark_batch.engine import open_engine
from dspark_batch.errors import UsageError
from dspark_batch.export import observe_rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dspark_batch.engine import DraftInfo

_KINDS = {"greedy": 0.0, "sampled": 1.0}  # and their temperature
_LEAST_ITEMS = 20  # of a bin that is drawn


@click.command(name="calibration", cls=BenchmarkCommand)
@click.argument("engine_folder", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    default=Path("jobs/prompts.parquet"),
    show_default=True,
    help="Parquet file as for `run`.",
)
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=96, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many rows of the file.")
@click.option(
    "--figure",
    "figure_path",
    type=click.Path(path_type=Path),
    default=Path("reliability.png"),
    show_default=True,
    help="PNG file to write; needs the extra `plots`.",
)
@click.pass_context
def main(
    ctx: click.Context,
    engine_folder: Path,
    prompts_path: Path,
    rows: int,
    new_tokens: int,
    limit: int | None,
    figure_path: Path,
) -> None:
    """Tabulate and draw the calibration of ENGINE's draft, for greedy and for sampled rows.

    \b
    Example:
      python benchmarks/calibration.py engines/model --prompts eval.parquet
    """
    figure = new_figure("", width=11.0)
    with closing(open_engine(engine_folder, max_rows=rows)) as engine:
        draft = engine.manifest.draft
        if draft is None:
            raise UsageError(f"{engine_folder} has no draft: there is no confidence to calibrate")
        record = provenance(ctx, engine)
        workload = read_workload(prompts_path, engine, new_tokens=new_tokens, limit=limit)
        found = {}
        for kind, temperature in _KINDS.items():
            click.echo(f"decoding {len(workload.prompts)} rows, {kind}", err=True)
            found[kind], _ = observe_rounds(engine, _at(workload.prompts, temperature))
    record |= {"prompts": str(prompts_path), "num_rejected": workload.num_rejected, "kinds": {}}
    for axes, (kind, rounds) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        if not len(rounds.accepted):
            raise UsageError(f"no round had room for a block: raise --new-tokens {new_tokens}")
        temperatures = _temperatures(draft, kind)
        record["kinds"][kind] = figures = _figures(rounds, temperatures)
        click.echo(
            f"\n{kind} rows: {len(rounds.accepted)} rounds of {len(workload.prompts)} rows\n"
        )
        click.echo(_table(figures))
        _draw(axes, kind, rounds, temperatures)
    figure.suptitle(f"{engine_folder} on {prompts_path}: accepted up to a position", fontsize=11)
    save_figure(figure, figure_path)
    click.echo(f"\nreliability: {figure_path}\n")
    click.echo(json.dumps(record))


def _at(prompts: Sequence[Prompt], temperature: float) -> list[Prompt]:
    """The prompts at a temperature, each with draws of its own."""
    return [
        replace(prompt, params=replace(prompt.params, temperature=temperature, seed=prompt.row))
        for prompt in prompts
    ]


def _temperatures(draft: DraftInfo, kind: str) -> tuple[float, ...]:
    sampled = draft.sampled_temperatures if kind == "sampled" else ()
    return sampled or draft.confidence_temperatures


def _figures(rounds: calibration.Rounds, temperatures: Sequence[float]) -> dict[str, Any]:
    """By position, each [γ]."""
    plain, scaled = rounds.survival(np.ones(len(temperatures))), rounds.survival(temperatures)
    survived = rounds.survived
    positions = range(len(temperatures))
    return {
        "num_rounds": len(rounds.accepted),
        "temperatures": list(temperatures),
        "accepted": survived.mean(axis=0).tolist(),
        "error_before": rounds.errors(np.ones(len(temperatures))).tolist(),
        "error_after": rounds.errors(temperatures).tolist(),
        "auroc": [calibration.discrimination(scaled[:, k], survived[:, k]) for k in positions],
        "brier_before": [calibration.brier_score(plain[:, k], survived[:, k]) for k in positions],
        "brier_after": [calibration.brier_score(scaled[:, k], survived[:, k]) for k in positions],
    }


def _table(figures: Mapping[str, Any]) -> str:
    headers = ["position", "temperature", "accepted", "ECE before", "ECE after"]
    headers += ["AUROC", "Brier before", "Brier after"]
    shown = ("temperatures", "accepted", "error_before", "error_after", "auroc")
    columns = [figures[name] for name in (*shown, "brier_before", "brier_after")]
    formats = ("{:.2f}", "{:.1%}", "{:.1%}", "{:.1%}", "{:.2f}", "{:.3f}", "{:.3f}")
    return table(
        headers,
        [
            [str(k), *(form.format(value) for form, value in zip(formats, values, strict=True))]
            for k, values in enumerate(zip(*columns, strict=True), start=1)
        ],
    )


def _draw(axes: Axes, kind: str, rounds: calibration.Rounds, temperatures: Sequence[float]) -> None:
    """Observed against predicted frequency: every position scaled, all of them together not."""
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    survived, unscaled = rounds.survived, rounds.survival(np.ones(len(temperatures)))
    curves = [("all, unscaled", unscaled.ravel(), survived.ravel(), "#999999", "--")]
    scaled = rounds.survival(temperatures)
    for k in range(len(temperatures)):
        shade = f"C{k}"
        curves.append((f"position {k + 1}", scaled[:, k], survived[:, k], shade, "-"))
    for name, predicted, observed, color, style in curves:
        count, mean, frequency = calibration.reliability(predicted, observed, num_bins=10)
        shown = count >= _LEAST_ITEMS
        axes.plot(mean[shown], frequency[shown], style, marker=".", label=name, color=color)
    axes.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"{kind}, {len(rounds.accepted)} rounds", fontsize=10)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
