"""Lookups: drafters without a network, which copy a proposal from text that is known already.

A kind of lookup is a `Source`: given a row, it finds tokens to propose and says how strong the
evidence is (a level, such as the number of tokens that matched). Everything else is here: how far a
proposal can be trusted is a table of acceptance by level and position, one for greedy rows and one
for sampled rows, learnt at export.

A proposal must follow from the row's past alone. It is then proposed with probability 1, so a
sampled row accepts each token with the target's own probability, and text stays the target's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dspark_batch.decode import DraftBlock, Prompt, RunningRow, SamplingParams
from dspark_batch.decode.algorithm import calibration

Text = tuple[Sequence[int], Sequence[int]]
"""Prompt and new tokens of a finished row."""
Table = tuple[tuple[float, ...], ...]
"""[levels, γ] conditional acceptance by level of evidence and position."""

_PRIOR_ROUNDS = 2.0


class Proposal(NamedTuple):
    """What a source found for a row."""

    tokens: list[int]
    """γ of them."""
    level: int
    """Of the evidence: in `LookupSettings.levels`."""


class LookupSettings(BaseModel):
    """What a recipe can set of a kind of lookup, in its table `[draft]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def settled(self, *, beside_network: bool) -> Self:
        """With defaults filled in, for a lookup alone or ahead of a network.

        Raises:
            ValueError: the settings do not go together then.
        """
        return self

    @property
    def levels(self) -> range:
        """Levels of evidence that a proposal can have, weakest first; 1 or more."""
        return range(1, 2)


class Source(ABC):
    """A kind of lookup: where proposals come from. A new one is a class and a line in `table`."""

    Settings: ClassVar[type[LookupSettings]]

    @abstractmethod
    def __init__(self, settings: Any, *, block_size: int) -> None:
        """`settings` are settled ones of the class's own `Settings`; `block_size` is γ."""

    @abstractmethod
    def propose(self, row: RunningRow) -> Proposal | None:
        """What to propose after `row.tokens`, None for nothing. Rows only grow."""

    def release(self, slot: int) -> None:  # noqa: B027 (most sources keep nothing of a row)
        """The row in this slot has ended: forget it."""


class LookupInfo(BaseModel):
    """A lookup in an engine's manifest: its kind, its settings, and what it has learnt."""

    model_config = ConfigDict(frozen=True, extra="allow")  # what is extra are the settings

    drafter: str
    """Of `table.LOOKUPS`."""
    acceptance: Table
    """Of greedy rows."""
    sampled_acceptance: Table
    """Of rows sampled at temperature 1."""

    @classmethod
    def untrained(cls, drafter: str, settings: LookupSettings, *, block_size: int) -> Self:
        """Before anything was learnt: every token is as likely accepted as not."""
        table = ((0.5,) * block_size,) * len(settings.levels)
        given = {"drafter": drafter, "acceptance": table, "sampled_acceptance": table}
        return cls.model_validate(settings.model_dump() | given)

    @property
    def source(self) -> type[Source]:
        """The kind."""
        from dspark_batch.drafters.table import lookup_source

        return lookup_source(self.drafter)

    @property
    def settings(self) -> LookupSettings:
        """What the recipe set. Raises `ValidationError` for what the kind does not know."""
        return self.source.Settings.model_validate(self.model_extra)

    @property
    def block_size(self) -> int:
        """γ."""
        return len(self.acceptance[0])

    def logits(self, *, sampled: bool) -> NDArray[np.float32]:
        """[highest level + 1, γ] of confidence by level; -inf where there is no proposal."""
        table = np.array(self.sampled_acceptance if sampled else self.acceptance, np.float64)
        levels = self.settings.levels
        logits = np.full((levels[-1] + 1, self.block_size), -np.inf, np.float32)
        logits[levels[0] :] = np.log(table / (1.0 - table))
        return logits


class Lookup:
    """A `Drafter`: a source, and how far to trust what it finds."""

    def __init__(self, info: LookupInfo) -> None:
        self._block_size = info.block_size
        self._source = info.source(info.settings, block_size=info.block_size)
        self._logits = np.stack([info.logits(sampled=sampled) for sampled in (False, True)])

    def draft(self, rows: Sequence[RunningRow], width: int | None = None) -> DraftBlock:
        """See `Drafter`; `evidence` are levels, 0 for a row without a proposal."""
        found = [self._source.propose(row) for row in rows]
        nothing = Proposal([0] * self._block_size, 0)
        proposals = [nothing if one is None else one for one in found]
        count = len(rows) * self._block_size
        tokens = np.fromiter(chain.from_iterable(p.tokens for p in proposals), np.int64, count)
        levels = np.array([p.level for p in proposals], np.int64)
        sampled = np.array([row.prompt.params.temperature > 0 for row in rows], np.int64)
        return DraftBlock(
            tokens.reshape(len(rows), self._block_size),
            self._logits[sampled, levels],
            np.where(levels > 0, self._block_size, 0),
            levels,
            np.ones(len(rows), bool),
        )

    def release(self, slot: int) -> None:
        """See `Drafter`."""
        self._source.release(slot)


class Round(NamedTuple):
    """One round of a row, as far as a lookup is concerned."""

    level: int
    """Of the evidence; 0 where nothing was proposed."""
    num_accepted: int
    num_known: int
    """Proposed tokens that the row can judge: fewer than γ near the end of its text."""


def replay(info: LookupInfo, prompt: Sequence[int], new: Sequence[int]) -> Iterator[Round]:
    """The rounds that would have led to a finished row; its first new token is the first anchor."""
    source = info.source(info.settings, block_size=info.block_size)
    tokens, end = [*prompt, *new], len(prompt) + 1
    row = RunningRow(Prompt(0, tuple(prompt), SamplingParams()), 0, [], len(prompt))
    while end < len(tokens):
        row.tokens = tokens[:end]
        known = tokens[end : end + info.block_size]
        found = source.propose(row)
        num_accepted = 0
        if found is not None:
            equal = [a == b for a, b in zip(found.tokens, known, strict=False)]
            num_accepted = (*equal, False).index(False)
        yield Round(found.level if found else 0, num_accepted, len(known))
        end += num_accepted + 1


def replayed(info: LookupInfo, texts: Iterable[Text]) -> list[Round]:
    """The rounds of finished rows, had this lookup alone drafted them."""
    return [round_ for prompt, new in texts for round_ in replay(info, prompt, new)]


def observed(rounds: calibration.Rounds) -> list[Round]:
    """Rounds of whole blocks as they were decoded beside a network, whose own have level 0."""
    block_size = rounds.logits.shape[1]
    pairs = zip(rounds.evidence.tolist(), rounds.accepted.tolist(), strict=True)
    return [Round(level, num_accepted, block_size) for level, num_accepted in pairs]


def learnt(info: LookupInfo, *, greedy: Sequence[Round], sampled: Sequence[Round]) -> LookupInfo:
    """The lookup with the acceptance by level that rounds of either kind show."""
    tables = {
        "acceptance": _acceptance(info, greedy),
        "sampled_acceptance": _acceptance(info, sampled),
    }
    return info.model_copy(update=tables)


def _acceptance(info: LookupInfo, found: Sequence[Round]) -> Table:
    table = [np.full(info.block_size, 0.5)]
    for level in info.settings.levels:
        # A level that was hardly seen is believed as the next weaker one.
        passed, reached = _PRIOR_ROUNDS * table[-1], np.full(info.block_size, _PRIOR_ROUNDS)
        for round_ in found:
            if round_.level == level:
                passed[: round_.num_accepted] += 1
                reached[: min(round_.num_accepted + 1, round_.num_known)] += 1
        table.append(passed / reached)
    return tuple(tuple(row.tolist()) for row in table[1:])


def rounds(info: LookupInfo, texts: Iterable[Text], *, sampled: bool) -> calibration.Rounds:
    """What calibration is fitted on: replayed rounds, but for those that a row's end cuts short."""
    logits = info.logits(sampled=sampled)
    found = [
        (logits[round_.level], round_.num_accepted, row, round_.level)
        for row, (prompt, new) in enumerate(texts)
        for round_ in replay(info, prompt, new)
        if round_.num_known == info.block_size
    ]
    return calibration.Rounds(
        np.array([logits for logits, *_ in found], np.float32).reshape(-1, info.block_size),
        *(np.array([one[i] for one in found], np.int64) for i in (1, 2, 3)),
    )


def rated(info: LookupInfo, rounds: calibration.Rounds, *, sampled: bool) -> calibration.Rounds:
    """Rounds beside a network, with the confidence that looked up blocks get by now."""
    logits = info.logits(sampled=sampled)[rounds.evidence]
    looked_up = rounds.evidence[:, None] > 0
    return replace(rounds, logits=np.where(looked_up, logits, rounds.logits))
