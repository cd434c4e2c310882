"""What a pair would do on a machine: every strategy at every concurrency, as tables and JSON.

Everything it prints says that it is a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspark_batch.bench import table
from dspark_batch.bench.forecast.machines import Machine
from dspark_batch.bench.forecast.replay import Simulated, simulate, strategies
from dspark_batch.bench.forecast.rounds import Rounds
from dspark_batch.errors import UsageError

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PLAIN, AUTO = "plain", "auto"


@dataclass(frozen=True, slots=True)
class Carried:
    """How many rows a strategy carries when each is to get a certain speed."""

    num_rows: float
    """0 where not even one row gets it."""
    at_least: bool
    """Whether the largest concurrency that was simulated still gets it."""

    def __str__(self) -> str:
        return f"{'≥ ' if self.at_least else ''}{self.num_rows:.1f}" if self.num_rows else "none"


@dataclass(frozen=True, slots=True)
class Simulation:
    """The outcome. Invariant: `results` holds every strategy at every concurrency."""

    rounds: Rounds
    machine: Machine
    left_out: tuple[int, ...]
    """Concurrencies beyond what the machine's figures cover."""
    results: tuple[Simulated, ...]
    floor: float
    """Tokens per second that every row is to get at least."""

    def curve(self, strategy: str) -> list[Simulated]:
        """One strategy by rising concurrency."""
        return [found for found in self.results if found.strategy == strategy]

    @property
    def strategies(self) -> list[str]:
        """Names, plain decoding first."""
        return list(dict.fromkeys(found.strategy for found in self.results))

    def carried(self, strategy: str, floor: float) -> Carried:
        """The most rows of which each gets `floor` tokens per second.

        Between two concurrencies the seconds of a row's token are taken to grow linearly.
        """
        before: Simulated | None = None
        for found in self.curve(strategy):
            if found.row_tokens_per_second < floor:
                if before is None:
                    return Carried(0.0, at_least=False)
                fast, slow = 1 / before.row_tokens_per_second, 1 / found.row_tokens_per_second
                share = (1 / floor - fast) / (slow - fast)
                rows = before.num_rows + share * (found.num_rows - before.num_rows)
                return Carried(rows, at_least=False)
            before = found
        assert before is not None
        return Carried(float(before.num_rows), at_least=True)

    def queries(self, strategy: str, floor: float) -> tuple[float, str] | None:
        """What 100 rows of plain decoding become at that floor, and as text.

        None where plain decoding carries no row, or more than were simulated.
        """
        plain, other = self.carried(PLAIN, floor), self.carried(strategy, floor)
        if not plain.num_rows or plain.at_least:
            return None
        become = 100 * other.num_rows / plain.num_rows
        return become, f"{'≥ ' if other.at_least else ''}{become:.0f}"

    def lines(self) -> list[str]:
        """Lines of text for a terminal."""
        return [
            "SIMULATION, not a measurement: recorded rounds, replayed by a cost table",
            "",
            *self._about(),
            "",
            *self._assumptions(),
            "SIMULATED steady state: all rows run all the time, finished ones are replaced.",
            "",
            self._result_table(),
            "",
            *self._floor_lines(),
        ]

    def _about(self) -> list[str]:
        rounds, origin = self.rounds, self.rounds.origin
        size = len(rounds.num_new_tokens)
        lines = [
            f"rounds    {size} greedy rows, {len(rounds.num_accepted):,} positions, blocks of "
            f"{rounds.block_size}",
            f"          {origin['target']} ({origin['precision']})",
            f"          {origin['draft']}",
            f"          recorded on {origin['hardware']}",
        ]
        roofline = self.machine.roofline
        if roofline is None:
            lines.append(f"costs     measured on {self.machine.title}")
        else:
            lines += [
                f"costs     roofline of {roofline.gpu} ({roofline.gpu_source}), {roofline.dtype}",
                f"          {roofline.pair}: its size, with the acceptance of the recorded pair",
            ]
        if self.left_out:
            lines.append(f"left out  {_listed(self.left_out)} rows: {self.machine.limit}")
        return lines

    def _assumptions(self) -> list[str]:
        if self.machine.roofline is None:
            return []
        rows = [
            [name, f"{value:.4g}", unit, origin]
            for name, value, unit, origin in self.machine.roofline.assumptions()
        ]
        change = "Change one with --assume NAME=VALUE."
        return [table(["assumed", "value", "unit", "from"], rows, left=4), "", change, ""]

    def _result_table(self) -> str:
        headers = ["rows", "strategy", "simulated tokens/s", "per row", "× plain", "τ", "verified"]
        headers += ["drafted", "draft time", "prefill time"]
        rows = []
        for plain in self.curve(PLAIN):
            for found in self.results:
                if found.num_rows == plain.num_rows:
                    rows.append(
                        [
                            str(found.num_rows),
                            found.strategy,
                            f"{found.tokens_per_second:,.0f}",
                            f"{found.row_tokens_per_second:,.1f}",
                            f"{found.tokens_per_second / plain.tokens_per_second:.2f}",
                            f"{found.accepted_length:.2f}",
                            f"{found.num_verified:.2f}",
                            f"{found.drafted:.0%}",
                            f"{found.draft_share:.0%}",
                            f"{found.prefill_share:.0%}",
                        ]
                    )
        return table(headers, rows)

    def _floor_lines(self) -> list[str]:
        """Rows carried at equal speed of a row; the floors are those of plain decoding."""
        others = [name for name in self.strategies if name != PLAIN]
        rows = []
        for plain in self.curve(PLAIN)[:-1]:
            floor = plain.row_tokens_per_second
            found = self.queries(AUTO, floor)
            rows.append(
                [
                    f"{floor:,.1f}",
                    str(plain.num_rows),
                    *(str(self.carried(name, floor)) for name in others),
                    found[1] if found else "-",
                ]
            )
        lines = ["SIMULATED rows that each get a speed (tokens/s); what 100 of plain become", ""]
        lines += [table(["floor", PLAIN, *others, "100 →"], rows), ""] if rows else []
        return [*lines, self.verdict()]

    def verdict(self) -> str:
        """One sentence about the floor that was asked for."""
        floor = f"{self.floor:,.1f} tokens/s per row"
        plain, auto = self.carried(PLAIN, self.floor), self.carried(AUTO, self.floor)
        found = self.queries(AUTO, self.floor)
        if found is None:
            return f"Simulated: at {floor} plain carries {plain} rows, auto {auto}."
        return (
            f"Simulated: at no less than {floor}, 100 queries become {found[1]} "
            f"(plain carries {plain} rows, auto {auto})."
        )

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        rounds, roofline = self.rounds, self.machine.roofline
        found = self.queries(AUTO, self.floor)
        return {
            "simulation": True,
            "machine": self.machine.title,
            "rounds": {
                **rounds.origin,
                "num_rows": len(rounds.num_new_tokens),
                "num_positions": len(rounds.num_accepted),
                "block_size": rounds.block_size,
                "temperature": 0.0,
            },
            "roofline": asdict(roofline) if roofline else None,
            "costs": self.machine.costs.to_json(),
            "left_out_rows": list(self.left_out),
            "results": [
                asdict(result) | {"row_tokens_per_second": result.row_tokens_per_second}
                for result in self.results
            ],
            "floor": self.floor,
            "carried": {name: asdict(self.carried(name, self.floor)) for name in self.strategies},
            "queries_per_100": found[0] if found else None,
        }


def run_simulation(
    rounds: Rounds,
    machine: Machine,
    *,
    rows: Sequence[int] = (),
    floor: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Simulation:
    """Every strategy at every concurrency of `rows` (default: powers of two, up to 256).

    The default floor is half of what plain decoding gives a row at the lowest one. Raises
    `UsageError` if none is left that the machine's figures cover.
    """
    wanted = sorted(set(rows or ROWS))
    covered = [n for n in wanted if n <= machine.most_rows]
    if not covered:
        raise UsageError(f"--rows {wanted[0]} is too many: {machine.limit}")
    results: list[Simulated] = []
    for num_rows in covered:
        progress(f"simulating {num_rows} rows")
        for strategy in strategies(rounds.block_size):
            results.append(
                simulate(
                    rounds,
                    machine.costs,
                    strategy,
                    num_rows=num_rows,
                    prefill=machine.prefill_seconds,
                )
            )
    return Simulation(
        rounds=rounds,
        machine=machine,
        left_out=tuple(n for n in wanted if n > machine.most_rows),
        results=tuple(results),
        floor=floor or results[0].row_tokens_per_second / 2,
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
