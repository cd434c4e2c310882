"""What a draft would bring at every position of known texts: recorded once, replayed often.

Under greedy decoding the text of a row does not depend on what is drafted or verified. So a block
drafted at every position of that text says, whatever the plan, how confident the draft is there
and how much of its block the target accepts. Above temperature 0 the text that comes next depends
on what was proposed, and no such table exists: records are greedy.

Shapes: M rows, A anchors (all positions but the last of every row, row after row), γ block size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch import __version__
from dspark_batch.decode import (
    DecodeStats,
    DraftBlock,
    EngineWrapper,
    FinishReason,
    Prompt,
    RunningRow,
    VerifyPlan,
    VerifyResult,
    decode,
)
from dspark_batch.decode.algorithm import calibration
from dspark_batch.errors import InputError

if TYPE_CHECKING:
    from dspark_batch.engine import Engine

FORMAT = "dspark-batch-rounds/2"
_ROW_COLUMNS = ("num_prompt_tokens", "max_new_tokens", "num_new_tokens", "stopped")
_ANCHOR_COLUMNS = ("num_drafted", "num_accepted", "matches")


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """A record. Invariant: one row or more, each of two new tokens or more, n - 1 anchors for n."""

    num_prompt_tokens: NDArray[np.int64]
    """[M]"""
    max_new_tokens: NDArray[np.int64]
    """[M] what the row was allowed."""
    num_new_tokens: NDArray[np.int64]
    """[M] what it came to."""
    stopped: NDArray[np.bool_]
    """[M] whether its last token ended it, rather than `max_new_tokens`."""
    num_drafted: NDArray[np.int64]
    """[A] tokens of the block, 0..γ; γ for a draft model."""
    num_accepted: NDArray[np.int64]
    """[A] of them that the text goes on with; past the end of a text nothing is known,
    and nothing counts."""
    matches: NDArray[np.int64]
    """[A] as in `DraftBlock`: above 0 a lookup proposed, and the draft made no pass."""
    confidence_logits: NDArray[np.float32]
    """[A, γ] as the confidence head gives them."""
    temperatures: tuple[float, ...]
    """[γ] that calibrate the logits."""
    acceptance: tuple[float, ...]
    """[γ] the engine's prior: conditional acceptance to expect before anything was seen."""
    origin: Mapping[str, str]
    """Where the record is from: engine, target, draft, precision, hardware, version."""

    @property
    def block_size(self) -> int:
        """γ."""
        return int(self.confidence_logits.shape[1])

    @property
    def first_anchors(self) -> NDArray[np.int64]:
        """[M] index of each row's first anchor."""
        num_anchors = self.num_new_tokens - 1
        return np.asarray(np.cumsum(num_anchors) - num_anchors)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """[A, γ] calibrated, as a schedule sees it."""
        return calibration.apply(self.confidence_logits, self.temperatures)

    @property
    def longest_row(self) -> int:
        """Tokens, prompt included, that the largest row may come to."""
        return int((self.num_prompt_tokens + self.max_new_tokens).max())

    @property
    def mean_context(self) -> float:
        """Cached tokens of a row, averaged over its rounds of plain decoding."""
        rounds = self.num_new_tokens - 1
        middle = self.num_prompt_tokens + self.num_new_tokens / 2
        return float((rounds * middle).sum() / rounds.sum())


def record(engine: Engine, prompts: Sequence[Prompt]) -> Rounds:
    """Decode greedy prompts plainly, drafting at every position and verifying none of it.

    Rows that fail, and those of one token, which no draft could shorten, are left out. Raises
    `InputError` if none remains.
    """
    assert all(prompt.params.temperature == 0 for prompt in prompts)
    draft = engine.manifest.draft
    assert draft is not None
    recorder = _Recorder(engine)
    completions = decode(prompts, recorder, spec="on", stats=DecodeStats())
    done = sorted(
        (c for c in completions if c.error is None and len(c.token_ids) > 1), key=lambda c: c.row
    )
    if not done:
        raise InputError(
            "no prompt was answered with two tokens or more, so there is nothing to record"
        )
    allowed = {prompt.row: prompt.params.max_new_tokens for prompt in prompts}
    blocks = [recorder.blocks[c.row] for c in done]
    accepted = [num_matching(b, c.token_ids) for b, c in zip(blocks, done, strict=True)]
    anchors = [anchor for row in blocks for anchor in row]
    manifest = engine.manifest
    return Rounds(
        num_prompt_tokens=np.array([c.num_prompt_tokens for c in done]),
        max_new_tokens=np.array([allowed[c.row] for c in done]),
        num_new_tokens=np.array([len(c.token_ids) for c in done]),
        stopped=np.array([c.finish_reason is FinishReason.STOP for c in done]),
        num_drafted=np.array([anchor.num_drafted for anchor in anchors]),
        num_accepted=np.concatenate(accepted),
        matches=np.array([anchor.match for anchor in anchors]),
        confidence_logits=np.stack([anchor.logits for anchor in anchors]),
        temperatures=draft.confidence_temperatures,
        acceptance=draft.acceptance,
        origin={
            "engine": engine.name,
            "target": manifest.target.source,
            "draft": draft.source or draft.drafter,
            "precision": manifest.precision,
            "hardware": engine.hardware_key,
            "version": __version__,
        },
    )


