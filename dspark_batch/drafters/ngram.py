"""A draft without weights: what followed the last place where the row said the same.

Prompt lookup (Saxena, 2023): the row's last n tokens are looked for earlier in the row, prompt and
output alike, and what came after them is proposed. The longest match counts, and of equally long
ones the most recent. A match that reaches the row's end goes on into the proposal itself, as in
LZ77, so a row that repeats itself gets whole blocks. A row without a match proposes nothing.

A proposal follows from the row's past alone: it is certain, and a sampled row accepts each of its
tokens with the target's own probability. How much to trust it is a table by the match's length,
one for greedy rows and one for sampled ones, read off text at export: proposals can be checked
against any finished text.

A row is kept as a string, one character a token, because nothing searches as fast as `rfind`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark_batch.decode import DraftBlock, Sequence
from dspark_batch.decode.algorithm import calibration
from dspark_batch.engine import DraftInfo, LookupInfo

Text = tuple[SequenceOf[int], SequenceOf[int]]
"""Prompt and new tokens of a finished row."""

_PRIOR_ROUNDS = 2.0


class Match(NamedTuple):
    """An earlier occurrence of a row's last tokens."""

    follows: int
    """Index of the token that came after it."""
    size: int
    """Tokens that are alike."""


class Round(NamedTuple):
    """One round of a row."""

    size: int
    """Of the match; 0 where there was none."""
    num_accepted: int
    num_known: int
    """Proposed tokens that the row can judge: fewer than γ near the end of its text."""


def text_of(tokens: Iterable[int]) -> str:
    """Tokens as characters; ValueError beyond the 1,114,112 that there are."""
    return "".join(map(chr, tokens))


def longest_match(text: str, *, shortest: int, longest: int) -> Match | None:
    """The most recent occurrence of the longest possible suffix of `text`, before its end.

    Suffixes of `shortest` to `longest` tokens are tried; a longer match than that is not told from
    one of `longest`.
    """
    match = None
    for size in range(shortest, longest + 1):  # where n tokens do not occur, n + 1 do not either
        found = text.rfind(text[-size:], 0, -1)
        if found < 0:
            break
        match = Match(found + size, size)
    return match


def continuation(tokens: SequenceOf[int], follows: int, block_size: int) -> list[int]:
    """`block_size` tokens from index `follows` on, again from there where the row ends."""
    period = len(tokens) - follows
    return [tokens[follows + k % period] for k in range(block_size)]


def replay(info: DraftInfo, prompt: SequenceOf[int], new: SequenceOf[int]) -> Iterator[Round]:
    """The rounds that would have led to a finished row; its first new token is the first anchor."""
    assert info.lookup is not None
    shortest, longest = info.lookup.shortest_match, info.lookup.longest_match
    tokens, end = [*prompt, *new], len(prompt) + 1
    text = text_of(tokens)
    while end < len(tokens):
        known = tokens[end : end + info.block_size]
        match = longest_match(text[:end], shortest=shortest, longest=longest)
        num_accepted = 0
        if match is not None:
            proposed = continuation(tokens[:end], match.follows, info.block_size)
            equal = [a == b for a, b in zip(proposed, known, strict=False)]
            num_accepted = (*equal, False).index(False)
        yield Round(match.size if match else 0, num_accepted, len(known))
        end += num_accepted + 1


def replayed(info: DraftInfo, texts: Iterable[Text]) -> list[Round]:
    """The rounds of finished rows, were they drafted by this alone."""
    return [round_ for prompt, new in texts for round_ in replay(info, prompt, new)]


def observed(rounds: calibration.Rounds) -> list[Round]:
    """Rounds of whole blocks as they were decoded; a network's have no match."""
    block_size = rounds.logits.shape[1]
    pairs = zip(rounds.matches.tolist(), rounds.accepted.tolist(), strict=True)
    return [Round(size, num_accepted, block_size) for size, num_accepted in pairs]


def rated(info: DraftInfo, rounds: calibration.Rounds, *, sampled: bool) -> calibration.Rounds:
    """The rounds with what is learnt by now for the confidence of looked up blocks."""
    looked_up = rounds.matches[:, None] > 0
    logits = _logits(info, sampled=sampled)[rounds.matches]
    return replace(rounds, logits=np.where(looked_up, logits, rounds.logits))


