"""Steps of a plan: which profile takes one, its sizes rounded up, its arrays padded to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_batch.runtimes.buffers import Caches
from dspark_batch.runtimes.device import Device
from dspark_batch.runtimes.layout import Feeds
from dspark_batch.runtimes.plan_file import PlanFile
from dspark_batch.runtimes.session import Floats

# Sizes of a step by letter, and the input that shows each: R rows, S tokens of a row, T of all
# rows, N with logits, K drafts of a row. For the draft: P context tokens of a row, N of all rows.
# Shapes have two more: L is K + 1, U the uniforms of a row.
TARGET_SIZES = {
    "R": ("starts", 0),
    "S": ("token_index", 1),
    "T": ("tokens", 0),
    "N": ("logit_tokens", 0),
    "K": ("draft_tokens", 1),
}
DRAFT_SIZES = {"R": ("anchors", 0), "P": ("context_index", 1), "N": ("context_tokens", 0)}
_ROW_SHAPES = {"temperature": "R", "top_k": "R", "top_p": "R", "uniforms": "RU"}
TARGET_SHAPES = {
    "tokens": "T",
    "starts": "R",
    "token_index": "RS",
    "cell_index": "T",
    "logit_tokens": "N",
    "logit_rows": "RL",
    "draft_tokens": "RK",
    "lengths": "R",
    **_ROW_SHAPES,
}
DRAFT_SHAPES = {
    "context_tokens": "N",
    "context_index": "RP",
    "context_starts": "R",
    "anchors": "R",
    "anchor_positions": "R",
    **_ROW_SHAPES,
}


def rounded(size: int) -> int:
    """The next of few sizes: four in an octave, so at most a quarter more."""
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a plan: its profile, the place of its first row, its sizes by letter."""

    profile: int
    first: int
    sizes: dict[str, int]


class Model:
    """A plan with its caches, and the sizes that its profiles take."""

    def __init__(
        self, plan: PlanFile, device: Device, num_rows: int, letters: dict[str, tuple[str, int]]
    ) -> None:
        self.plan = plan
        self.caches = Caches(device, plan, num_rows)
        self.num_uniforms = plan.most("uniforms")[1]
        self._bounds = [
            {
                letter: (b[name][0][axis], b[name][1][axis])
                for letter, (name, axis) in letters.items()
            }
            for b in plan.profiles
        ]

    def most(self, letter: str) -> int:
        """The largest size in any profile."""
        return max(bounds[letter][1] for bounds in self._bounds)

    def step(self, first: int, wanted: dict[str, int], padded: dict[str, int]) -> Step | None:
        """A step in the first profile that takes the wanted sizes, padded as far as it allows."""
        for profile, bounds in enumerate(self._bounds):
            if all(size <= bounds[letter][1] for letter, size in wanted.items()):
                sizes = {
                    letter: max(min(padded[letter], bounds[letter][1]), bounds[letter][0])
                    for letter in wanted
                }
                sizes["U"] = self.num_uniforms
                return Step(profile, first, sizes)
        return None


def pad(feeds: Feeds, shapes: dict[str, str], sizes: dict[str, int]) -> Feeds:
    """Arrays of padded shapes; a row that is added is greedy.

    A row's last index is repeated for its padding, so that it gets no values of another row's.
    """
    found: Feeds = {}
    for name, letters in shapes.items():
        array = feeds[name]
        shape = tuple(sizes[letter] for letter in letters)
        wide = np.full(shape, 1.0 if name == "top_p" else 0, array.dtype)
        wide[tuple(map(slice, array.shape))] = array
        if name in ("token_index", "logit_rows", "context_index"):
            wide[: len(array), array.shape[1] :] = array[:, -1:]
        found[name] = wide
    if "cell_index" in found:  # cells are counted row after row, and rows have more of them now
        row, cell = np.divmod(feeds["cell_index"], feeds["token_index"].shape[1])
        found["cell_index"][: len(row)] = row * sizes["S"] + cell
    return found


def widened(uniforms: Floats, width: int) -> Floats:
    """`[R, n]` to the plan's width: drafts' uniforms come first, the bonus token's last."""
    wide = np.zeros((len(uniforms), width), np.float32)
    wide[:, : uniforms.shape[1] - 1] = uniforms[:, :-1]
    wide[:, -1] = uniforms[:, -1]
    return wide
