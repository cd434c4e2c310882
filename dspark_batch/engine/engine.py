"""An opened engine folder: prefill, draft and verify on domain types.

The engine packs sequences into spans for the runtime and draws the round's uniforms. It never
sees a cache tensor, logits or a runtime's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, Sequence, VerifyPlan, VerifyResult
from dspark_batch.decode.algorithm import CostTable, calibration, sampling
from dspark_batch.drafters import LOOKUPS, Lookup
from dspark_batch.engine.costs import read_costs
from dspark_batch.engine.manifest import EngineManifest, read_manifest
from dspark_batch.engine.runtimes import (
    ANYWHERE,
    PREFILL_CHUNK,
    PREFILL_TOKENS,
    Draws,
    Placement,
    Runtime,
    Span,
    runtime_module,
)

if TYPE_CHECKING:
    from dspark_batch.engine.tokenizer import Tokenizer


class Engine:
    """A target and its draft, ready to run up to `max_rows` rows at once.

    Invariant: a sequence's slot is admitted exactly between `admit` and `release`.
    """

    def __init__(
        self,
        manifest: EngineManifest,
        runtime: Runtime,
        *,
        folder: Path,
        max_rows: int,
        hardware_key: str,
        lookup: Lookup | None = None,
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.max_rows = max_rows
        self.costs: CostTable | None = None
        self.hardware_key = hardware_key
        self._runtime = runtime
        self._lookup = lookup
        self._tokenizer: Tokenizer | None = None

    @property
    def name(self) -> str:
        """The engine's name: that of its recipe."""
        return self.manifest.name

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
        """The target's tokenizer; None where its source has none."""
        if self._tokenizer is None and self.manifest.has_tokenizer:
            from dspark_batch.engine.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.open(self.folder)
        return self._tokenizer

    def admit(self, sequence: Sequence) -> None:
        """Give the sequence's slot to it."""
        self._runtime.admit(sequence.slot)

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's slot."""
        self._runtime.release(sequence.slot)
        if self._lookup is not None:
            self._lookup.release(sequence.slot)

    def prefill(self, sequences: SequenceOf[Sequence]) -> NDArray[np.int64]:
        """Run the prompts, in chunks, and return the first token of each, [R]; -1 as in `bonus`.

        Rows of a pass share it, so prompts of similar length cost the least.
        """
        first = np.zeros(len(sequences), np.int64)
        slots = [sequence.slot for sequence in sequences]
        for rows, spans in _passes([sequence.tokens for sequence in sequences], slots):
            draws = self._draws([sequences[r] for r in rows])[1]
            result = self._runtime.verify(spans, np.zeros(len(rows), np.int64), draws)
            first[rows] = result.bonus  # of a row's last chunk in the end
        return first

    def context(self, rows: SequenceOf[SequenceOf[int]]) -> Iterator[NDArray[np.float32]]:
        """Run rows of known tokens and give each one's context `[n, taps * hidden]`, in order.

        What a draft is trained on. Rows of similar length cost the least.
        """
        for begin in range(0, len(rows), self.max_rows):
            group = rows[begin : begin + self.max_rows]
            parts: list[list[NDArray[np.float32]]] = [[] for _ in group]
            for slot in range(len(group)):
                self._runtime.admit(slot)
            for found, spans in _passes(group, range(len(group))):
                for r, part in zip(found, self._runtime.context(spans), strict=True):
                    parts[r].append(part)
            for slot, row in enumerate(parts):
                self._runtime.release(slot)
                yield np.concatenate(row)

    def draft(self, sequences: SequenceOf[Sequence]) -> DraftBlock:
        """Propose a block for every sequence; the confidence is calibrated for its temperature."""
        block = self.draft_raw(sequences)
        confidence = calibration.apply(block.confidence, self._temperatures(sequences))
        return replace(block, confidence=confidence)

    def _temperatures(self, sequences: SequenceOf[Sequence]) -> NDArray[np.float64]:
        """[R, γ] by which confidence logits are divided, the greedy rows' or the sampled ones'."""
        draft = self.manifest.draft
        assert draft is not None
        greedy = np.array(draft.confidence_temperatures)
        if not draft.sampled_temperatures:
            return np.tile(greedy, (len(sequences), 1))
        samples = np.array([s.prompt.params.temperature > 0 for s in sequences])
        sampled = np.array(draft.sampled_temperatures)
        return np.where(samples[:, None], sampled, greedy)

    def draft_raw(self, sequences: SequenceOf[Sequence]) -> DraftBlock:
        """As `draft`, with the confidence as logits: what calibration is fitted on.

        Beside a network a lookup has the rows in which it finds something. Those make no pass of
        the network; their context waits.
        """
        draft = self.manifest.draft
        assert draft is not None
        if self._lookup is None or not draft.has_network:
            return self.draft_pass(sequences)
        found = self._lookup.draft(sequences)
        assert found.matches is not None
        others = np.flatnonzero(found.matches == 0).tolist()
        if others:
            drafted = self.draft_pass([sequences[r] for r in others])
            drafted = drafted.spread(others, len(sequences))
        else:
            drafted = found
        looked_up = found.looked_up
        # The tables are calibrated as they are: what will divide the logits is put in first.
        rated = found.confidence * self._temperatures(sequences).astype(np.float32)
        return DraftBlock(
            np.where(looked_up[:, None], found.tokens, drafted.tokens),
            np.where(looked_up[:, None], rated, drafted.confidence),
            np.where(looked_up, found.lengths, drafted.lengths),
            found.matches,
        )

    def draft_pass(self, sequences: SequenceOf[Sequence]) -> DraftBlock:
        """A pass of the network for every sequence, or of the lookup where there is no network."""
        draft = self.manifest.draft
        if self._lookup is not None and draft is not None and not draft.has_network:
            return replace(self._lookup.draft(sequences), matches=None)
        anchors = np.array([s.tokens[-1] for s in sequences], np.int64)
        return self._runtime.draft([s.slot for s in sequences], anchors, self._draws(sequences)[0])

    def verify(
        self, sequences: SequenceOf[Sequence], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        """One pass of the target over each anchor and its planned drafts."""
        spans = []
        draft = self.manifest.draft
        without_network = draft is None or not draft.has_network
        for r, (sequence, length) in enumerate(zip(sequences, plan.lengths.tolist(), strict=True)):
            tokens, certain = np.array([sequence.tokens[-1]], np.int64), without_network
            if length:
                assert block is not None
                tokens = np.concatenate([tokens, block.tokens[r, :length]])
                certain = certain or bool(block.looked_up[r])
            spans.append(Span(sequence.slot, sequence.anchor_position, tokens, certain))
        return self._runtime.verify(spans, plan.lengths, self._draws(sequences)[1])

    def _draws(self, sequences: SequenceOf[Sequence]) -> tuple[Draws, Draws]:
        """Draws of a draft and of a verification: functions of seed and anchor position only."""
        params = [s.prompt.params for s in sequences]
        temperature = np.array([p.temperature for p in params], np.float32)
        top_k = np.array([p.top_k for p in params], np.int64)
        top_p = np.array([p.top_p for p in params], np.float32)
        gamma = max(self.block_size, 1)
        if temperature.any():
            uniforms = sampling.uniforms(
                np.array([p.seed for p in params]),
                np.array([s.anchor_position for s in sequences]),
                num=2 * gamma + 1,
            )
        else:
            uniforms = np.zeros((len(params), 2 * gamma + 1), np.float32)
        return (
            Draws(temperature, top_k, top_p, np.ascontiguousarray(uniforms[:, :gamma])),
            Draws(temperature, top_k, top_p, np.ascontiguousarray(uniforms[:, gamma:])),
        )

    def close(self) -> None:
        """Free the runtime."""
        self._runtime.close()


def _passes(
    rows: SequenceOf[SequenceOf[int]], slots: SequenceOf[int]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Rows of tokens in chunks, as many in a pass as it has room for: their indices and spans."""
    done = [0] * len(rows)
    waiting = list(range(len(rows)))
    while waiting:
        spans: list[Span] = []
        taken, room = [], PREFILL_TOKENS
        for r in waiting:
            tokens = rows[r][done[r] : done[r] + PREFILL_CHUNK]
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

    Without its draft an engine decodes plainly and keeps no context for one.
    The cost table is the one measured on this machine, None where there is none.

    Raises:
        EngineError: the folder holds no engine, or one that cannot run here.
    """
    manifest = read_manifest(folder)
    if not with_draft:
        manifest = manifest.model_copy(update={"draft": None})
    draft = manifest.draft
    lookup = None
    if draft is not None and draft.lookup is not None:
        lookup = import_module(LOOKUPS[draft.lookup.drafter]).open_lookup(draft)
    rows = max_rows or manifest.limits.max_rows
    module = runtime_module(manifest.runtime)
    engine = Engine(
        manifest,
        module.open_pair(folder, manifest, rows, placement),
        folder=folder,
        max_rows=rows,
        hardware_key=module.hardware_key(manifest, placement),
        lookup=lookup,
    )
    if draft is not None:
        engine.costs = read_costs(folder, engine.hardware_key)
    return engine