def learnt(info: DraftInfo, *, greedy: SequenceOf[Round], sampled: SequenceOf[Round]) -> DraftInfo:
    """The draft with the acceptance by match that rounds of either kind show."""
    lookup = info.lookup
    assert lookup is not None
    found = {
        "acceptance": _acceptance(info.block_size, lookup, greedy),
        "sampled_acceptance": _acceptance(info.block_size, lookup, sampled),
    }
    return info.model_copy(update={"lookup": lookup.model_copy(update=found)})


def _acceptance(
    block_size: int, lookup: LookupInfo, found: SequenceOf[Round]
) -> tuple[tuple[float, ...], ...]:
    table = [np.full(block_size, 0.5)]
    for size in range(lookup.shortest_match, lookup.longest_match + 1):
        # A length that was hardly seen is believed as the next shorter one.
        passed, reached = _PRIOR_ROUNDS * table[-1], np.full(block_size, _PRIOR_ROUNDS)
        for round_ in found:
            if round_.size == size:
                passed[: round_.num_accepted] += 1
                reached[: min(round_.num_accepted + 1, round_.num_known)] += 1
        table.append(passed / reached)
    return tuple(tuple(row.tolist()) for row in table[1:])


def rounds(info: DraftInfo, texts: Iterable[Text], *, sampled: bool) -> calibration.Rounds:
    """What calibration is fitted on: the replayed rounds, but for those that a row's end cuts."""
    logits = _logits(info, sampled=sampled)
    found = [
        (logits[round_.size], round_.num_accepted, row, round_.size)
        for row, (prompt, new) in enumerate(texts)
        for round_ in replay(info, prompt, new)
        if round_.num_known == info.block_size
    ]
    return calibration.Rounds(
        np.array([logits for logits, *_ in found], np.float32).reshape(-1, info.block_size),
        *(np.array([one[i] for one in found], np.int64) for i in (1, 2, 3)),
    )


def _logits(info: DraftInfo, *, sampled: bool) -> NDArray[np.float32]:
    """[longest + 1, γ] of confidence by length of the match; those without a match are -inf."""
    assert info.lookup is not None
    learnt_of = info.lookup.sampled_acceptance if sampled else info.lookup.acceptance
    table = np.array(learnt_of, np.float64)
    logits = np.full((info.lookup.longest_match + 1, info.block_size), -np.inf, np.float32)
    logits[info.lookup.shortest_match :] = np.log(table / (1.0 - table))
    return logits


def open_lookup(info: DraftInfo) -> NgramDrafter:
    """The drafter of a manifest."""
    return NgramDrafter(info)


class NgramDrafter:
    """Proposes for running rows. Invariant: `_texts[slot]` is a prefix of the row in that slot."""

    def __init__(self, info: DraftInfo) -> None:
        """Take the settings of a manifest."""
        assert info.lookup is not None
        self._block_size = info.block_size
        self._shortest, self._longest = info.lookup.shortest_match, info.lookup.longest_match
        self._logits = [_logits(info, sampled=sampled) for sampled in (False, True)]
        self._texts: dict[int, str] = {}

    def draft(self, sequences: SequenceOf[Sequence]) -> DraftBlock:
        """A block for every row, with the logits of its confidence; `lengths` 0 without a match."""
        shape = (len(sequences), self._block_size)
        tokens, confidence = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
        lengths, matches = np.zeros(len(sequences), np.int64), np.zeros(len(sequences), np.int64)
        for r, sequence in enumerate(sequences):
            text = self._texts.get(sequence.slot, "")
            text += text_of(sequence.tokens[len(text) :])
            self._texts[sequence.slot] = text
            match = longest_match(text, shortest=self._shortest, longest=self._longest)
            if match is not None:
                tokens[r] = continuation(sequence.tokens, match.follows, self._block_size)
                confidence[r] = self._logits[sequence.prompt.params.temperature > 0][match.size]
                lengths[r], matches[r] = self._block_size, match.size
        return DraftBlock(tokens, confidence, lengths, matches)

    def release(self, slot: int) -> None:
        """The row in this slot has ended."""
        self._texts.pop(slot, None)
