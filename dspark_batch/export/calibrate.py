"""How far to trust a draft, from rounds of example prompts that the engine itself decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from dspark_batch.decode import (
    Completion,
    DecodeStats,
    DraftBlock,
    EngineWrapper,
    Prompt,
    RunningRow,
    SamplingParams,
    VerifyPlan,
    VerifyResult,
    decode,
)
from dspark_batch.decode.algorithm import calibration
from dspark_batch.drafters import lookup
from dspark_batch.engine import CalibrationInfo, DraftInfo, Engine

_CALIBRATION_TOKENS = 32


class _Recorder(EngineWrapper):
    """Notes the confidence and outcome of every block that was verified whole."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine = engine
        self._block = DraftBlock.empty(0, engine.block_size)
        self.found: list[calibration.Rounds] = []

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        self._block = self._engine.draft_raw(rows, width)
        return self._block

    def verify(
        self, rows: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        result = self._engine.verify(rows, block, plan)
        whole = plan.lengths == self._engine.block_size
        evidence = self._block.evidence
        evidence = np.zeros(len(rows), np.int64) if evidence is None else evidence
        numbers = np.array([row.prompt.row for row in rows])
        parts = (result.num_accepted, numbers, evidence)
        self.found.append(calibration.Rounds(self._block.confidence, *parts).where(whole))
        return result


def observe_rounds(
    engine: Engine, prompts: Sequence[Prompt]
) -> tuple[calibration.Rounds, list[Completion]]:
    """Decode the prompts and verify every block whole, so that no position is seen only if it
    looked good. Blocks that the end of a row cuts short are left out.
    """
    recorder = _Recorder(engine)
    done = list(decode(prompts, recorder, spec="on", stats=DecodeStats()))
    return calibration.concatenate(recorder.found, engine.block_size), done


def calibrate(engine: Engine, prompts: Sequence[Sequence[int]]) -> DraftInfo:
    """The engine's draft with the confidence and acceptance that rounds of the prompts justify.

    Greedy and sampled rows have calibrations of their own. Sampled rows are those of every other
    prompt at temperature 1, because their passes take longer.
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
    own = [found.evidence == 0 if draft.has_network else None for found in rounds]
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
    texts: Sequence[Sequence[lookup.Text]],
) -> tuple[DraftInfo, list[calibration.Rounds]]:
    """The draft with what its lookup learns of the rounds, and the rounds as it rates them.

    `rounds` and `texts` are of greedy rows, then of sampled ones. Alone a lookup can be replayed on
    any text, so it learns from the texts; ahead of a network only the rounds tell what it met.
    """
    info = draft.lookup
    assert info is not None
    if draft.has_network:
        found = [lookup.observed(rows) for rows in rounds]
    else:
        found = [lookup.replayed(info, rows) for rows in texts]
    info = lookup.learnt(info, greedy=found[0], sampled=found[1])
    if draft.has_network:
        seen = [lookup.rated(info, rows, sampled=i > 0) for i, rows in enumerate(rounds)]
    else:
        seen = [lookup.rounds(info, rows, sampled=i > 0) for i, rows in enumerate(texts)]
    return draft.model_copy(update={"lookup": info}), seen


def _described(rows: Literal["greedy", "sampled"], fit: calibration.Calibrated) -> CalibrationInfo:
    return CalibrationInfo(
        rows=rows,
        num_rounds=fit.num_rounds,
        error_before=fit.error_before,
        error_after=fit.error_after,
    )
