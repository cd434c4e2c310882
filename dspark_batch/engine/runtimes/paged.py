"""Target and draft as captured steps over pages of keys and values.

A slot owns pages of tokens, and target and draft keep its keys at the same positions of the same
page numbers. Page 0 is for whatever a padding row writes. A step is a graph at one shape (rows, and
tokens per row, rounded up): what it needs is written to its inbox, it is replayed, and
its results are read. So a round is two replays and nothing is allocated in it. Prompts are read by
passes of up to 2,048 tokens of any rows, which are captured too.

The target leaves the context of every token in a ring. The draft takes it from there, of each row
what was committed since it last drafted; of a prompt, at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, VerifyResult
from dspark_batch.engine import CacheInfo, EngineManifest
from dspark_batch.engine.runtimes.captured import (
    BoundStep,
    Heap,
    Shape,
    Tensor,
    open_graph,
    powers_up_to,
    read_weight,
    rounded_up,
)
from dspark_batch.engine.runtimes.layout import idle_draws
from dspark_batch.engine.runtimes.session import (
    Draws,
    Floats,
    Ints,
    PaddedShapes,
    PrefillSizes,
    Runtime,
    Span,
    Step,
)
from dspark_batch.errors import EngineError
from dspark_batch.models import Verification, verifying
from dspark_batch.models.graph import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    PAGE,
    GraphBuilder,
    hoisted,
)

logger = logging.getLogger(__name__)

_MOST_WAITING = 64  # tokens of context of a row that wait in the ring; then the draft takes them in
_LEAST_REACH = 512  # how far rows reach is rounded up to this, and to doubles of it
_CANDIDATES = 256  # that filters sort, where top-k is below
_PROMPT_SIZES = (256, 512, 1024, 2048)  # tokens of a pass over prompts
_MOST_CAPTURED = 512  # graphs
_DATA_TYPES = {"fp16": FLOAT16, "bf16": BFLOAT16}


class PagedRuntime(Runtime):
    """`runtimes.session.Runtime` on captured graphs, or on their twins on the CPU."""

    prefill_sizes = PrefillSizes(tokens=2048, chunk=2048, intake=8)

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        max_rows: int,
        *,
        device: str,
        threads: int = 0,
        free_bytes: int | None = None,
        pads_prompts: bool = True,
    ) -> None:
        """Open the graphs, place the weights and the caches.

        `pads_prompts`: passes over prompts are rounded up too, so that they can be captured.

        Raises:
            EngineError: the device has too little room, or a graph does not run on it.
        """
        self._folder, self._manifest, self._threads = folder, manifest, threads
        self._heap = Heap(device)
        self._pads_prompts = pads_prompts
        draft = manifest.draft
        self._block_size = draft.block_size if draft else 0
        self._has_network = draft is not None and draft.has_network
        self._data_type = _DATA_TYPES[manifest.precision]
        if device == "cpu" and self._data_type == BFLOAT16:
            self._data_type = FLOAT  # as the twins
        widths = powers_up_to(self._block_size + 1)
        self._shapes = PaddedShapes(rows=powers_up_to(max_rows), tokens_per_row=widths)
        self.padded_shapes = self._shapes
        reach = manifest.limits.max_tokens + self._block_size + 1 + widths[-1]
        num_pages = -(-reach // PAGE)  # of a row
        # Wide enough also for the row that pads a pass over prompts.
        padding = -(-(_PROMPT_SIZES[-1] + widths[-1] + 1) // PAGE)
        self._num_columns = max(num_pages, padding if pads_prompts else 0)
        longest = self._num_columns * PAGE
        self._reaches = [_LEAST_REACH << i for i in range(32) if _LEAST_REACH << i < longest]
        self._reaches.append(longest)
        self._num_pages = max_rows * num_pages + 1
        self._ring_size = max(2 * _PROMPT_SIZES[-1], 4 * max_rows * widths[-1])
        self._check_room(free_bytes)
        self._weights: dict[tuple[str, int], Tensor] = {}
        self._sessions: dict[str, tuple[Any, dict[str, Tensor]]] = {}
        self._steps: dict[tuple[object, ...], BoundStep] = {}
        self._fixed: dict[tuple[str, int, int], Tensor] = {}
        self._free = list(range(1, self._num_pages))
        self._pages = np.zeros((max_rows, self._num_columns), np.int32)
        self._num_owned = np.zeros(max_rows, np.int64)
        self._taken = np.zeros(max_rows, np.int64)
        self._waiting = np.zeros((max_rows, _MOST_WAITING + widths[-1]), np.int64)
        self._num_waiting = np.zeros(max_rows, np.int64)
        self._draft_rows = np.zeros(max_rows, np.int64)
        self._live: set[int] = set()
        self._broken: set[int] = set()
        self._head = 0
        self._place(max_rows)

    def _place(self, max_rows: int) -> None:
        """Allocate what stays between steps."""
        heap, kind = self._heap, self._data_type
        self._caches = {"target": self._pools(self._manifest.target.cache)}
        draft = self._manifest.draft
        if draft is not None and draft.cache is not None:
            self._caches["draft"] = self._pools(draft.cache)
        target, _ = self._session("target", Verification(1))
        shapes = {value.name: value.shape for value in target.get_inputs()}
        self._ring = heap.empty(kind, (1, self._ring_size, shapes["past_ring"][2]))
        size = shapes["draft_vocab"][0]
        self._num_slots = 0
        if self._has_network:
            assert draft is not None
            self._mask_token = draft.mask_token_id or 0
            inputs = {v.name: v.shape for v in self._session("draft", None)[0].get_inputs()}
            self._num_slots = inputs["block_tokens"][1]
            """Of a block: γ, or one more where the anchor's own drafts nothing."""
        self._draft_logits = heap.empty(FLOAT, (max_rows, max(self._block_size, 1), size))

    def _pools(self, shapes: CacheInfo) -> list[Tensor]:
        """Keys and values of each layer."""
        return [
            self._heap.empty(self._data_type, (self._num_pages, PAGE, heads, size))
            for heads, size in shapes.cache_shapes
            for _ in ("key", "value")
        ]

    def _check_room(self, free_bytes: int | None) -> None:
        """Refuse more pages than the device has room for, before a run fails in the middle."""
        if free_bytes is None:
            return
        draft = self._manifest.draft
        caches = [self._manifest.target.cache, *([draft.cache] if draft and draft.cache else [])]
        values = sum(2 * h * d for cache in caches for h, d in cache.cache_shapes)
        needed = self._num_pages * PAGE * values * 2
        weights = sum(
            file.bytes for name, file in self._manifest.files.items() if name.endswith(".data")
        )
        rows = self._shapes.rows[-1]
        logits = 8 * self._manifest.target.vocab_size * rows * (self._block_size + 1)
        if needed + weights + logits > free_bytes:
            giga = 1e9
            raise EngineError(
                f"{self._folder}: {rows} rows of up to {self._manifest.limits.max_tokens} tokens "
                f"need {needed / giga:.1f} GB for keys and values, {weights / giga:.1f} for "
                f"weights and {logits / giga:.1f} for logits; the GPU has {free_bytes / giga:.1f}",
                hint="run with fewer rows (--max-rows), or export with a lower max_tokens",
            )

    # rows ---------------------------------------------------------------------------------------

    def admit(self, slot: int) -> None:
        """Begin a row without pages."""
        self._live.add(slot)
        self._taken[slot] = self._num_waiting[slot] = 0

    def release(self, slot: int) -> None:
        """End a row; keys that are not finite (a row that broke) are wiped with it."""
        self._live.discard(slot)
        owned = self._pages[slot, : self._num_owned[slot]].tolist()
        if slot in self._broken:
            self._broken.discard(slot)
            for pool in (tensor for pools in self._caches.values() for tensor in pools):
                one = pool.nbytes // self._num_pages
                for page in owned:
                    self._heap.clear(pool.view((1, *pool.shape[1:]), offset=page * one))
        self._free += owned
        self._pages[slot] = 0
        self._num_owned[slot] = 0

    def close(self) -> None:
        """Free graphs, weights and caches."""
        self._steps.clear()
        self._sessions.clear()
        self._caches.clear()
        self._weights.clear()
        self._fixed.clear()

    def _cover(self, slots: Sequence[int] | Ints, ends: Ints) -> int:
        """Own pages for so many tokens of each slot; how far all of them reach, rounded up."""
        wanted = -(-ends // PAGE)
        for i in np.flatnonzero(self._num_owned[slots] < wanted).tolist():
            slot = slots[i]
            owned = int(self._num_owned[slot])
            for column in range(owned, int(wanted[i])):
                self._pages[slot, column] = self._free.pop()
            self._num_owned[slot] = wanted[i]
        return rounded_up(self._reaches, int(ends.max()))

    # target -------------------------------------------------------------------------------------

    def step(self, step: Step) -> VerifyResult:
        """One replay: rows are rounded up, and all to the tokens of the longest."""
        num = len(step.slots)
        most = 1 if step.drafts is None else int(step.lengths.max()) + 1
        width = rounded_up(self._shapes.tokens_per_row, most)
        rows = rounded_up(self._shapes.rows, num)
        self._make_room(rows * width)
        reach = self._cover(step.slots, step.starts + width)
        which = _verification(width, step.draws, self._manifest.target.vocab_size)
        bound = self._target_step(which, rows, reach)
        sent = bound.sent
        tokens = sent["tokens"].reshape(rows, width)
        tokens[:num, 0] = step.anchors
        sent["lengths"][:num], sent["lengths"][num:] = step.lengths, 0
        if width > 1:
            assert step.drafts is not None
            tokens[:num, 1:] = step.drafts[:, : width - 1]
            sent["draft_tokens"][:num] = tokens[:num, 1:]
        self._tell_rows(sent, "", step.slots, step.starts)
        sent["context_start"][0] = self._head
        if which.samples:
            _tell_draws(sent, step.draws, num)
            if width > 1:
                sent["certain"][:num] = step.certain
                sent["draft_rows"][:num] = self._draft_rows[step.slots]
        found = bound.run()
        accepted, bonus = found["num_accepted"][:num], found["bonus"][:num]
        first = self._head + np.arange(num) * width
        self._head += rows * width
        self._note(step.slots, first, accepted + 1)
        self._note_broken(step.slots, bonus)
        return VerifyResult(accepted, bonus)

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        """One pass over pieces of prompts; `lengths` are all 0."""
        assert not lengths.any()
        bonus = self._read(spans, draws, context=None)["bonus"][: len(spans)]
        self._note_broken([span.slot for span in spans], bonus)
        return VerifyResult(np.zeros(len(spans), np.int64), bonus)

    def context(self, spans: list[Span]) -> list[Floats]:
        """One pass over known tokens, whose context the host reads."""
        ends = np.cumsum([len(span.tokens) for span in spans])
        shape = (1, int(ends[-1]), self._ring.shape[2])
        draws = idle_draws(len(spans), self._block_size + 1)
        found = self._read(spans, draws, context=shape)["context"][0]
        return [part.astype(np.float32) for part in np.split(found, ends[:-1])]

    def _read(
        self, spans: list[Span], draws: Draws, *, context: Shape | None
    ) -> dict[str, NDArray[Any]]:
        """The results of one pass over spans; with the shape of their `context`, that as well."""
        counts = np.array([len(span.tokens) for span in spans])
        starts = np.array([span.start for span in spans])
        slots = [span.slot for span in spans]
        ends, num = np.cumsum(counts), len(spans)
        rows, total, longest = self._padded_prompts(counts, exactly=context is not None)
        self._make_room(total)
        reach = max(self._cover(slots, starts + counts), rounded_up(self._reaches, longest))
        which = _verification(1, draws, self._manifest.target.vocab_size)
        key = ("prompts", which, rows, total, reach)
        bound = self._steps.get(key) if context is None else None
        if bound is None:
            bound = self._prompt_step(which, rows, total, (longest, reach), context=context)
            if self._pads_prompts and context is None:
                self._steps[key] = bound
        sent = bound.sent
        tokens = np.concatenate([span.tokens for span in spans])
        sent["tokens"][: len(tokens)], sent["tokens"][len(tokens) :] = tokens, 0
        sent["logit_tokens"][:num], sent["logit_tokens"][num:] = ends - 1, 0
        _tell_ends(sent["cumulative"], ends, total)
        sent["context_start"][0] = self._head
        self._tell_rows(sent, "", slots, starts)
        if which.samples:
            _tell_draws(sent, draws, num)
        found = bound.run()
        first = self._head + ends - counts
        self._head += total
        if self._has_network:
            places = np.concatenate(
                [np.arange(b, b + n) for b, n in zip(first, counts, strict=True)]
            )
            self._take_in_rows(slots, places, counts)
        return found

    def _padded_prompts(self, counts: Ints, *, exactly: bool) -> tuple[int, int, int]:
        """Rows and tokens of a pass over pieces of `counts` tokens, and the most of one row.

        Padded, so that it can be captured: a row more has the tokens that are too many.
        """
        total = int(counts.sum())
        if exactly or not self._pads_prompts or total > self.prefill_sizes.tokens:
            return len(counts), total, int(counts.max())
        tokens = rounded_up(_PROMPT_SIZES, total)
        return rounded_up(self._shapes.rows, len(counts)) + 1, tokens, tokens

    def _prompt_step(
        self,
        which: Verification,
        rows: int,
        total: int,
        bounds: tuple[int, int],
        *,
        context: Shape | None,
    ) -> BoundStep:
        session, weights = self._session("target", which)
        sent = self._target_fields(which, rows, total)
        sent |= {"logit_tokens": (INT64, (rows,)), "cumulative": (INT32, (rows + 1,))}
        fetched: dict[str, tuple[int, Shape]] = {
            "num_accepted": (INT64, (rows,)),
            "bonus": (INT64, (rows,)),
        }
        if context is not None:
            fetched["context"] = (self._data_type, context)
        captured = self._pads_prompts and context is None
        return BoundStep(
            session,
            self._heap,
            sent=sent,
            fetched=fetched,
            inputs=weights | self._past("target") | {"past_ring": self._ring},
            outputs=self._present("target") | {"present_ring": self._ring},
            bounds={"bounds": bounds},
            graph_id=self._next_id() if captured else -1,
        )

    def _target_fields(
        self, which: Verification, rows: int, total: int
    ) -> dict[str, tuple[int, Shape]]:
        """What a target's step is sent."""
        fields: dict[str, tuple[int, Shape]] = {
            "tokens": (INT64, (total,)),
            "lengths": (INT64, (rows,)),
            "context_start": (INT64, (1,)),
            "past": (INT32, (rows,)),
            "pages": (INT32, (rows, self._num_columns)),
        }
        if which.tokens_per_row > 1:
            fields["draft_tokens"] = (INT64, (rows, which.tokens_per_row - 1))
        if which.samples:
            fields |= _draw_fields(rows, self._block_size + 1)
            fields |= {"certain": (INT64, (rows,)), "draft_rows": (INT64, (rows,))}
        return fields

    def _target_step(self, which: Verification, rows: int, reach: int) -> BoundStep:
        key = ("target", which, rows, reach)
        if key not in self._steps:
            session, weights = self._session("target", which)
            width = which.tokens_per_row
            total = rows * width
            inputs = weights | self._past("target") | {"past_ring": self._ring}
            inputs["logit_tokens"] = self._counting(INT64, total, 1)
            inputs["cumulative"] = self._counting(INT32, rows + 1, width)
            inputs["draft_logits"] = self._draft_logits
            self._steps[key] = BoundStep(
                session,
                self._heap,
                sent=self._target_fields(which, rows, total),
                fetched={"num_accepted": (INT64, (rows,)), "bonus": (INT64, (rows,))},
                inputs=inputs,
                outputs=self._present("target") | {"present_ring": self._ring},
                bounds={"bounds": (width, reach)},
                graph_id=self._next_id(),
            )
        return self._steps[key]

    def _note(self, slots: Sequence[int], first: Ints, counts: Ints) -> None:
        """Context of so many committed tokens of each row waits in the ring, from `first` on."""
        if not self._has_network:
            return
        index = np.asarray(slots)
        offsets = np.arange(int(counts.max()))
        waiting = self._num_waiting[index]
        # What lies beyond a row's count is overwritten by its next step.
        self._waiting[index[:, None], waiting[:, None] + offsets] = first[:, None] + offsets
        self._num_waiting[index] = waiting + counts
        if int(self._num_waiting[index].max()) > _MOST_WAITING:
            self._take_in([slot for slot in slots if self._num_waiting[slot]])

    def _note_broken(self, slots: Sequence[int], bonus: Ints) -> None:
        if int(bonus.min()) < 0:
            self._broken.update(slot for slot, token in zip(slots, bonus, strict=True) if token < 0)

    # draft --------------------------------------------------------------------------------------

    def draft(self, slots: list[int], anchors: Ints, draws: Draws) -> DraftBlock:
        """One replay, which takes in the context that waits; if that is much, another before it."""
        num, index = len(slots), np.asarray(slots)
        waiting = self._num_waiting[index]
        samples = bool((draws.temperature > 0).any())
        if int(waiting.max()) > self._shapes.tokens_per_row[-1]:
            self._take_in([slot for slot in slots if self._num_waiting[slot]])
            waiting = self._num_waiting[index]
        # Fewer places for context would hardly cost less: this pass is bound by its launches.
        width = self._shapes.tokens_per_row[-1]
        rows = rounded_up(self._shapes.rows, num)
        starts = self._taken[index]
        anchored = starts + waiting
        reach = self._cover(slots, np.maximum(anchored + self._num_slots, starts + width))
        bound = self._draft_step(rows, width, reach, samples=samples)
        sent = bound.sent
        sent["context_rows"].reshape(rows, width)[:num] = self._waiting[index, :width]
        sent["anchors"][:num] = anchors
        sent["block_tokens"][:num, 0] = anchors
        sent["block_tokens"][:num, 1:] = self._mask_token
        self._tell_rows(sent, "context_", slots, starts)
        sent["block_past"][:num], sent["block_past"][num:] = anchored, 0
        if samples:
            _tell_draws(sent, draws, num)
            self._draft_rows[index] = np.arange(num)
        found = bound.run()
        self._taken[index] = anchored
        self._num_waiting[index] = 0
        return DraftBlock(
            found["draft_tokens"][:num],
            found["confidence"][:num],
            np.full(num, self._block_size),
        )

    def _draft_step(self, rows: int, width: int, reach: int, *, samples: bool) -> BoundStep:
        key = ("draft", samples, rows, width, reach)
        if key not in self._steps:
            inputs = {
                "context_cumulative": self._counting(INT32, rows + 1, width),
                "block_cumulative": self._counting(INT32, rows + 1, self._num_slots),
            }
            fields: dict[str, tuple[int, Shape]] = {"context_rows": (INT64, (rows * width,))}
            self._steps[key] = self._bound_draft(
                rows, fields, inputs, (width, reach), samples=samples, graph_id=self._next_id()
            )
        return self._steps[key]

    def _bound_draft(
        self,
        rows: int,
        fields: dict[str, tuple[int, Shape]],
        inputs: dict[str, Tensor],
        context_bounds: tuple[int, int],
        *,
        samples: bool,
        graph_id: int = -1,
    ) -> BoundStep:
        session, weights = self._session("draft-sampling" if samples else "draft", None)
        gamma = self._block_size
        sent: dict[str, tuple[int, Shape]] = {
            **fields,
            "context_past": (INT32, (rows,)),
            "pages": (INT32, (rows, self._num_columns)),
            "block_tokens": (INT64, (rows, self._num_slots)),
            "block_past": (INT32, (rows,)),
            "anchors": (INT64, (rows,)),
        }
        outputs = self._present("draft") | self._present("draft", "context")
        if samples:
            sent |= _draw_fields(rows, gamma)
            outputs["draft_logits"] = self._draft_logits.view(
                (rows, gamma, self._draft_logits.shape[2])
            )
        return BoundStep(
            session,
            self._heap,
            sent=sent,
            fetched={"draft_tokens": (INT64, (rows, gamma)), "confidence": (FLOAT, (rows, gamma))},
            inputs=weights | self._past("draft") | {"context": self._ring} | inputs,
            outputs=outputs,
            bounds={
                "context_bounds": context_bounds,
                "block_bounds": (self._num_slots, context_bounds[1]),
            },
            graph_id=graph_id,
        )

    def _make_room(self, num_tokens: int) -> None:
        """Begin the ring anew where it has no room; the draft takes in what still waits there."""
        if self._head + num_tokens <= self._ring_size:
            return
        if self._has_network:
            self._take_in([slot for slot in self._live if self._num_waiting[slot]])
        self._head = 0

    def _take_in(self, slots: list[int]) -> None:
        """Let the draft take in the context that waits for these rows, as much as a pass has."""
        while slots:
            ends = np.cumsum(self._num_waiting[slots])
            num = max(int(np.searchsorted(ends, self.prefill_sizes.tokens, side="right")), 1)
            some, slots = slots[:num], slots[num:]
            counts = self._num_waiting[some]
            waiting = zip(some, counts.tolist(), strict=True)
            places = np.concatenate([self._waiting[slot, :n] for slot, n in waiting])
            self._take_in_rows(some, places, counts)

    def _take_in_rows(self, slots: list[int], places: Ints, counts: Ints) -> None:
        """One pass for context at `places` of the ring; its block is not used.

        It writes nothing that the rows' next draft does not write again.
        """
        num, starts = len(slots), self._taken[slots]
        rows, total, longest = self._padded_prompts(counts, exactly=False)
        reach = self._cover(slots, starts + counts + self._num_slots)
        reach = max(reach, rounded_up(self._reaches, longest + self._num_slots))
        key = ("intake", rows, total, reach)
        bound = self._steps.get(key)
        if bound is None:
            fields: dict[str, tuple[int, Shape]] = {
                "context_rows": (INT64, (total,)),
                "context_cumulative": (INT32, (rows + 1,)),
            }
            fixed = {"block_cumulative": self._counting(INT32, rows + 1, self._num_slots)}
            bound = self._bound_draft(
                rows,
                fields,
                fixed,
                (longest, reach),
                samples=False,
                graph_id=self._next_id() if self._pads_prompts else -1,
            )
            if self._pads_prompts:
                self._steps[key] = bound
        sent = bound.sent
        sent["context_rows"][: len(places)], sent["context_rows"][len(places) :] = places, 0
        ends = np.cumsum(counts)
        _tell_ends(sent["context_cumulative"], ends, total)
        self._tell_rows(sent, "context_", slots, starts)
        sent["block_past"][:num], sent["block_past"][num:] = starts + counts, 0
        bound.run()
        self._taken[slots] = starts + counts
        self._num_waiting[slots] = 0

    # graphs -------------------------------------------------------------------------------------

    def _session(self, name: str, which: Verification | None) -> tuple[Any, dict[str, Tensor]]:
        """A graph, opened at its first use, and its weights."""
        key = f"{name} {which}"
        if key not in self._sessions:
            path = self._folder / f"{name}.onnx"
            if which is None:
                builder = GraphBuilder.opened(path)
            else:
                builder = verifying(path, which, block_size=self._block_size)
            on_cpu = self._heap.device == "cpu"
            octets, places = hoisted(builder.model(), twins=on_cpu)
            session = open_graph(octets, self._heap.device, capture=True, threads=self._threads)
            weights = {}
            for weight, place in places.items():
                found = (place.file, place.offset)
                if found not in self._weights:
                    array, kind = read_weight(self._folder, place, wide=on_cpu)
                    self._weights[found] = self._heap.placed(array, kind)
                weights[weight] = self._weights[found]
            self._sessions[key] = (session, weights)
        return self._sessions[key]

    def _past(self, model: str) -> dict[str, Tensor]:
        return _cache_names(self._caches[model], "past")

    def _present(self, model: str, prefix: str = "present") -> dict[str, Tensor]:
        return _cache_names(self._caches[model], prefix)

    def _counting(self, kind: int, number: int, step: int) -> Tensor:
        """0, step, 2 step, ...: what never changes in a captured step."""
        key = (str(kind), number, step)
        if key not in self._fixed:
            dtype = np.int32 if kind == INT32 else np.int64
            values = np.arange(0, number * step, step).astype(dtype)
            self._fixed[key] = self._heap.placed(values, kind)
        return self._fixed[key]

    def _next_id(self) -> int:
        """Of a graph to capture; -1, which is not captured, if there are very many."""
        if len(self._steps) < _MOST_CAPTURED:
            return len(self._steps) + 1
        logger.warning("%d steps are captured; others run slower", _MOST_CAPTURED)
        return -1

    def _tell_rows(
        self, sent: dict[str, NDArray[Any]], prefix: str, slots: Sequence[int], starts: Ints
    ) -> None:
        num = len(slots)
        past, pages = sent[f"{prefix}past"], sent["pages"]
        past[:num], past[num:] = starts, 0
        pages[:num], pages[num:] = self._pages[slots], 0


def _cache_names(pools: Sequence[Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}_{('key', 'value')[i % 2]}_{i // 2}": tensor for i, tensor in enumerate(pools)
    }


def _verification(width: int, draws: Draws, vocab_size: int) -> Verification:
    """What rows need that sample so: the candidates to sort are all, unless top-k is small."""
    hot = draws.temperature > 0
    if not hot.any():
        return Verification(width)
    by_count, by_mass = hot & (draws.top_k > 0), hot & (draws.top_p < 1)
    if not (by_count | by_mass).any():
        return Verification(width, samples=True)
    small = not (by_mass & ~by_count).any() and int(draws.top_k[by_count].max()) <= _CANDIDATES
    return Verification(width, samples=True, width=_CANDIDATES if small else vocab_size)


def _tell_ends(cumulative: NDArray[np.int32], ends: Ints, total: int) -> None:
    """`cumulative` [R + 1] of rows with these `ends`; the row behind them has what is left."""
    num = len(ends)
    cumulative[1 : num + 1] = ends
    cumulative[num + 1 :] = total


def _draw_fields(rows: int, num_uniforms: int) -> dict[str, tuple[int, Shape]]:
    return {
        "temperature": (FLOAT, (rows,)),
        "top_k": (INT64, (rows,)),
        "top_p": (FLOAT, (rows,)),
        "uniforms": (FLOAT, (rows, num_uniforms)),
    }


def _tell_draws(sent: dict[str, NDArray[Any]], draws: Draws, num: int) -> None:
    sent["temperature"][:num], sent["temperature"][num:] = draws.temperature, 0
    sent["top_k"][:num], sent["top_p"][:num] = draws.top_k, draws.top_p
    sent["uniforms"][:num] = draws.uniforms[:, : sent["uniforms"].shape[1]]
