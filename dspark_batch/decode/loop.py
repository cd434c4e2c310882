"""The decode loop: an iterator of prompts in, an iterator of completions out, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dspark_batch.decode.algorithm import metrics
from dspark_batch.decode.counts import RunningCounts
from dspark_batch.decode.engine import DecodeEngine
from dspark_batch.decode.saving import Saving
from dspark_batch.decode.schedule import open_schedule
from dspark_batch.decode.types import (
    CONFIDENCE_THRESHOLD,
    Completion,
    DraftBlock,
    ErrorCode,
    FinishReason,
    Prompt,
    RowError,
    RunningRow,
    SpecCounts,
    VerifyPlan,
    VerifyResult,
)

T = TypeVar("T")

BROKEN = -1
"""Instead of a token: the logits of the row were not finite."""


@dataclass(slots=True)
class DecodeStats:
    """Time and counts so far. `host_seconds` is the time outside engine calls."""

    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_rounds: int = 0
    """Rounds of the batch; a row's rounds are in `spec`."""
    num_drafted_rounds: int = 0
    saving: Saving = field(default_factory=Saving)
    spec: SpecCounts = field(default_factory=lambda: metrics.add([]))
    """Totals over the finished rows."""

    @property
    def saved_seconds(self) -> float:
        """See `Saving`."""
        return self.saving.seconds


def decode(
    prompts: Iterable[Prompt],
    engine: DecodeEngine,
    *,
    spec: str,
    scheduler: str | None = None,
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
    stats: DecodeStats,
) -> Iterator[Completion]:
    """Complete every prompt. Completions come as rows finish, exactly one per prompt.

    `spec` says when to draft: `off` (never), `on` (every round) or `auto` (when it pays).
    `scheduler` says how much of a block is verified: `early-stop`, `async`, `threshold` (with
    `confidence_threshold`) or `whole`; None is `early-stop` under `auto`, `whole` under `on`.
    None of it changes the text: greedy rows get plain decoding's, sampled rows its distribution.
    """
    slots = Slots(engine, stats)
    schedule = open_schedule(
        engine, spec, scheduler=scheduler, confidence_threshold=confidence_threshold
    )
    source = iter(prompts)
    while slots.fill(source):
        block = slots.draft(schedule.drafts(slots.running), schedule.width)
        plan = schedule.plan(slots.running, block)
        result = slots.verify(block, plan)
        schedule.observe(plan, result)
        slots.commit(block, plan, result)
        yield from slots.take_finished()
    yield from slots.take_finished()


