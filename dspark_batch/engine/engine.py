"""An opened engine folder: prefill, draft and verify running rows.

The engine makes steps for the runtime of the running rows, asks its drafter for proposals and
calibrates their confidence. It never sees a cache tensor, logits or a runtime's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, RunningRow, VerifyPlan, VerifyResult
from dspark_batch.decode.algorithm import CostTable, calibration
from dspark_batch.drafters import Drafter, FirstOf, Lookup
from dspark_batch.engine.costs import read_costs
from dspark_batch.engine.manifest import DraftInfo, EngineManifest, read_manifest
from dspark_batch.engine.network import NetworkDrafter, SlotDraws, standing
from dspark_batch.engine.runtimes import (
    ANYWHERE,
    PaddedShapes,
    Placement,
    PrefillSizes,
    Runtime,
    Span,
    Step,
    runtime_module,
)
from dspark_batch.engine.tokenizer import Tokenizer


class Engine:
    """A target and its draft, ready to run up to `max_rows` rows at once: a `DecodeEngine`.

    Invariant: a row's slot is admitted exactly between `admit` and `release`.
    """

    def __init__(
        self,
        manifest: EngineManifest,
        runtime: Runtime,
        *,
        folder: Path,
        max_rows: int,
        hardware_key: str,
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.max_rows = max_rows
        self.costs: CostTable | None = None
        self.hardware_key = hardware_key
        self._runtime = runtime
        self._draws = SlotDraws(max_rows, self.block_size)
        self._drafter = self._open_drafter(manifest.draft) if manifest.draft else None
        self._tokenizer: Tokenizer | None = None

    @property
    def name(self) -> str:
        """The engine's name: that of its recipe."""
        return self.manifest.name

    @property
    def intake(self) -> int:
        """See `DecodeEngine`."""
        share = self._runtime.prefill_sizes.intake
        return max(self.max_rows // share, 1) if share else 1

    @property
    def max_tokens(self) -> int:
        """Prompt and new tokens of one row."""
        return self.manifest.limits.max_tokens

    @property
    def vocab_size(self) -> int:
        """The target's vocabulary."""
        return self.manifest.target.vocab_size

    @property
    def block_size(self) -> int:
        """γ; 0 for an engine without a draft."""
        return self.manifest.draft.block_size if self.manifest.draft else 0

    @property
    def narrow_block(self) -> int | None:
        """See `Runtime`."""
        return self._runtime.narrow_block

    @property
    def padded_shapes(self) -> PaddedShapes | None:
        """See `Runtime`."""
        return self._runtime.padded_shapes

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a row."""
        return frozenset(self.manifest.target.stop_token_ids)

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """[γ] conditional acceptance of greedy rows to expect before a run has seen any."""
        draft = self.manifest.draft
        return np.array(draft.acceptance if draft else (), np.float64)

    @property
    def sampled_acceptance(self) -> NDArray[np.float64]:
        """The same of rows above temperature 0."""
        draft = self.manifest.draft
        sampled = draft.sampled_acceptance if draft else ()
        return np.array(sampled, np.float64) if sampled else self.acceptance

    @property
    def fingerprint(self) -> dict[str, str]:
        """Facts that decide what text comes out."""
        return self.manifest.fingerprint()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The target's tokenizer, opened at the first use; None where its source has none."""
        if self._tokenizer is None and self.manifest.has_tokenizer:
            self._tokenizer = Tokenizer.open(self.folder)
        return self._tokenizer

    def admit(self, row: RunningRow) -> None:
        """Give the row's slot to it."""
        self._runtime.admit(row.slot)
        self._draws.admit(row)

    def release(self, row: RunningRow) -> None:
        """Free the row's slot."""
        self._runtime.release(row.slot)
        if self._drafter is not None:
            self._drafter.release(row.slot)

    def prefill(self, rows: Sequence[RunningRow]) -> NDArray[np.int64]:
        """Run the prompts, in chunks, and return the first token of each, [R]; -1 as in `bonus`.

        Rows of a pass share it, so prompts of similar length cost the least.
        """
        first = np.zeros(len(rows), np.int64)
        slots, ends, _ = standing(rows)
        sizes = self._runtime.prefill_sizes
        for chosen, spans in _passes([row.tokens for row in rows], slots, sizes):
            draws = self._draws.verify([slots[r] for r in chosen], ends[chosen])
            result = self._runtime.verify(spans, np.zeros(len(chosen), np.int64), draws)
            first[chosen] = result.bonus  # of a row's last chunk in the end
        return first

    def context(self, rows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Run rows of known tokens and give each one's context `[n, taps * hidden]`, in order.

        This is what a draft is trained on. Rows of similar length cost the least.
        """
        for begin in range(0, len(rows), self.max_rows):
            group = rows[begin : begin + self.max_rows]
            parts: list[list[NDArray[np.float32]]] = [[] for _ in group]
            for slot in range(len(group)):
                self._runtime.admit(slot)
            for found, spans in _passes(group, range(len(group)), self._runtime.prefill_sizes):
                for r, part in zip(found, self._runtime.context(spans), strict=True):
                    parts[r].append(part)
            for slot, row in enumerate(parts):
                self._runtime.release(slot)
                yield np.concatenate(row)

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """Propose a block for every row; the confidence is calibrated for its temperature."""
        block = self.draft_raw(rows, width)
        confidence = calibration.apply(block.confidence, self._temperatures(rows))
        return replace(block, confidence=confidence)

    def draft_raw(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """As `draft`, with the confidence as logits: what calibration is fitted on."""
        assert self._drafter is not None
        block = self._drafter.draft(rows, width)
        if block.evidence is None:
            return block
        # A lookup's table is calibrated as it is: what will divide its logits is put in first.
        rated = block.confidence * self._temperatures(rows).astype(np.float32)
        confidence = np.where(block.looked_up[:, None], rated, block.confidence)
        return replace(block, confidence=confidence)

    def draft_pass(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """A pass of the last drafter for every row: what the cost table prices.

        Where passes are as short as a GPU's, what the lookups ahead of it take counts too.
        """
        assert self._drafter is not None
        if self.padded_shapes is not None:
            return self.draft(rows)
        return self._drafter.last.draft(rows, width)

    def verify(
        self, rows: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        """One pass of the target over each anchor and its planned drafts."""
        drafts, certain = None, np.zeros(len(rows), bool)
        if block is not None and plan.lengths.any():
            drafts = block.tokens
            certain = certain if block.certain is None else block.certain
        slots, starts, anchors = standing(rows)
        draws = self._draws.verify(slots, starts)
        step = Step(slots, starts, anchors, plan.lengths, drafts, certain, draws)
        return self._runtime.step(step)

    def _temperatures(self, rows: Sequence[RunningRow]) -> NDArray[np.float64]:
        """[γ] or [R, γ] by which confidence logits are divided: of greedy or of sampled rows."""
        draft = self.manifest.draft
        assert draft is not None
        greedy = np.array(draft.confidence_temperatures)
        if not draft.sampled_temperatures or not self._draws.any_sampled:
            return greedy
        samples = self._draws.samples([row.slot for row in rows])
        return np.where(samples[:, None], np.array(draft.sampled_temperatures), greedy)

    def _open_drafter(self, draft: DraftInfo) -> FirstOf:
        """A lookup, the network, or the lookup ahead of the network."""
        drafters: list[Drafter] = []
        if draft.lookup is not None:
            drafters.append(Lookup(draft.lookup))
        if draft.has_network:
            drafters.append(NetworkDrafter(self._runtime, self._draws))
        return FirstOf(*drafters)

    def close(self) -> None:
        """Free the runtime."""
        self._runtime.close()


def _passes(
    rows: Sequence[Sequence[int]], slots: Sequence[int], sizes: PrefillSizes
) -> Iterator[tuple[list[int], list[Span]]]:
    """Rows of tokens in chunks, as many in a pass as it has room for: their indices and spans."""
    done = [0] * len(rows)
    waiting = list(range(len(rows)))
    while waiting:
        spans: list[Span] = []
        taken, room = [], sizes.tokens
        for r in waiting:
            tokens = rows[r][done[r] : done[r] + sizes.chunk]
            if spans and len(tokens) > room:
                break
            spans.append(Span(slots[r], done[r], np.array(tokens, np.int64)))
            taken.append(r)
            room -= len(tokens)
        yield taken, spans
        for r, span in zip(taken, spans, strict=True):
            done[r] += len(span.tokens)
        waiting = [r for r in waiting if done[r] < len(rows[r])]


def open_engine(
    folder: Path,
    *,
    max_rows: int | None = None,
    with_draft: bool = True,
    placement: Placement = ANYWHERE,
) -> Engine:
    """Open an engine folder for up to `max_rows` concurrent rows (default: the manifest's).

    Without its draft an engine decodes plainly and keeps no context for one. The cost table is the
    one that was measured on this machine, None where there is none.

    Raises:
        EngineError: the folder holds no engine, or one that cannot run here.
    """
    manifest = read_manifest(folder)
    if not with_draft:
        manifest = manifest.model_copy(update={"draft": None})
    rows = max_rows or manifest.limits.max_rows
    module = runtime_module(manifest.runtime)
    engine = Engine(
        manifest,
        module.open_pair(folder, manifest, rows, placement),
        folder=folder,
        max_rows=rows,
        hardware_key=module.hardware_key(manifest, placement),
    )
    if manifest.draft is not None:
        engine.costs = read_costs(folder, engine.hardware_key)
    return engine
