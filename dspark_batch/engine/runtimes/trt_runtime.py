"""TensorRT on an NVIDIA GPU: both plans of a pair, with everything large kept on the device.

Rows lie side by side in the caches; a step binds the place of its first row. Hidden states and
draft logits never leave the device: the target's context goes into a ring from which the draft
picks what was committed, and draft logits are written where the target reads them. Per step the
host sends one piece of small inputs and reads one of results.

Sizes of a step are rounded up, so that few of them differ and each can be a CUDA graph
(`plan_file`). That is sound because of what padding touches:

- a row more is a free place behind the last live row. What it computes is ignored, and its caches
  are zeroed when a row is admitted there. A step whose rows end before the last live one gets none.
- a cell more of a row lies beyond the row's tokens, where it is masked and later overwritten.
- a token, logit or draft more is referred to by none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark_batch.decode import DraftBlock, VerifyResult
from dspark_batch.engine import EngineManifest
from dspark_batch.engine.runtimes.buffers import RowBuffer, Staging, host_type
from dspark_batch.engine.runtimes.device import Device
from dspark_batch.engine.runtimes.layout import (
    Feeds,
    idle_draws,
    place_draws,
    row_feeds,
    target_feeds,
    token_layout,
)
from dspark_batch.engine.runtimes.plan_file import PlanFile, Shape
from dspark_batch.engine.runtimes.session import (
    PREFILL,
    Draws,
    Floats,
    Ints,
    Runtime,
    Span,
)
from dspark_batch.engine.runtimes.steps import (
    DRAFT,
    TARGET,
    Graph,
    Model,
    Step,
    cut,
    pad,
    rounded,
    widened,
)
from dspark_batch.errors import EngineError

_ROW_ALIGNMENT = 16  # bytes; kernels read a row in pieces of that size


@dataclass(slots=True)
class _Row:
    """What the draft's cache holds of one slot, and where its other context waits in the ring."""

    num_taken: int = 0
    pending: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


