"""Drafters: methods of proposing a block.

Those of `DRAFTERS` build a graph from a checkpoint, all with the same contract; those of `LOOKUPS`
have no weights, and propose from the rows' own tokens on the host, alone or beside a network. A
module of the latter has `open_lookup` (a manifest's draft -> `Lookup`) and, for calibration,
`replayed` and `observed` (rounds of finished texts, or beside a network), `learnt` (the draft with
what greedy and sampled ones teach), `rounds` and `rated` (either with the confidence learnt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dspark_batch.decode import DraftBlock
    from dspark_batch.decode import Sequence as Row

DRAFTERS = {"dspark": "dspark_batch.drafters.dspark", "dflash": "dspark_batch.drafters.dspark"}
LOOKUPS = {"ngram": "dspark_batch.drafters.ngram"}


class Lookup(Protocol):
    """What `open_lookup` of a module in `LOOKUPS` gives. What it proposes must be certain.

    That is, a function of the row's past alone: it is verified as drawn with probability 1.
    """

    def draft(self, sequences: Sequence[Row]) -> DraftBlock:
        """A block per row, the confidence as logits; length 0 where there is nothing to propose."""

    def release(self, slot: int) -> None:
        """The row in this slot has ended."""