class Slots:
    """The running rows, and the ones that finished in this round."""

    def __init__(self, engine: DecodeEngine, stats: DecodeStats) -> None:
        self.running: list[RunningRow] = []
        self.counts = RunningCounts(engine.max_rows, engine.block_size)
        self._engine = engine
        self._stats = stats
        self._free = list(reversed(range(engine.max_rows)))
        self._finished: list[Completion] = []
        self._ending = engine.stop_token_ids | {BROKEN}
        self._clock = time.perf_counter()
        self._round_seconds = 0.0

    def fill(self, prompts: Iterator[Prompt]) -> bool:
        """Admit and prefill prompts while enough slots are free; False when no row is left.

        Repeats if all rows of an intake end on their first token, so that no prompt is left behind.
        """
        while len(self._free) >= (self._engine.intake if self.running else 1):
            admitted: list[RunningRow] = []
            for prompt in prompts:
                admitted.append(self._admit(prompt))
                if not self._free:
                    break
            if not admitted:
                break
            first = self._timed("prefill_seconds", self._engine.prefill, admitted)
            self._stats.num_prompt_tokens += sum(s.num_prompt_tokens for s in admitted)
            self.running += admitted
            self._append(admitted, [[token] for token in first.tolist()])
        return bool(self.running)

    def _admit(self, prompt: Prompt) -> RunningRow:
        row = RunningRow(
            prompt=prompt,
            slot=self._free.pop(),
            tokens=list(prompt.token_ids),
            num_prompt_tokens=len(prompt.token_ids),
        )
        self.counts.reset(row.slot)
        self._engine.admit(row)
        return row

    def draft(self, rows: list[RunningRow], width: int | None = None) -> DraftBlock | None:
        """A block for every running row, empty for all but `rows`; None if `rows` is empty.

        A network drafts `width` tokens, or γ.
        """
        if not rows:
            return None
        self._stats.num_drafted_rounds += 1
        drafting, whole = self.running, len(rows) == len(self.running)
        if not whole:
            chosen = {row.slot for row in rows}
            drafting = [row for row in self.running if row.slot in chosen]
        block = self._timed("draft_seconds", self._engine.draft, drafting, width)
        passing = drafting
        if block.evidence is not None:
            passing = [
                row
                for row, level in zip(drafting, block.evidence.tolist(), strict=True)
                if not level
            ]
        for row in passing:
            row.num_taken = len(row.tokens) - 1
        if whole:
            return block
        places = [r for r, row in enumerate(self.running) if row.slot in chosen]
        empty = DraftBlock.empty(len(self.running), self._engine.block_size)
        return empty.updated(places, block)

    def verify(self, block: DraftBlock | None, plan: VerifyPlan) -> VerifyResult:
        """The target's pass."""
        self._stats.num_rounds += 1
        return self._timed("verify_seconds", self._engine.verify, self.running, block, plan)

    def commit(self, block: DraftBlock | None, plan: VerifyPlan, result: VerifyResult) -> None:
        """Append each row's accepted drafts and bonus, up to its first stop."""
        num_rows, before = len(self.running), self._stats.num_new_tokens
        slots = np.array([row.slot for row in self.running])
        self.counts.add(slots, block, plan, result)
        self._append(self.running, committed(block, result))
        num_tokens, drafted = self._stats.num_new_tokens - before, block is not None
        self._stats.saving.add(num_rows, num_tokens, self._round_seconds, drafted=drafted)
        self._round_seconds = 0.0

    def take_finished(self) -> list[Completion]:
        """Completions since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _timed(self, phase: str, call: Callable[..., T], *arguments: object) -> T:
        """Run an engine call and count its time. The time since the last call was the host's."""
        begin = time.perf_counter()
        self._stats.host_seconds += begin - self._clock
        result = call(*arguments)
        self._clock = time.perf_counter()
        seconds = self._clock - begin
        setattr(self._stats, phase, getattr(self._stats, phase) + seconds)
        if phase != "prefill_seconds":
            self._round_seconds += seconds
        return result

    def _append(self, rows: list[RunningRow], tokens: list[list[int]]) -> None:
        """Append each row's tokens, up to the first that ends it, and retire the rows that end."""
        unended = self._ending.isdisjoint
        any_ended = False
        for row, new in zip(rows, tokens, strict=True):
            text = row.tokens
            # Most rows are far from any end: their tokens are not looked at one by one.
            far = len(text) + len(new) < row.most_tokens and not row.prompt.params.stop
            if far and unended(new):
                text += new
                self._stats.num_new_tokens += len(new)
            else:
                self._append_singly(row, new)
                any_ended |= row.finish_reason is not None
        if any_ended:
            self._retire()

    def _append_singly(self, row: RunningRow, tokens: list[int]) -> None:
        """Append tokens until one ends the row: a stop token, a stop string, the limit."""
        for token in tokens:
            if token == BROKEN:
                row.finish_reason = FinishReason.ERROR
                return
            row.tokens.append(token)
            self._stats.num_new_tokens += 1
            if token in self._ending or self._hits_stop_string(row):
                row.finish_reason = FinishReason.STOP
                return
            if not row.num_remaining:
                row.finish_reason = FinishReason.LENGTH
                return

    def _hits_stop_string(self, row: RunningRow) -> bool:
        """Whether the text now holds a stop string; keeps the text before the first one."""
        stops = row.prompt.params.stop
        tokenizer = self._engine.tokenizer if stops else None
        if tokenizer is None:
            return False
        # A token adds a character or a part of one (at most four bytes), so the end of the row
        # shows whether a stop can have come up; only then is the whole text looked at.
        new = row.tokens[row.num_prompt_tokens :]
        window = 4 * max(map(len, stops)) + 8
        if not any(stop in tokenizer.decode(new[-window:]) for stop in stops):
            return False
        text = tokenizer.decode(new)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            row.text = text[: min(found)]
        return bool(found)

    def _retire(self) -> None:
        """Turn ended rows into completions and free their slots."""
        for row in [s for s in self.running if s.finish_reason is not None]:
            self._engine.release(row)
            self._free.append(row.slot)
            completion = self._complete(row)
            self._stats.spec = metrics.add([self._stats.spec, completion.spec])
            self._finished.append(completion)
        self.running = [s for s in self.running if s.finish_reason is None]

    def _complete(self, row: RunningRow) -> Completion:
        assert row.finish_reason is not None
        new = row.tokens[row.num_prompt_tokens :]
        tokenizer = self._engine.tokenizer
        text = row.text
        if text is None and tokenizer is not None:
            text = tokenizer.decode(new)
        error = None
        if row.finish_reason is FinishReason.ERROR:
            message = f"the target's logits are not finite after {len(new)} new tokens"
            error = RowError(ErrorCode.NUMERICAL, "decode", message)
        return Completion(
            row=row.prompt.row,
            num_prompt_tokens=row.num_prompt_tokens,
            token_ids=tuple(new),
            text=text if error is None else None,
            finish_reason=row.finish_reason,
            spec=self.counts.of(row.slot),
            error=error,
        )


def committed(block: DraftBlock | None, result: VerifyResult) -> list[list[int]]:
    """What a round adds to each row: its accepted drafts, then the target's own token."""
    if block is None:
        return [[bonus] for bonus in result.bonus.tolist()]
    accepted = zip(
        block.tokens.tolist(), result.num_accepted.tolist(), result.bonus.tolist(), strict=True
    )
    return [[*drafts[:num], bonus] for drafts, num, bonus in accepted]
