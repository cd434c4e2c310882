"""Text of two correct runtimes: the same, or parted where two tokens are as good as each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[int, ...]
LogitsOf = Callable[[Sequence[Tokens]], Sequence[NDArray[np.float32]]]


def assert_same_but_for_ties(
    found: dict[int, Tokens],
    expected: dict[int, Tokens],
    prompts: dict[int, Tokens],
    logits_of: LogitsOf,
    *,
    tie: float,
) -> int:
    """Where a row's texts part, their tokens' logits are within `tie`; the number of such rows.

    What follows a parting is another text's, so nothing is asked of it.
    """
    assert found.keys() == expected.keys()
    parted = {row for row in found if found[row] != expected[row]}
    for row in parted:
        pair = zip(found[row], expected[row], strict=False)
        place = next(i for i, (mine, theirs) in enumerate(pair) if mine != theirs)
        (logits,) = logits_of([prompts[row] + expected[row][:place]])
        mine, theirs = logits[-1][found[row][place]], logits[-1][expected[row][place]]
        assert abs(mine - theirs) <= tie, (row, place, float(mine), float(theirs))
    return len(parted)
