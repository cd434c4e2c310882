"""What only running tells: the cost table of this machine, and how far to trust the draft."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.algorithm import calibration
from dspark_batch.algorithm.costs import CostTable
from dspark_batch.decode import DecodeStats, decode
from dspark_batch.drafters import LOOKUPS
from dspark_batch.engine import Engine, write_costs
from dspark_batch.manifest import DraftInfo
from dspark_batch.types import (
    DraftBlock,
    Prompt,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
)
from dspark_batch.types import (
    Sequence as Row,
)

logger = logging.getLogger(__name__)

_REPEATS = 3
_CONTEXT_TOKENS = 128  # cached tokens of a row while costs are measured: a usual length
_CALIBRATION_TOKENS = 96


def measure_costs(engine: Engine, *, context_tokens: int = _CONTEXT_TOKENS) -> CostTable:
    """Time verify and draft passes over a grid of rows and tokens per row: medians of three."""
    gamma = engine.block_size
    rows = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < engine.max_rows] + [engine.max_rows]
    per_row = sorted({min(n, gamma + 1) for n in (1, 2, 3, 4, 6, 8)} | {gamma + 1})
    rng = np.random.default_rng(0)
    context = min(context_tokens, engine.max_tokens // 2)
    verify_seconds, draft_seconds = [], []
    for num_rows in rows:
        prompts = rng.integers(0, engine.vocab_size, (num_rows, context)).tolist()
        running = [_row(slot, tokens) for slot, tokens in enumerate(prompts)]
        for row in running:
            engine.admit(row)
        for row, token in zip(running, engine.prefill(running).tolist(), strict=True):
            row.tokens.append(token)
        drafting, verifying = [], []
        for num_tokens in per_row:
            _round(engine, running, num_tokens)  # not timed: it allocates and binds
            times = [_round(engine, running, num_tokens) for _ in range(_REPEATS)]
            drafting += [draft for draft, _ in times]
            verifying.append(median(verify for _, verify in times))
        verify_seconds.append(verifying)
        draft_seconds.append(median(drafting))
        for row in running:
            engine.release(row)
    return CostTable.measured(
        rows, per_row, verify_seconds=verify_seconds, draft_seconds=draft_seconds
    )


def ensure_costs(engine: Engine, *, progress: Callable[[str], None]) -> None:
    """Give the engine this machine's cost table, measured now if it has none, and keep it.

    A folder that cannot be written keeps nothing; then every run measures.
    """
    if engine.costs is not None or not engine.block_size:
        return
    progress("measuring the cost table of this machine")
    engine.costs = measure_costs(engine)
    try:
        write_costs(engine.folder, engine.hardware_key, engine.costs)
    except OSError as problem:
        logger.warning("the cost table is not kept: %s", problem)


def _round(engine: Engine, running: list[Row], num_tokens: int) -> tuple[float, float]:
    """One round that verifies `num_tokens` a row and commits what it finds: its two times."""
    plan = VerifyPlan(np.full(len(running), num_tokens - 1))
    begin = time.perf_counter()
    block = engine.draft_raw(running)
    middle = time.perf_counter()
    result = engine.verify(running, block, plan)
    end = time.perf_counter()
    for r, row in enumerate(running):
        row.tokens += [*block.tokens[r, : result.num_accepted[r]].tolist(), int(result.bonus[r])]
    return middle - begin, end - middle


def _row(slot: int, tokens: list[int]) -> Row:
    prompt = Prompt(slot, tuple(tokens), SamplingParams())
    return Row(prompt=prompt, slot=slot, tokens=tokens, num_prompt_tokens=len(tokens))


class _Recorder:
    """An engine that notes each round's confidence logits and accepted counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.logits: list[NDArray[np.float32]] = []
        self.accepted: list[NDArray[np.int64]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: list[Row]) -> DraftBlock:
        self._block = self._engine.draft_raw(sequences)
        return self._block

    def verify(
        self, sequences: list[Row], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        result = self._engine.verify(sequences, block, plan)
        whole = plan.lengths == self._engine.block_size
        self.logits.append(self._block.confidence[whole])
        self.accepted.append(result.num_accepted[whole])
        return result


def calibrate(engine: Engine, prompts: Sequence[Sequence[int]]) -> DraftInfo:
    """The engine's draft with the confidence and acceptance that greedy rounds justify.

    Every round verifies its whole block, so that no position is seen only when it looked good.
    """
    draft = engine.manifest.draft
    assert draft is not None
    recorder = _Recorder(engine)
    new_tokens = min(_CALIBRATION_TOKENS, engine.max_tokens - max(len(p) for p in prompts))
    params = SamplingParams(max_new_tokens=new_tokens)
    source = [Prompt(i, tuple(ids), params) for i, ids in enumerate(prompts)]
    stats = DecodeStats()
    completions = list(decode(source, recorder, spec="on", stats=stats))  # type: ignore[arg-type]
    if draft.drafter in LOOKUPS:
        texts = [(prompts[c.row], c.token_ids) for c in completions]
        lookup: DraftInfo = import_module(LOOKUPS[draft.drafter]).calibrated(draft, texts)
        return lookup
    logits = np.concatenate(recorder.logits)
    accepted = np.concatenate(recorder.accepted)
    positions = np.arange(engine.block_size)
    reached = (accepted[:, None] >= positions).sum(axis=0)
    passed = (accepted[:, None] > positions).sum(axis=0)
    # One virtual success and failure, so that a position never reached is not taken for certain.
    acceptance = (passed + 1.0) / (reached + 2.0)
    temperatures = calibration.fit(logits, accepted) if len(logits) else np.ones(len(positions))
    found = {
        "confidence_temperatures": tuple(map(float, temperatures)),
        "acceptance": tuple(map(float, acceptance)),
    }
    return draft.model_copy(update=found)
