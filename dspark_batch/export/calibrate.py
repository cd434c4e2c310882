"""How far to trust the draft: rounds of example prompts, decoded with the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Literal

import numpy as np

from dspark_batch.decode import (
    Completion,
    DecodeStats,
    DraftBlock,
    Prompt,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
    decode,
)
from dspark_batch.decode import Sequence as Row
from dspark_batch.decode.algorithm import calibration
from dspark_batch.drafters import LOOKUPS
from dspark_batch.engine import CalibrationInfo, DraftInfo, Engine

_CALIBRATION_TOKENS = 32


class _Recorder:
    """An engine that notes the confidence and outcome of every block that was verified whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._block: DraftBlock | None = None
        self.found: list[calibration.Rounds] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def draft(self, sequences: list[Row]) -> DraftBlock:
        self._block = self._engine.draft_raw(sequences)
        return self._block

    def verify(
        self, sequences: list[Row], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        assert self._block is not None
        result = self._engine.verify(sequences, block, plan)
        whole = plan.lengths == self._engine.block_size
        rows = np.array([s.prompt.row for s in sequences])
        matches = self._block.matches
        matches = np.zeros_like(rows) if matches is None else matches
        parts = (result.num_accepted, rows, matches)
        found = calibration.Rounds(self._block.confidence, *parts).of(whole)
        self.found.append(found)
        return result


def observe_rounds(
    engine: Engine, prompts: Sequence[Prompt]
) -> tuple[calibration.Rounds, list[Completion]]:
    """Decode the prompts, verifying every block whole: no position is seen only if it looked good.

    Blocks that the end of a row cuts short are left out.
    """
    recorder = _Recorder(engine)
    done = list(decode(prompts, recorder, spec="on", stats=DecodeStats()))  # type: ignore[arg-type]
    return calibration.concatenate(recorder.found, engine.block_size), done


def calibrate(engine: Engine, prompts: Sequence[Sequence[int]]) -> DraftInfo:
    """The engine's draft with the confidence and acceptance that rounds of the prompts justify.

    Greedy rows and sampled ones have each their own, the latter of temperature 1 and of every other
    prompt: their passes take longer.
    """
    draft = engine.manifest.draft
    assert draft is not None
    new_tokens = min(_CALIBRATION_TOKENS, engine.max_tokens - max(len(p) for p in prompts))
    params = SamplingParams(max_new_tokens=new_tokens)
    source = [Prompt(i, tuple(ids), replace(params, seed=i)) for i, ids in enumerate(prompts)]
    sampling = [replace(p, params=replace(p.params, temperature=1.0)) for p in source[::2]]
    observed = [observe_rounds(engine, rows) for rows in (source, sampling)]
    rounds = [found for found, _ in observed]
    if draft.lookup is not None:
        texts = [[(prompts[c.row], c.token_ids) for c in done] for _, done in observed]
        draft, rounds = _with_learnt_lookup(draft, rounds, texts)
    own = [found.matches == 0 if draft.has_network else None for found in rounds]
    greedy, sampled = (
        calibration.calibrated(found, scaled=scaled)
        for found, scaled in zip(rounds, own, strict=True)
    )
    found = {
        "confidence_temperatures": greedy.temperatures,
        "acceptance": greedy.acceptance,
        "sampled_temperatures": sampled.temperatures,
        "sampled_acceptance": sampled.acceptance,
        "calibration": (_described("greedy", greedy), _described("sampled", sampled)),
    }
    calibrated: DraftInfo = draft.model_copy(update=found)
    return calibrated


def _with_learnt_lookup(
    draft: DraftInfo,
    rounds: Sequence[calibration.Rounds],
    texts: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
) -> tuple[DraftInfo, list[calibration.Rounds]]:
    """The draft with what its lookup learns of the rounds, and the rounds as it rates them.

    `rounds` and `texts` (prompts and new tokens) are of greedy rows, then of sampled ones.
    """
    assert draft.lookup is not None
    lookup = import_module(LOOKUPS[draft.lookup.drafter])
    if draft.has_network:
        found = [lookup.observed(rows) for rows in rounds]
    else:
        found = [lookup.replayed(draft, rows) for rows in texts]
    draft = lookup.learnt(draft, greedy=found[0], sampled=found[1])
    rate = lookup.rated if draft.has_network else lookup.rounds
    seen: Sequence[Any] = rounds if draft.has_network else texts
    return draft, [rate(draft, rows, sampled=i > 0) for i, rows in enumerate(seen)]


def _described(rows: Literal["greedy", "sampled"], fit: calibration.Calibrated) -> CalibrationInfo:
    return CalibrationInfo(
        rows=rows,
        num_rounds=fit.num_rounds,
        error_before=fit.error_before,
        error_after=fit.error_after,
    )
