"""Machines to simulate: the one that was measured, or one of which only figures are here."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_batch.bench.forecast.roofline import Roofline
from dspark_batch.bench.forecast.rounds import Rounds
from dspark_batch.decode.algorithm import CostTable
from dspark_batch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Machine:
    """Whose costs are simulated."""

    title: str
    """In a few words, for titles."""
    costs: CostTable
    most_rows: int
    limit: str
    """What limits the rows: measurement or memory."""
    roofline: Roofline | None = None

    def prefill_seconds(self, num_rows: int, num_tokens: int) -> float:
        """A pass over prompts; a measured table's last slope goes on beyond its grid."""
        if self.roofline is not None:
            return self.roofline.verify_seconds(num_rows, num_tokens)
        return self.costs.verify(num_rows, num_tokens)


def measured_machine(hardware: str, costs: CostTable) -> Machine:
    """The machine that an engine's cost table was measured on."""
    most = costs.rows[-1]
    return Machine(hardware, costs, most, f"its cost table was measured up to {most}")


def roofline_machine(roofline: Roofline, rounds: Rounds) -> Machine:
    """A GPU that is not here. Raises `UsageError` where not one row fits into its memory."""
    most = roofline.most_rows(rounds.longest_row)
    if not most:
        raise UsageError(
            f"{roofline.pair} in {roofline.dtype} takes {roofline.weights_gb:.1f} GB, too much for "
            f"the {roofline.memory_gb:g} GB of {roofline.gpu}",
            hint="choose another --gpu or --dtype",
        )
    title = f"{roofline.gpu}, {roofline.pair}, {roofline.dtype}"
    limit = f"memory holds {most} rows of {rounds.longest_row} tokens"
    return Machine(title, roofline.costs(), most, limit, roofline)