class TrtRuntime(Runtime):
    """A `Runtime` on the plans of one engine folder."""

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        max_rows: int,
        *,
        trt: Any,
        device: Device,
        graphs: bool = True,
        kernels_for: str = "",
    ) -> None:
        """Open the plans; `trt` has the plugin registered, `device` is closed with the runtime.

        `kernels_for` is as in `PlanFile`.

        Raises:
            EngineError: a plan is of another version, or there is no room for it.
        """
        self._device = device
        self._max_rows = max_rows
        self._slots: list[int] = []  # by place
        self._rows: dict[int, _Row] = {}

        def open_model(graph: Graph) -> Model:
            path = folder / f"{graph.name}.plan"
            plan = PlanFile(
                trt,
                device,
                path,
                again=manifest.export_command,
                graphs=graphs,
                kernels_for=kernels_for,
            )
            return Model(graph, plan, device, max_rows)

        self._target = open_model(TARGET)
        with_graph = manifest.draft is not None and manifest.draft.cache is not None
        self._draft = open_model(DRAFT) if with_graph else None
        self._check_sizes(manifest)
        self._allocate()
        for model in self._models():
            model.plan.open_contexts()
        device.synchronize()

    def _models(self) -> list[Model]:
        """The draft's first: it is small, and what it leaves is for the target's weights."""
        return [self._target] if self._draft is None else [self._draft, self._target]

    def _check_sizes(self, manifest: EngineManifest) -> None:
        """Refuse plans that do not take what they will be given."""
        again = f"build the engine again: {manifest.export_command}"
        chunk = min(PREFILL.chunk, manifest.limits.max_tokens)
        if self._target.most("S") < chunk or self._target.most("T") < chunk:
            raise EngineError(
                f"{self._target.plan.path} takes fewer than {chunk} tokens of a row at once",
                hint=again,
            )
        if self._draft is not None:
            given = self._target.plan.outputs["context"]
            taken = self._draft.plan.inputs["context"]
            if (given.dtype, given.shape[1]) != (taken.dtype, taken.shape[1]):
                raise EngineError(
                    f"{self._draft.plan.path} takes context of another type or width than "
                    f"{self._target.plan.path} gives",
                    hint=again,
                )

    def _allocate(self) -> None:
        """All device memory that is not a cache or TensorRT's own."""
        device, target, most = self._device, self._target.plan, self._target.most
        _, self._block_size, self._draft_vocab_size = target.most("draft_logits")
        context = target.outputs["context"]
        self._context_bytes = context.num_bytes(context.shape[1:])  # of a token
        self._unread = {"context": device.allocate(most("T") * self._context_bytes)}
        """The output at a fixed place, which a captured step writes again and again."""
        proposal = 4 * self._block_size * self._draft_vocab_size
        if self._draft is not None and proposal % _ROW_ALIGNMENT:
            raise EngineError(
                f"{target.path}: draft logits of a row are {proposal} bytes, not a multiple of "
                f"{_ROW_ALIGNMENT}: pad the draft's vocabulary of {self._draft_vocab_size} tokens"
            )
        self._proposals = RowBuffer(device, self._max_rows, proposal)
        if self._draft is not None:
            num_places = self._draft.plan.most("context")[0]
            if num_places <= most("T"):
                raise EngineError(
                    f"{self._draft.plan.path}: {num_places} places for context are too few for "
                    f"a pass of {most('T')} tokens"
                )
            self._ring = RowBuffer(device, num_places, self._context_bytes)
            self._ring_size = num_places
            self._head = 1  # place 0 stays zero, for what has no context
        self._sent = Staging(device, max(model.sent_bytes() for model in self._models()))
        # Two int64 of a row, or a block of int64 and float32: with room for alignment.
        self._fetched = Staging(device, self._max_rows * (16 + 12 * self._block_size) + 1024)

    # rows ---------------------------------------------------------------------------------------

    def admit(self, slot: int) -> None:
        """Begin a row behind the last one, in zeroed caches."""
        self._rows[slot] = _Row()
        for model in self._models():
            model.caches.zero(len(self._slots))
        self._slots.append(slot)

    def release(self, slot: int) -> None:
        """End a row; the last one takes its place, so that live rows stay neighbours."""
        del self._rows[slot]
        place, last = self._slots.index(slot), len(self._slots) - 1
        if place != last:
            for model in self._models():
                model.caches.move(place, last)
            self._slots[place] = self._slots[last]
        self._slots.pop()

    def close(self) -> None:
        """Free contexts, weights and device memory."""
        self._device.synchronize()
        for model in self._models():
            model.plan.close()
        self._device.close()

    # target -------------------------------------------------------------------------------------

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        """One target pass, where the rows are neighbours and a profile takes them all."""
        num_accepted = np.zeros(len(spans), np.int64)
        bonus = np.zeros(len(spans), np.int64)
        for places, step in self._target_steps(spans, lengths):
            chosen = [spans[i] for i in places]
            if self._draft is not None:
                self._make_room(sum(len(span.tokens) for span in chosen))
            results = self._target_pass(step, chosen, lengths[places], draws.select(places))
            num_accepted[places], bonus[places] = results
            self._note(chosen, lengths[places], results[0])
        return VerifyResult(num_accepted, bonus)

    def context(self, spans: list[Span]) -> list[Floats]:
        """One target pass over known tokens: the only one whose context the host reads."""
        plain = np.zeros(len(spans), np.int64)
        draws = idle_draws(len(spans), self._block_size + 1)
        tensor = self._target.plan.outputs["context"]
        found: dict[int, Floats] = {}
        for places, step in self._target_steps(spans, plain):
            chosen = [spans[i] for i in places]
            self._target_pass(step, chosen, plain[places], draws.select(places))
            ends = np.cumsum([len(span.tokens) for span in chosen])
            rows = np.empty(int(ends[-1]) * self._context_bytes, np.uint8)
            self._device.download(rows, self._unread["context"])
            self._device.synchronize()
            values = rows.view(host_type(tensor.dtype)).reshape(-1, tensor.shape[1])
            found |= zip(places, np.split(values.astype(np.float32), ends[:-1]), strict=True)
        return [found[i] for i in range(len(spans))]

    def _target_steps(self, spans: list[Span], lengths: Ints) -> list[tuple[list[int], Step]]:
        counts = np.array([len(span.tokens) for span in spans])
        starts = np.array([span.start for span in spans])

        def step(places: list[int]) -> Step | None:
            num, most = counts[places], int(counts[places].max())
            wanted = {
                "R": len(places),
                "S": most,
                "T": int(num.sum()),
                "N": int((lengths[places] + 1).sum()),
                "K": int(lengths[places].max()),
            }
            first, num_rows = self._extent([spans[i].slot for i in places])
            block = self._block_size + 1
            cells = most if most == 1 else block if most <= block else rounded(most)
            room = self._target.caches.capacity - int(starts[places].max())
            padded = {
                "R": num_rows,
                "S": min(cells, room),
                "T": rounded(wanted["T"]),
                "N": rounded(wanted["N"]),
                "K": self._block_size if wanted["K"] else 0,
            }
            return self._target.step(first, wanted, padded) if most <= room else None

        return self._steps([span.slot for span in spans], step)

    def _target_pass(
        self, step: Step, spans: list[Span], lengths: Ints, draws: Draws
    ) -> tuple[Ints, Ints]:
        model, sizes = self._target, step.sizes
        feeds = target_feeds(spans, lengths, draws)
        feeds["uniforms"] = widened(draws.uniforms, model.num_uniforms)
        given = pad(feeds, TARGET, sizes)
        shapes: dict[str, Shape] = {name: array.shape for name, array in given.items()}
        addresses = self._sent.send(given, model.plan)
        shapes["draft_logits"] = (sizes["R"], self._block_size, self._draft_vocab_size)
        # Without a draft nothing is read there, and rows of it would not be aligned.
        place = step.first if self._draft is not None else 0
        addresses["draft_logits"] = self._proposals.address(place)
        results = {"num_accepted": (sizes["R"],), "bonus": (sizes["R"],)}
        addresses |= self._unread | self._fetched.places(results, model.plan)
        self._run(model, step, shapes, addresses)
        fetched = self._fetched.fetch(results, model.plan)
        num_accepted, bonus = (fetched[name][: len(spans)] for name in results)
        return num_accepted, bonus

    def _note(self, spans: list[Span], lengths: Ints, num_accepted: Ints) -> None:
        """Keep the context in the ring, and where that of what was committed lies."""
        if self._draft is None:
            return
        num_bytes = sum(len(span.tokens) for span in spans) * self._context_bytes
        self._device.copy(self._ring.address(self._head), self._unread["context"], num_bytes)
        for span, length, accepted in zip(spans, lengths, num_accepted, strict=True):
            row, num_kept = self._rows[span.slot], len(span.tokens) - int(length) + int(accepted)
            places = np.arange(self._head, self._head + num_kept)
            row.pending = np.concatenate([row.pending, places])
            self._head += len(span.tokens)

    # draft --------------------------------------------------------------------------------------

    def draft(self, slots: list[int], anchors: Ints, draws: Draws) -> DraftBlock:
        """One draft pass, after those that take in more context than one pass can."""
        assert self._draft is not None
        most = self._draft.most("P")
        while many := [slot for slot in slots if len(self._rows[slot].pending) > most]:
            self._take_in(many)
        # A pass over the rows between these costs less than one for every stretch of them.
        places = [self._slots.index(slot) for slot in slots]
        along = self._slots[min(places) : max(places) + 1]
        tokens, confidence = self._propose(slots, along, anchors, draws)
        return DraftBlock(tokens, confidence, np.full(len(slots), self._block_size))

    def _make_room(self, num_tokens: int) -> None:
        """Begin the ring anew where it has no room; the draft takes in what still waits there."""
        if self._head + num_tokens <= self._ring_size:
            return
        while waiting := [slot for slot, row in self._rows.items() if len(row.pending)]:
            self._take_in(waiting)
        self._head = 1

    def _take_in(self, slots: list[int]) -> None:
        """Let the draft take in context that waits; its block is not used.

        No other rows go along: they may have drafts that are not verified yet.
        """
        self._propose(slots, slots, np.zeros(len(slots), np.int64), idle_draws(len(slots), 1))

    def _propose(
        self, slots: list[int], along: list[int], anchors: Ints, draws: Draws
    ) -> tuple[Ints, Floats]:
        """Blocks of `slots` after at most as much new context as a pass takes of a row.

        Of `along`, the others go along without new context. What the pass writes for them lies
        behind their own context, where their next pass writes; draft logits they must not need.
        """
        assert self._draft is not None
        most = self._draft.most("P")
        inside = [along.index(slot) for slot in slots]
        new = [np.zeros(0, np.int64)] * len(along)
        for i in inside:
            new[i] = self._rows[along[i]].pending[:most]
        all_anchors = np.zeros(len(along), np.int64)
        all_anchors[inside] = anchors
        all_draws = place_draws(draws, inside, len(along))
        tokens = np.zeros((len(along), self._block_size), np.int64)
        confidence = np.zeros((len(along), self._block_size), np.float32)
        for part, step in self._draft_steps(along, new):
            tokens[part], confidence[part] = self._draft_pass(
                step,
                [along[i] for i in part],
                [new[i] for i in part],
                all_anchors[part],
                all_draws.select(part),
            )
        return tokens[inside], confidence[inside]

    def _draft_steps(self, slots: list[int], new: list[Ints]) -> list[tuple[list[int], Step]]:
        model = self._draft
        assert model is not None
        # A row without new context gets the place that is zero, where its next context will go.
        counts = np.array([max(len(places), 1) for places in new])
        starts = np.array([self._rows[slot].num_taken for slot in slots])

        def step(places: list[int]) -> Step | None:
            most, total = int(counts[places].max()), int(counts[places].sum())
            # A graph with native attention writes the block behind the context.
            room = model.caches.capacity - int(starts[places].max()) - (self._block_size + 1)
            first, num_rows = self._extent([slots[i] for i in places])
            wanted = {"R": len(places), "P": most, "N": total}
            padded = {"R": num_rows, "P": min(rounded(most), room), "N": rounded(total)}
            return model.step(first, wanted, padded) if most <= room else None

        return self._steps(slots, step)

    def _draft_pass(
        self, step: Step, slots: list[int], new: list[Ints], anchors: Ints, draws: Draws
    ) -> tuple[Ints, Floats]:
        model, sizes = self._draft, step.sizes
        assert model is not None
        rows = [self._rows[slot] for slot in slots]
        starts = np.array([row.num_taken for row in rows])
        taken = [places if len(places) else np.zeros(1, np.int64) for places in new]
        feeds: Feeds = {
            "context_tokens": np.concatenate(taken),
            "context_index": token_layout(np.array([len(places) for places in taken]))[0],
            "context_starts": starts,
            "anchors": anchors,
            "anchor_positions": starts + [len(places) for places in new],
            **row_feeds(draws),
        }
        feeds["uniforms"] = draws.uniforms[:, : self._block_size]
        given = pad(feeds, DRAFT, sizes)
        shapes: dict[str, Shape] = {name: array.shape for name, array in given.items()}
        shapes["context"] = (self._ring_size, model.plan.inputs["context"].shape[1])
        addresses = self._sent.send(given, model.plan)
        addresses["context"] = self._ring.address(0)
        addresses["draft_logits"] = self._proposals.address(step.first)
        block = (sizes["R"], self._block_size)
        results = {"draft_tokens": block, "confidence": block}
        addresses |= self._fetched.places(results, model.plan)
        self._run(model, step, shapes, addresses)
        fetched = self._fetched.fetch(results, model.plan)
        for row, places in zip(rows, new, strict=True):
            row.num_taken += len(places)
            row.pending = row.pending[len(places) :]
        tokens, confidence = (fetched[name][: len(slots)] for name in results)
        return tokens, confidence

    # steps --------------------------------------------------------------------------------------

    def _run(
        self, model: Model, step: Step, shapes: dict[str, Shape], addresses: dict[str, int]
    ) -> None:
        shapes |= model.caches.shapes(step.sizes["R"])
        model.plan.run(step.profile, shapes, addresses | model.caches.addresses(step.first))

    def _extent(self, slots: Sequence[int]) -> tuple[int, int]:
        """First place of neighbouring rows, and how many rows a step over them has."""
        first, num_rows = self._slots.index(slots[0]), len(slots)
        if first + num_rows == len(self._slots):
            return first, min(rounded(num_rows), self._max_rows - first)
        return first, num_rows

    def _steps(
        self, slots: Sequence[int], step: Callable[[list[int]], Step | None]
    ) -> list[tuple[list[int], Step]]:
        """Indices into `slots` of the rows of each step, and the step."""
        index = {slot: i for i, slot in enumerate(slots)}
        return cut([index.get(slot) for slot in self._slots], step)
