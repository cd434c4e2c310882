"""Steps of a plan: which profile takes one, its sizes rounded up, its arrays padded to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_batch.engine.runtimes.buffers import Caches, staged_bytes
from dspark_batch.engine.runtimes.device import Device
from dspark_batch.engine.runtimes.layout import DRAFT_INPUTS, TARGET_INPUTS, Feeds
from dspark_batch.engine.runtimes.plan_file import PlanFile
from dspark_batch.engine.runtimes.session import Floats
from dspark_batch.errors import EngineError
from dspark_batch.models.plugin import contract


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph as this program feeds it: its inputs and outputs, the caches aside.

    Sizes have names. R rows, S tokens of a row, T of all rows, and those of the verification op's
    contract; for the draft P context tokens of a row, N of all rows.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, tuple[str, int]]
    """The input that shows a size, and the axis."""
    shapes: dict[str, tuple[str, ...]]
    """Of the inputs that the host sends with every step."""


def _shapes(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of operands of the verification op."""
    return {name: contract.OPERANDS[name].shape for name in names}


TARGET = Graph(
    name="target",
    inputs=TARGET_INPUTS,
    outputs=("num_accepted", "bonus", "context"),
    sizes={
        "R": ("starts", 0),
        "S": ("token_index", 1),
        "T": ("tokens", 0),
        "N": ("logit_tokens", 0),
        "K": ("draft_tokens", 1),
    },
    shapes={
        "tokens": ("T",),
        "starts": ("R",),
        "token_index": ("R", "S"),
        "cell_index": ("T",),
        "logit_tokens": ("N",),
        **_shapes(name for name in contract.FED if name != "draft_logits"),
    },
)
DRAFT = Graph(
    name="draft",
    inputs=DRAFT_INPUTS,
    outputs=("draft_tokens", "confidence", "draft_logits"),
    sizes={"R": ("anchors", 0), "P": ("context_index", 1), "N": ("context_tokens", 0)},
    shapes={
        "context_tokens": ("N",),
        "context_index": ("R", "P"),
        "context_starts": ("R",),
        "anchors": ("R",),
        "anchor_positions": ("R",),
        **_shapes(contract.SAMPLING),
    },
)


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
    """One opened plan of a pair, with its caches and the sizes that its profiles take."""

    def __init__(self, graph: Graph, plan: PlanFile, device: Device, num_rows: int) -> None:
        """Refuse a plan that has other inputs or outputs; allocate the caches."""
        self.graph = graph
        self.plan = plan
        tensors = (*plan.inputs, *plan.outputs)
        found = {name for name in tensors if not name.startswith(("past_", "present_"))}
        differing = found ^ {*graph.inputs, *graph.outputs}
        if differing:
            raise EngineError(
                f"{plan.path} was built by another version: {', '.join(sorted(differing))} differ",
                hint=plan.again,
            )
        self.caches = Caches(device, plan, num_rows)
        self.num_uniforms = plan.most("uniforms")[1]
        self._bounds = [
            {
                letter: (bounds[name][0][axis], bounds[name][1][axis])
                for letter, (name, axis) in graph.sizes.items()
            }
            for bounds in plan.profiles
        ]

    def sent_bytes(self) -> int:
        """Room for what the host sends with any step."""
        return staged_bytes(self.plan, set(self.graph.shapes))

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
                sizes["G1"] = self.num_uniforms
                if "K" in sizes:
                    sizes["K1"] = sizes["K"] + 1
                return Step(profile, first, sizes)
        return None


def pad(feeds: Feeds, graph: Graph, sizes: dict[str, int]) -> Feeds:
    """What the host sends, in padded shapes; a row that is added is greedy.

    A row's last index is repeated for its padding, so that it gets no values of another row's.
    """
    found: Feeds = {}
    for name, dimensions in graph.shapes.items():
        array = feeds[name]
        shape = tuple(sizes[size] for size in dimensions)
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


def cut(
    places: Sequence[int | None], step: Callable[[list[int]], Step | None]
) -> list[tuple[list[int], Step]]:
    """Cut the rows of a call, given by place, where one takes no part and where `step` is None.

    Raises:
        EngineError: no profile takes a row alone.
    """
    runs: list[list[int]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    found: list[tuple[list[int], Step]] = []
    for run in runs:
        while run:
            size = len(run)
            while (fitting := step(run[:size])) is None:
                size -= 1
                if not size:
                    raise EngineError("no profile of the plan takes this step")
            found.append((run[:size], fitting))
            run = run[size:]
    return found
