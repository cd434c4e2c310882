"""The figures of a simulation: frontier, throughput, and what 100 queries become.

The first two follow figures 7 and 8 of the DSpark paper. Every title says "simulation".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.bench import new_figure, save_figure
from dspark_batch.bench.forecast.simulation import AUTO, PLAIN, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {PLAIN: ("#444444", "o"), AUTO: ("#c2410c", "D")}  # the two that are compared
_OTHERS = (("#1d4ed8", "s"), ("#0891b2", "^"), ("#65a30d", "v"), ("#a21caf", "P"))
_NUM_FLOORS = 60  # points of a curve over floors
_QUERY_TICKS = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_LABEL_DISTANCE = 0.035  # of the figure, between labelled points


def draw_figures(simulation: Simulation, folder: Path) -> list[Path]:
    """Write the PNG files into `folder`. Raises `UsageError` where matplotlib is missing."""
    paths = []
    for name, figure in _figures(simulation):
        paths.append(folder / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths


def _figures(simulation: Simulation) -> Iterator[tuple[str, Figure]]:
    yield "frontier", frontier(simulation)
    yield "throughput", throughput(simulation)
    yield "queries", queries(simulation)


def frontier(simulation: Simulation) -> Figure:
    """Throughput against the speed of a row; each point is a number of concurrent rows."""
    figure = new_figure(_title("throughput against the speed of a row", simulation), height=5.6)
    axes = figure.subplots()
    for name, style in _lines(simulation):
        curve = simulation.curve(name)
        speeds = [found.row_tokens_per_second for found in curve]
        axes.plot(speeds, [found.tokens_per_second for found in curve], label=name, **style)
        if name in (PLAIN, AUTO):
            _label_rows(axes, name, simulation)
    axes.axvline(simulation.floor, color="#999999", linestyle=":", linewidth=1.2)
    axes.text(0.99, 0.6, _floor_note(simulation), transform=axes.transAxes, ha="right", fontsize=8)
    axes.set(xlabel="tokens/s per row", ylabel="tokens/s of all rows", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize=8, loc="upper right")
    _finish(axes)
    return figure


def throughput(simulation: Simulation) -> Figure:
    """Throughput, speed-up and verified tokens against concurrency."""
    figure = new_figure(_title("concurrency", simulation), width=11.0, height=4.4)
    panels = figure.subplots(1, 3)
    plain = [found.tokens_per_second for found in simulation.curve(PLAIN)]
    for name, style in _lines(simulation):
        curve = simulation.curve(name)
        rows = [found.num_rows for found in curve]
        speeds = [found.tokens_per_second for found in curve]
        ratios = [speed / of for speed, of in zip(speeds, plain, strict=True)]
        panels[0].plot(rows, speeds, label=name, **style)
        panels[1].plot(rows, ratios, label=name, **style)
        panels[2].plot(rows, [found.num_verified for found in curve], label=name, **style)
    panels[0].legend(fontsize=8)
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    labels = ("tokens/s of all rows", "× plain decoding", "verified draft tokens per row and round")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xscale("log", base=2)
        rows = [found.num_rows for found in simulation.curve(PLAIN)]
        axes.set_xticks(rows, [str(n) for n in rows])
        axes.set(xlabel="concurrent rows", ylabel=label, ylim=(0, None))
        _finish(axes)
    return figure


def queries(simulation: Simulation) -> Figure:
    """What 100 queries of plain decoding become at each speed that a row is to get."""
    figure = new_figure(_title("queries at equal speed of a row", simulation), height=4.4)
    axes = figure.subplots()
    speeds = [found.row_tokens_per_second for found in simulation.curve(PLAIN)]
    low, high = min(speeds), max(speeds)
    floors = [low + (high - low) * i / _NUM_FLOORS for i in range(1, _NUM_FLOORS + 1)]
    curves = {
        name: [(floor, become) for floor in floors if (become := _become(simulation, name, floor))]
        for name in simulation.strategies
    }
    numbers = [100.0, *(become for curve in curves.values() for _, become in curve)]
    lowest, highest = min(numbers) / 1.3, max(numbers) * 1.3
    # Before any curve: an axis that has to find its own limits warns where all numbers are equal.
    axes.set_yscale("log")
    axes.set_ylim(lowest, highest)
    for name, style in _lines(simulation):
        axes.plot(
            [x for x, _ in curves[name]],
            [y for _, y in curves[name]],
            label=name,
            **style | {"marker": ""},
        )
    axes.axvline(simulation.floor, color="#999999", linestyle=":", linewidth=1.2)
    axes.set(xlabel="floor, tokens/s per row", ylabel="queries per 100 of plain decoding")
    ticks = [tick for tick in _QUERY_TICKS if lowest <= tick <= highest]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    _finish(axes)
    return figure


def _become(simulation: Simulation, name: str, floor: float) -> float:
    """What 100 queries become; 0 where nothing can be said, or nothing is left of them."""
    found = simulation.queries(name, floor)
    return found[0] if found else 0.0


def _floor_note(simulation: Simulation) -> str:
    plain, auto = (simulation.carried(name, simulation.floor) for name in (PLAIN, AUTO))
    found = simulation.queries(AUTO, simulation.floor)
    note = f"floor {simulation.floor:,.1f} tokens/s per row:\nplain {plain} rows, auto {auto}"
    return f"{note}\n100 queries become {found[1]}" if found else note


def _lines(simulation: Simulation) -> Iterator[tuple[str, dict[str, Any]]]:
    others = cycle(_OTHERS)
    for name in simulation.strategies:
        color, marker = _STYLES.get(name) or next(others)
        strong = name in _STYLES
        yield (
            name,
            {
                "color": color,
                "marker": marker,
                "markersize": 5 if strong else 4,
                "linewidth": 2.0 if strong else 1.2,
                "zorder": 3 if strong else 2,
            },
        )


def _label_rows(axes: Axes, name: str, simulation: Simulation) -> None:
    """The number of rows beside each point that is not too close to one that has it."""
    curve = simulation.curve(name)
    fastest = max(found.row_tokens_per_second for found in simulation.results)
    highest = max(found.tokens_per_second for found in simulation.results)
    labelled: tuple[float, float] | None = None
    for found in reversed(curve):
        point = (found.row_tokens_per_second / fastest, found.tokens_per_second / highest)
        if labelled and max(abs(a - b) for a, b in zip(point, labelled, strict=True)) < (
            _LABEL_DISTANCE
        ):
            continue
        labelled = point
        axes.annotate(
            str(found.num_rows),
            (found.row_tokens_per_second, found.tokens_per_second),
            xytext=(6, 4) if name == AUTO else (-6, -10),
            ha="left" if name == AUTO else "right",
            textcoords="offset points",
            fontsize=8,
            color=_STYLES[name][0],
        )


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _title(what: str, simulation: Simulation) -> str:
    accepted = f"acceptance recorded with the engine {simulation.rounds.origin['engine']}"
    return f"SIMULATION, not measured: {what}\n{simulation.machine.title}\n{accepted}"
