"""How the tokens of a step lie in the graphs' inputs: the same for every runtime.

R rows with T tokens in all, S the most of one row, N tokens whose logits are wanted, K the longest
draft that is verified. `models/decoder.py` and `drafters/dspark.py` say what the inputs mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.engine.runtimes.session import Draws, Ints, Span
from dspark_batch.models.plugin import contract

TARGET_INPUTS = (
    *("tokens", "starts", "token_index", "cell_index", "logit_tokens"),
    *contract.FED,
)
DRAFT_INPUTS = (
    *("context", "context_tokens", "context_index", "context_starts"),
    *("anchors", "anchor_positions"),
    *contract.SAMPLING,
)

Feeds = dict[str, NDArray[Any]]


def token_layout(counts: Ints) -> tuple[Ints, Ints]:
    """`token_index` [R, S] and `cell_index` [T] of rows with `counts` [R] tokens each.

    Padding cells point to the row's last token.
    """
    offsets = np.arange(int(counts.max()))[None, :]
    first = (np.cumsum(counts) - counts)[:, None]
    inside = offsets < counts[:, None]
    token_index = first + np.minimum(offsets, counts[:, None] - 1)
    return token_index, np.flatnonzero(inside)


def target_feeds(spans: Sequence[Span], lengths: Ints, draws: Draws) -> Feeds:
    """Every input of a target's pass but the draft's distributions and the caches."""
    counts = np.array([len(span.tokens) for span in spans])
    token_index, cell_index = token_layout(counts)
    return {
        "tokens": np.concatenate([span.tokens for span in spans]),
        "starts": np.array([span.start for span in spans]),
        "token_index": token_index,
        "cell_index": cell_index,
        **_logit_feeds(spans, counts, lengths),
        "lengths": lengths,
        "certain": np.array([span.certain for span in spans], np.int64),
        **row_feeds(draws),
    }


def row_feeds(draws: Draws) -> Feeds:
    """The inputs that say how a row samples."""
    return {name: getattr(draws, name) for name in contract.SAMPLING}


def idle_draws(num_rows: int, num_uniforms: int) -> Draws:
    """Draws of a pass whose tokens are not used."""
    zeros = np.zeros(num_rows, np.float32)
    uniforms = np.zeros((num_rows, num_uniforms), np.float32)
    return Draws(zeros, zeros.astype(np.int64), zeros + 1, uniforms)


def place_draws(draws: Draws, places: Sequence[int], num_rows: int) -> Draws:
    """The draws of `num_rows` rows that has these rows at `places`, and idle ones else."""
    found = idle_draws(num_rows, draws.uniforms.shape[1])
    for wide, array in zip(row_feeds(found).values(), row_feeds(draws).values(), strict=True):
        wide[places] = array
    return found


def _logit_feeds(spans: Sequence[Span], counts: Ints, lengths: Ints) -> Feeds:
    """Which tokens get logits (the last 1 + ℓ of each row), and the drafts among them."""
    wanted = lengths + 1
    ends, logit_ends = np.cumsum(counts), np.cumsum(wanted)
    num_drafts = int(lengths.max())
    columns = np.minimum(np.arange(num_drafts + 1)[None, :], lengths[:, None])
    draft_tokens = np.zeros((len(spans), num_drafts), np.int64)
    for r, (span, length) in enumerate(zip(spans, lengths.tolist(), strict=True)):
        draft_tokens[r, :length] = span.tokens[len(span.tokens) - length :]
    return {
        "logit_tokens": np.concatenate(
            [np.arange(end - n, end) for end, n in zip(ends, wanted, strict=True)]
        ),
        "logit_rows": (logit_ends - wanted)[:, None] + columns,
        "draft_tokens": draft_tokens,
    }
