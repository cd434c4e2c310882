"""ONNX Runtime, on the CPU or a GPU: both graphs of a pair, with caches bound in place.

The caches are `runtimes.cache`: a step takes the rows of one bucket that lie side by side as a
view of its buffers, past and present bound to the same memory. The context that the target leaves
for the draft is kept per row until the row drafts again. Where all this lies is a
`runtimes.memory`; the other inputs and outputs of a step are small and are copied.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dspark_batch.decode import DraftBlock, VerifyResult
from dspark_batch.engine import EngineManifest
from dspark_batch.engine.runtimes.cache import Bucket, Cache, buckets_for
from dspark_batch.engine.runtimes.int8 import measure_int8
from dspark_batch.engine.runtimes.layout import (
    DRAFT_INPUTS,
    TARGET_INPUTS,
    idle_draws,
    row_feeds,
    target_feeds,
    token_layout,
)
from dspark_batch.engine.runtimes.memory import Array, DeviceArray, HostMemory, Memory
from dspark_batch.engine.runtimes.ort_devices import (
    chosen_device,
    hardware_key,
    memory_of,
    open_on,
    providers,
    refusal,
    uses_gpu,
)
from dspark_batch.engine.runtimes.session import (
    ANYWHERE,
    Draws,
    Floats,
    Ints,
    Placement,
    Runtime,
    Span,
)
from dspark_batch.errors import EngineError

__all__ = [
    "OrtRuntime",
    "hardware_key",
    "measure_int8",
    "open_pair",
    "providers",
    "refusal",
    "uses_gpu",
]

_KEPT = ("context", "draft_logits")  # outputs that stay in the runtime's memory
_HOST = HostMemory()
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_MAX_PENDING = 16384  # context tokens kept before the draft takes them in


def open_pair(
    folder: Path, manifest: EngineManifest, max_rows: int, placement: Placement = ANYWHERE
) -> OrtRuntime:
    """See `RuntimeModule`."""
    problem = refusal(folder, manifest, placement)
    if problem is not None:
        raise problem
    device = chosen_device(manifest.precision, placement.device)
    return OrtRuntime(
        folder, manifest, max_rows, threads=placement.threads, memory=memory_of(device)
    )


def open_session(
    path: Path,
    *,
    threads: int,
    inputs: Collection[str] = (),
    outputs: Collection[str] = (),
    twins: bool = False,
    device: str = "cpu",
    again: str = "",
) -> ort.InferenceSession:
    """Open one graph on a device. `inputs` are those that it must have, its caches aside.

    `outputs` are values inside the graph that can be fetched too, `twins` is for graphs over pages
    on the CPU, `again` is the command that builds the engine.

    Raises:
        EngineError: the file is missing, ONNX Runtime refuses it, or it has other inputs.
    """
    hint = f"build the engine again: {again}" if again else None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Weights alone are quantized where a graph says so; by default the product would be too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # The pair's two thread pools take turns: one that spins on would hold the other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        options.add_session_config_entry(_DATA_FOLDER, str(path.parent))
        graph: str | bytes = str(path)
        if outputs or twins:
            from dspark_batch.models.graph import reopened  # imports onnx, which few runs need

            graph = reopened(path, outputs=outputs, twins=twins)
        session = open_on(graph, device, options)
    except EngineError:
        raise
    except Exception as problem:  # ORT's exceptions have no common public base
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} cannot open it: {problem}", hint=hint
        ) from problem
    found = {value.name for value in session.get_inputs() if not value.name.startswith("past_")}
    if inputs and found != set(inputs):
        differing = ", ".join(sorted(found ^ set(inputs)))
        raise EngineError(
            f"{path} was built by another version of this program: {differing} differ", hint=hint
        )
    return session


def float_type(session: ort.InferenceSession, name: str) -> Any:
    """NumPy's type of a graph's input of floats."""
    kinds = {value.name: value.type for value in session.get_inputs()}
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[kinds[name]]


@dataclass(slots=True)
class _Row:
    """What the caches hold of one slot, and the context that the draft has not taken in yet."""

    bucket: Bucket
    num_cached: int = 0
    num_taken: int = 0
    pending: list[Array] = field(default_factory=list)
    draft_logits: Array = None

    @property
    def num_pending(self) -> int:
        return sum(len(part) for part in self.pending)


class OrtRuntime(Runtime):
    """A `Runtime` on the execution provider of a memory's device."""

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        max_rows: int,
        *,
        threads: int = 0,
        memory: Memory | None = None,
    ) -> None:
        """Open the pair in `folder`; `threads` 0 lets ONNX Runtime choose."""
        self._memory = memory or HostMemory()
        opening: dict[str, Any] = {
            "threads": threads,
            "device": self._memory.device,
            "again": manifest.export_command,
        }
        draft_info = manifest.draft
        draft_shape = draft_info.cache if draft_info else None
        self._target = open_session(folder / "target.onnx", inputs=TARGET_INPUTS, **opening)
        self._block_size = draft_info.block_size if draft_info else 1
        self._draft = None
        if draft_shape:
            self._draft = open_session(folder / "draft.onnx", inputs=DRAFT_INPUTS, **opening)
        drafts = self._draft.get_inputs() if self._draft is not None else ()
        widths = [value.shape[1] for value in drafts if value.name == "context"]
        dtype = float_type(self._target, "past_key_0")
        self._drafts: dict[int, ort.InferenceSession] = {}
        """By the width of their block."""
        if self._draft is not None:
            self._drafts[self._block_size] = self._draft
        narrow = folder / "draft-narrow.onnx"
        # A device has room for a whole block.
        if self._draft is not None and self._memory.device == "cpu" and narrow.exists():
            session = open_session(narrow, inputs=DRAFT_INPUTS, **opening)
            (self.narrow_block,) = (
                value.shape[1] for value in session.get_inputs() if value.name == "uniforms"
            )
            self._drafts[self.narrow_block] = session
        self._no_context = self._memory.zeros((0, *widths), dtype)
        # The draft's graph of an engine with plans writes the block behind the context.
        self._num_behind = self._block_size + 1 if manifest.plans else 0
        self._buckets = buckets_for(
            manifest.target.cache,
            draft_shape,
            num_rows=max_rows,
            most_tokens=manifest.limits.max_tokens + self._block_size,
            dtype=dtype,
            memory=self._memory,
        )
        self._rows: dict[int, _Row] = {}
        inputs = {value.name: value for value in self._target.get_inputs()}
        vocab_size = inputs["draft_logits"].shape[2]
        self._no_logits = self._memory.zeros((max_rows, self._block_size, vocab_size), np.float32)

    def admit(self, slot: int) -> None:
        """Begin a row in the first bucket."""
        self._rows[slot] = _Row(self._buckets[0])
        self._buckets[0].slots.append(slot)

    def release(self, slot: int) -> None:
        """End a row; keys that are not finite (a row that broke) are wiped with it."""
        bucket = self._rows.pop(slot).bucket
        row = bucket.slots.index(slot)
        for cache in bucket.caches():
            cache.wipe_if_broken(row)
        bucket.leave(slot)

    def close(self) -> None:
        """Free sessions and caches."""
        self._buckets.clear()
        self._drafts.clear()
        del self._target, self._draft

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        """One target pass per run of neighbouring rows: per bucket, when all rows take part."""
        if sum(row.num_pending for row in self._rows.values()) > _MAX_PENDING:
            self._take_in_context()
        for span in spans:
            self._settle(span.slot, span.start + len(span.tokens))
        num_accepted = np.zeros(len(spans), np.int64)
        bonus = np.zeros(len(spans), np.int64)
        for run in self._runs([span.slot for span in spans]):
            num_accepted[run], bonus[run] = self._verify_run(
                [spans[i] for i in run], lengths[run], draws.select(run)
            )
        return VerifyResult(num_accepted, bonus)

    def draft(self, slots: list[int], anchors: Ints, draws: Draws) -> DraftBlock:
        """One draft pass per run of neighbouring rows."""
        tokens = np.zeros((len(slots), self._block_size), np.int64)
        confidence = np.zeros((len(slots), self._block_size), np.float32)
        width = draws.uniforms.shape[1]
        for run in self._runs(slots):
            tokens[run, :width], confidence[run, :width] = self._draft_run(
                [slots[i] for i in run], anchors[run], draws.select(run)
            )
        return DraftBlock(tokens, confidence, np.full(len(slots), width))

    def context(self, spans: list[Span]) -> list[Floats]:
        """One target pass per run of neighbouring rows; the context goes to the caller."""
        for span in spans:
            self._settle(span.slot, span.start + len(span.tokens))
        plain = np.zeros(len(spans), np.int64)
        draws = idle_draws(len(spans), self._block_size + 1)
        found: dict[int, Floats] = {}
        for run in self._runs([span.slot for span in spans]):
            chosen = [spans[i] for i in run]
            results = self._target_run(chosen, plain[run], draws.select(run), ("context",))
            ends = np.cumsum([len(span.tokens) for span in chosen])
            context = self._memory.fetch(results[0])
            found |= zip(run, np.split(context, ends[:-1]), strict=True)
            for span in chosen:
                self._rows[span.slot].num_cached = span.start + len(span.tokens)
        return [found[i].astype(np.float32, copy=False) for i in range(len(spans))]

    def _settle(self, slot: int, needed: int) -> None:
        """Move a row on to the bucket that its length asks for."""
        row = self._rows[slot]
        if needed <= row.bucket.limit:
            return
        source, bucket = row.bucket, next(b for b in self._buckets if needed <= b.limit)
        bucket.slots.append(slot)
        row.bucket = bucket
        self._reserve(bucket, needed)
        for mine, theirs in zip(bucket.caches(), source.caches(), strict=True):
            if theirs.capacity:
                mine.copy_row(len(bucket.slots) - 1, theirs, source.slots.index(slot))
        source.leave(slot)

    def _reserve(self, bucket: Bucket, needed: int) -> None:
        cached = max(self._rows[slot].num_cached for slot in bucket.slots)
        bucket.target.reserve(max(needed, cached), len(bucket.slots))
        if bucket.draft is not None:
            taken = max(self._rows[slot].num_taken for slot in bucket.slots)
            bucket.draft.reserve(max(taken, 1), len(bucket.slots))

    def _runs(self, slots: Sequence[int]) -> list[list[int]]:
        """Indices into `slots`, grouped into runs of neighbouring rows of one bucket."""
        index = {slot: i for i, slot in enumerate(slots)}
        runs: list[list[int]] = []
        for bucket in self._buckets:
            fresh = True
            for slot in bucket.slots:
                if slot not in index:
                    fresh = True
                    continue
                if fresh:
                    runs.append([])
                runs[-1].append(index[slot])
                fresh = False
        return runs

    def _verify_run(self, spans: list[Span], lengths: Ints, draws: Draws) -> tuple[Ints, Ints]:
        names = ("num_accepted", "bonus") + (("context",) if self._draft is not None else ())
        results = self._target_run(spans, lengths, draws, names)
        accepted, chosen = results[0], results[1]
        counts = np.array([len(span.tokens) for span in spans])
        ends = np.cumsum(counts)
        for r, span in enumerate(spans):
            row = self._rows[span.slot]
            num_kept = int(counts[r] - lengths[r] + accepted[r])
            row.num_cached = span.start + num_kept
            if self._draft is not None:
                begin = int(ends[r] - counts[r])
                row.pending.append(results[2][begin : begin + num_kept])
        return accepted, chosen

    def _target_run(
        self, spans: list[Span], lengths: Ints, draws: Draws, names: tuple[str, ...]
    ) -> list[Any]:
        counts = np.array([len(span.tokens) for span in spans])
        starts = np.array([span.start for span in spans])
        bucket = self._rows[spans[0].slot].bucket
        self._reserve(bucket, int(starts.max() + counts.max()))
        feeds: dict[str, Array] = target_feeds(spans, lengths, draws)
        feeds["draft_logits"] = self._no_logits[: len(spans)]
        certain = np.array([span.certain for span in spans])
        if ((lengths > 0) & (draws.temperature > 0) & ~certain).any():
            feeds["draft_logits"] = self._proposed_from(spans)
        first = bucket.slots.index(spans[0].slot)
        return self._run(self._target, bucket.target, first, len(spans), feeds, names)

    def _proposed_from(self, spans: list[Span]) -> Array:
        """The logits that sampled rows' drafts were drawn from, `[R, γ, D]`."""
        rows = [self._rows[span.slot].draft_logits for span in spans]
        none = self._no_logits[:1]
        return self._memory.concatenate([none if row is None else row for row in rows])

    def _draft_run(self, slots: list[int], anchors: Ints, draws: Draws) -> tuple[Ints, Floats]:
        rows = [self._rows[slot] for slot in slots]
        bucket = rows[0].bucket
        assert self._draft is not None
        assert bucket.draft is not None
        counts = np.array([row.num_pending for row in rows])
        starts = np.array([row.num_taken for row in rows])
        taken = max(self._rows[slot].num_taken for slot in bucket.slots)
        needed = int(starts.max() + counts.max()) + self._num_behind
        bucket.draft.reserve(max(needed, taken), len(bucket.slots))
        parts = [part for row in rows for part in row.pending]
        context = self._memory.concatenate(parts or [self._no_context])
        feeds: dict[str, Array] = {
            "context": context,
            "context_tokens": np.arange(len(context)),
            "context_index": token_layout(counts)[0],
            "context_starts": starts,
            "anchors": anchors,
            "anchor_positions": starts + counts,
            **row_feeds(draws),
        }
        feeds["uniforms"] = draws.uniforms
        sampling = bool((draws.temperature > 0).any())
        names = ("draft_tokens", "confidence") + (("draft_logits",) if sampling else ())
        first = bucket.slots.index(slots[0])
        width = draws.uniforms.shape[1]
        session = self._drafts[width]
        results = self._run(session, bucket.draft, first, len(slots), feeds, names)
        if sampling and width < self._block_size:  # as wide as the target wants them
            missing = self._block_size - width
            results[2] = np.pad(results[2], ((0, 0), (0, missing), (0, 0)))
        for r, row in enumerate(rows):
            row.num_taken += int(counts[r])
            row.pending = []
            row.draft_logits = results[2][r : r + 1] if sampling else None
        return results[0], results[1]

    def _take_in_context(self) -> None:
        """Let the draft take in what piled up while rows did not draft; its block is not used."""
        slots = [slot for slot, row in self._rows.items() if row.pending]
        draws = idle_draws(len(slots), self.narrow_block or self._block_size)
        self.draft(slots, np.zeros(len(slots), np.int64), draws)

    def _run(
        self,
        session: ort.InferenceSession,
        cache: Cache,
        first: int,
        num_rows: int,
        feeds: dict[str, Array],
        names: tuple[str, ...],
    ) -> list[Any]:
        """Run with `past` and `present` of the rows bound to one buffer; fetch `names`.

        Those of `_KEPT` are arrays of the runtime's memory, the others of the host.
        """
        key = (id(session), first, num_rows, names)
        if key not in cache.bindings:
            cache.bindings[key] = self._bind(session, cache, first, num_rows, names)
        binding = cache.bindings[key]
        for name, array in feeds.items():
            place = self._memory if isinstance(array, DeviceArray) else _HOST
            place.bind_input(binding, name, array)
        self._bind_outputs(binding, names)  # again, so that this run allocates its own
        session.run_with_iobinding(binding)
        return [
            (self._memory if name in _KEPT else _HOST).received(value)
            for name, value in zip(names, binding.get_outputs(), strict=False)
        ]

    def _bind(
        self,
        session: ort.InferenceSession,
        cache: Cache,
        first: int,
        num_rows: int,
        names: tuple[str, ...],
    ) -> ort.IOBinding:
        """A binding whose first outputs are `names`, then every cache tensor on its own buffer."""
        binding = session.io_binding()
        self._bind_outputs(binding, names)
        for i, buffer in enumerate(cache.buffers):
            layer, kind = divmod(i, 2)
            name = f"{('key', 'value')[kind]}_{layer}"
            rows = buffer[first : first + num_rows]
            self._memory.bind_input(binding, f"past_{name}", rows)
            self._memory.bind_output(binding, f"present_{name}", rows)
        return binding

    def _bind_outputs(self, binding: ort.IOBinding, names: tuple[str, ...]) -> None:
        for name in names:
            binding.bind_output(name, self._memory.device if name in _KEPT else _HOST.device)
