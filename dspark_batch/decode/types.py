"""The values that cross borders between modules. All but `RunningRow` are frozen.

Shapes: R running rows of a round, γ block size (draft tokens per block).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Places = list[int] | NDArray[np.int64]

CONFIDENCE_THRESHOLD = 0.5
"""Own confidence below which the scheduler `threshold` verifies no further."""


class FinishReason(StrEnum):
    """Why a row ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


class ErrorCode(StrEnum):
    """The closed list of reasons in an error row (`docs/jobs.md`)."""

    INVALID_ROW = "invalid_row"
    TEMPLATE_ERROR = "template_error"
    TOKENIZE_ERROR = "tokenize_error"
    PROMPT_TOO_LONG = "prompt_too_long"
    INVALID_PARAMS = "invalid_params"
    NUMERICAL = "numerical"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class RowError:
    """What went wrong with one row, and in which stage (`read`, `render`, `tokenize`, `decode`)."""

    code: ErrorCode
    stage: str
    message: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row is generated. `temperature=0` is greedy; `top_k=0` and `top_p=1` filter nothing.

    `stop` are strings: the text ends before the first one that appears. A row's random numbers
    depend on its `seed` and on token positions only.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized input row, ready to be admitted. `row` is its index in the input."""

    row: int
    token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class SpecCounts:
    """Speculation counted over one row or one run.

    `accepted_histogram[a]` is the number of rounds that accepted exactly `a` draft tokens
    (γ + 1 bins), counting every round that verified, also those that drafted nothing.
    """

    num_rounds: int
    num_draft_tokens: int
    num_verified_tokens: int
    num_accepted_tokens: int
    accepted_histogram: tuple[int, ...]
    num_looked_up_tokens: int = 0
    """Of `num_draft_tokens`: those of a lookup beside a network."""
    num_drafted_rounds: int = 0
    """Of `num_rounds`: those in which something was drafted for the row."""

    @property
    def accepted_length(self) -> float:
        """τ: mean tokens committed per round, the bonus counted."""
        return 1.0 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / verified draft tokens, the bonus not counted."""
        verified = self.num_verified_tokens
        return self.num_accepted_tokens / verified if verified else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of one prompt: exactly one per `Prompt`, with `error` set if it failed.

    `token_ids` includes the stop token, if one ended the row; `text` is None if the engine has no
    tokenizer.
    """

    row: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    spec: SpecCounts
    error: RowError | None = None


@dataclass(slots=True)
class RunningRow:
    """A row that is being decoded: the one mutable value of the loop.

    Invariant between rounds: the target's cache holds positions `0 .. anchor_position - 1`, and
    `tokens[-1]` is the anchor, which is in no cache yet.
    """

    prompt: Prompt
    slot: int
    tokens: list[int]
    """Prompt and committed tokens."""
    num_prompt_tokens: int
    num_taken: int = 0
    """Positions whose context a draft pass has taken in."""
    finish_reason: FinishReason | None = None
    text: str | None = None
    most_tokens: int = field(init=False)
    """Prompt and new tokens that `max_new_tokens` allows."""

    def __post_init__(self) -> None:
        """Add up the limit, which every round asks for."""
        self.most_tokens = self.num_prompt_tokens + self.prompt.params.max_new_tokens

    @property
    def anchor_position(self) -> int:
        """Absolute index of the anchor token (not of the row whose logits produced it)."""
        return len(self.tokens) - 1

    @property
    def num_pending(self) -> int:
        """Positions whose context waits for the row's next draft."""
        return len(self.tokens) - 1 - self.num_taken

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens that `max_new_tokens` still allows."""
        return self.most_tokens - len(self.tokens)


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """The tokens proposed in a round. The draft's distributions stay with the runtime."""

    tokens: NDArray[np.int64]
    """[R, γ] in the target's vocabulary."""
    confidence: NDArray[np.float32]
    """[R, γ] calibrated c_k: probability that draft k is accepted given all before it were."""
    lengths: NDArray[np.int64]
    """[R] tokens proposed, 0..γ; what lies beyond them is padding."""
    evidence: NDArray[np.int64] | None = None
    """[R] what a lookup went by, such as the length of a match, and 0 where the last drafter was
    asked instead; None where no lookup comes ahead of it."""
    certain: NDArray[np.bool_] | None = None
    """[R] whether the tokens were proposed with probability 1, as lookups do; None: no row's."""

    @classmethod
    def empty(cls, num_rows: int, block_size: int) -> DraftBlock:
        """No proposal for any row."""
        shape = (num_rows, block_size)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(num_rows, int))

    @property
    def looked_up(self) -> NDArray[np.bool_]:
        """[R] whether a lookup proposed, so that the last drafter made no pass for the row."""
        return np.zeros(len(self.lengths), bool) if self.evidence is None else self.evidence > 0

    def updated(self, places: Places, block: DraftBlock) -> DraftBlock:
        """This block with the rows at `places` replaced by those of `block`."""
        return DraftBlock(
            _updated(self.tokens, places, block.tokens),
            _updated(self.confidence, places, block.confidence),
            _updated(self.lengths, places, block.lengths),
            *(
                _updated(np.zeros(len(self.lengths), kind) if mine is None else mine, places, other)
                if mine is not None or other is not None
                else None
                for mine, other, kind in (
                    (self.evidence, block.evidence, np.int64),
                    (self.certain, block.certain, np.bool_),
                )
            ),
        )


def _updated(array: NDArray[Any], places: Places, values: NDArray[Any] | None) -> NDArray[Any]:
    found = array.copy()
    found[places] = 0 if values is None else values
    return found


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """How many draft tokens of each row are verified this round."""

    lengths: NDArray[np.int64]
    """[R] ℓ in 0..γ."""

    @property
    def num_tokens(self) -> int:
        """Σ(1 + ℓ): tokens in the target's pass (B in the paper)."""
        return int(self.lengths.sum()) + len(self.lengths)

    @property
    def longest(self) -> int:
        """1 + max ℓ: tokens of the row that has the most."""
        return 1 + int(self.lengths.max(initial=0))


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Outcome of a round per row."""

    num_accepted: NDArray[np.int64]
    """[R] accepted draft tokens, 0..ℓ; the bonus not counted."""
    bonus: NDArray[np.int64]
    """[R] the target's own token after them; -1 where the logits were not finite."""
