"""What a draft shares with its target: whether they fit, the embedding, the output head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.spec import DraftSpec
from dspark_batch.errors import EngineError
from dspark_batch.models import DecoderSpec
from dspark_batch.models.graph import FLOAT, GraphBuilder, StoredWeight
from dspark_batch.models.weights import Weights

Array = NDArray[Any]
_ROWS = 2**12  # of two tables that are compared at a time


@dataclass(frozen=True, slots=True)
class DraftHead:
    """The output head: its rows `[D, hidden]`, and where they lie if the target wrote them.

    A shared int8 head wants its input divided by `rows` [hidden], as the target's is.
    """

    table: Array
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    rows: NDArray[np.float32] | None = None


def check_fits(spec: DraftSpec, weights: Weights, target: DecoderSpec) -> None:
    """Refuse a draft of another target.

    Raises:
        EngineError: the layers that it reads, a width or the vocabulary are not the target's.
    """
    taps, layers = list(spec.taps), target.num_layers
    if not taps or sorted(set(taps)) != taps or not all(-1 <= i < layers for i in taps):
        raise EngineError(
            f"draft config.json: target_layer_ids {taps} must be strictly increasing in "
            f"-1..{layers - 1} (the target has {layers} layers)"
        )
    if spec.hidden_size != target.hidden_size:
        raise EngineError(
            f"the draft's hidden_size {spec.hidden_size} is not the target's "
            f"{target.hidden_size}: it cannot share the target's embedding"
        )
    if spec.vocab_size != target.vocab_size:
        raise EngineError(
            f"the draft's vocab_size {spec.vocab_size} is not the target's {target.vocab_size}"
        )
    height, width = weights.shape("fc.weight")
    if (height, width) != (spec.hidden_size, len(taps) * target.hidden_size):
        raise EngineError(
            f"the draft's fc.weight is {height} x {width}, which does not fit {len(taps)} "
            f"target_layer_ids of {target.hidden_size} values each"
        )


def embedding(
    draft: Weights, target: Weights, *, builder: GraphBuilder, stored: StoredWeight
) -> StoredWeight:
    """The draft's own embedding, or the target's if it has none or an equal one."""
    name = "embed_tokens.weight"
    if name not in draft.names() or _same(draft.tensor(name), target.tensor(f"model.{name}")):
        return stored
    dtype = np.float32 if stored.data_type == FLOAT else np.float16
    builder.weight("embed_tokens", draft.tensor(name), dtype)
    return builder.stored("embed_tokens")


def head(
    draft: Weights,
    target: Weights,
    *,
    tied: bool,
    vocab: NDArray[np.int64],
    stored: Mapping[str, StoredWeight],
    rows: NDArray[np.float32] | None,
) -> DraftHead:
    """The draft's own head, or the target's: all of it as it was stored, or some of its rows.

    `stored` and `rows` are as in `DraftHead`, of the target's head.
    """
    own, name = "lm_head.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"
    table, whole = target.tensor(name), np.array_equal(vocab, np.arange(target.shape(name)[0]))
    if own in draft.names() and not (whole and _same(draft.tensor(own), table)):
        return DraftHead(draft.tensor(own))
    return DraftHead(table, stored, rows) if whole else DraftHead(table[vocab])


def tables(
    draft: Weights, target: Weights, *, tied: bool, vocab: NDArray[np.int64]
) -> tuple[Array, Array]:
    """The draft's embedding `[V, hidden]` and head `[D, hidden]`, its own or the target's."""
    name = "embed_tokens.weight"
    embed = draft.tensor(name) if name in draft.names() else target.tensor(f"model.{name}")
    return embed, head(draft, target, tied=tied, vocab=vocab, stored={}, rows=None).table


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(one[begin : begin + _ROWS], other[begin : begin + _ROWS])
        for begin in range(0, len(one), _ROWS)
    )
