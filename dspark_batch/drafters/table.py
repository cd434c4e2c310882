"""The drafters by name: a new one is a file with a class, and a line here.

`DRAFTERS` are networks: a class writes the ONNX graph of a checkpoint. `LOOKUPS` need no network: a
class finds what to propose in text that is known already (`lookup.Source`). An engine has a
network, a lookup, or a lookup ahead of a network (`drafter.FirstOf`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.lookup import Source

if TYPE_CHECKING:
    from dspark_batch.drafters.shared import DraftHead
    from dspark_batch.drafters.spec import DraftSpec
    from dspark_batch.models.graph import GraphBuilder, StoredWeight
    from dspark_batch.models.weights import ReadTensor

DRAFTERS = {
    "dspark": "dspark_batch.drafters.dspark:DSparkGraph",
    "dflash": "dspark_batch.drafters.dspark:DSparkGraph",
}
PAGED_DRAFTERS = {
    "dspark": "dspark_batch.drafters.paged_dspark:PagedDSparkGraph",
    "dflash": "dspark_batch.drafters.paged_dspark:PagedDSparkGraph",
}
"""The same for runtimes whose steps are captured; see `paged_dspark`."""
LOOKUPS = {"ngram": "dspark_batch.drafters.ngram:Ngrams"}


class DraftGraph(Protocol):
    """What a class in `DRAFTERS` is: it writes the graph whose contract `dspark` describes."""

    def __init__(
        self,
        builder: GraphBuilder,
        spec: DraftSpec,
        tensor: ReadTensor,
        *,
        precision: str,
    ) -> None:
        """`tensor` reads the checkpoint's weights by name."""

    def build(
        self,
        *,
        embed: StoredWeight,
        head: DraftHead,
        draft_vocab: NDArray[np.int64],
        max_tokens: int,
    ) -> None:
        """Write the graph: with this embedding and head, for rows of up to `max_tokens`."""

    @property
    def builders(self) -> Sequence[GraphBuilder]:
        """Of the graphs that were written, to be saved."""


def draft_graph(drafter: str, *, paged: bool = False) -> type[DraftGraph]:
    """The class of a name in `DRAFTERS` or `PAGED_DRAFTERS`."""
    return cast("type[DraftGraph]", _named((PAGED_DRAFTERS if paged else DRAFTERS)[drafter]))


def lookup_source(drafter: str) -> type[Source]:
    """The class of a name in `LOOKUPS`."""
    return cast("type[Source]", _named(LOOKUPS[drafter]))


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


if TYPE_CHECKING:
    from dspark_batch.drafters.dspark import DSparkGraph
    from dspark_batch.drafters.ngram import Ngrams
    from dspark_batch.drafters.paged_dspark import PagedDSparkGraph

    _GRAPHS: tuple[type[DraftGraph], ...] = (DSparkGraph, PagedDSparkGraph)
    _SOURCES: tuple[type[Source], ...] = (Ngrams,)