@dataclass(frozen=True, slots=True)
class Block:
    """What was drafted at one anchor: the first `num_drafted` of `tokens` and `logits` [γ]."""

    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]
    num_drafted: int
    match: int = 0


class _Recorder(EngineWrapper):
    """Notes every block, and then lets the target go on by itself."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine = engine
        self.blocks: dict[int, list[Block]] = defaultdict(list)

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        block = self._engine.draft_raw(rows, width)
        matches = np.zeros_like(block.lengths) if block.evidence is None else block.evidence
        numbers = (block.lengths.tolist(), matches.tolist())
        for row, *drafted in zip(rows, block.tokens, block.confidence, *numbers, strict=True):
            self.blocks[row.prompt.row].append(Block(*drafted))
        return block

    def verify(
        self, rows: Sequence[RunningRow], block: DraftBlock | None, plan: VerifyPlan
    ) -> VerifyResult:
        nothing = VerifyPlan(np.zeros(len(rows), np.int64))
        return self._engine.verify(rows, None, nothing)


def num_matching(blocks: Sequence[Block], text: Sequence[int]) -> NDArray[np.int64]:
    """How far the block at each position i of `text` [n] agrees with i+1, i+2, ...: [n-1]."""
    drafted = np.stack([block.tokens for block in blocks])
    num_drafted = np.array([block.num_drafted for block in blocks])
    num_anchors, block_size = drafted.shape
    offsets = np.arange(block_size)
    beyond = np.full(block_size, -1)  # is no token
    padded = np.concatenate([np.asarray(text, np.int64), beyond])
    ahead = padded[np.arange(1, num_anchors + 1)[:, None] + offsets]
    agree = (drafted == ahead) & (offsets < num_drafted[:, None])
    return np.asarray(np.cumprod(agree, axis=1).sum(axis=1))


def write_rounds(path: Path, rounds: Rounds) -> None:
    """One Parquet row per recorded row; logits flattened, anchor after anchor."""
    from dspark_batch.job import write_columns

    ends = np.cumsum(rounds.num_new_tokens - 1)[:-1]
    columns: dict[str, Any] = {name: getattr(rounds, name) for name in _ROW_COLUMNS}
    columns |= {name: np.split(getattr(rounds, name), ends) for name in _ANCHOR_COLUMNS}
    columns["confidence_logits"] = [
        logits.ravel() for logits in np.split(rounds.confidence_logits, ends)
    ]
    about = asdict(rounds) | {"format": FORMAT}
    kept = {key: about[key] for key in ("format", "temperatures", "acceptance", "origin")}
    write_columns(path, columns, metadata=kept)


def read_rounds(path: Path) -> Rounds:
    """The inverse of `write_rounds`. Raises `InputError` for any other file."""
    from dspark_batch.job import read_columns

    columns, about = read_columns(path)
    if about.get("format") != FORMAT:
        raise InputError(
            f"{path} holds no recorded rounds: its format is {about.get('format')!r}, "
            f"not {FORMAT!r}",
            hint="record them: dspark-batch bench --simulate PROMPTS",
        )
    block_size = len(about["temperatures"])
    logits = np.concatenate(columns["confidence_logits"]).astype(np.float32)
    return Rounds(
        num_prompt_tokens=np.array(columns["num_prompt_tokens"]),
        max_new_tokens=np.array(columns["max_new_tokens"]),
        num_new_tokens=np.array(columns["num_new_tokens"]),
        stopped=np.array(columns["stopped"]),
        num_drafted=np.concatenate(columns["num_drafted"]).astype(np.int64),
        num_accepted=np.concatenate(columns["num_accepted"]).astype(np.int64),
        matches=np.concatenate(columns["matches"]).astype(np.int64),
        confidence_logits=logits.reshape(-1, block_size),
        temperatures=tuple(about["temperatures"]),
        acceptance=tuple(about["acceptance"]),
        origin=about["origin"],
    )
