"""Prompt lookup (Saxena, 2023): propose what followed the last place where the row said the same.

The row's last n tokens are searched for earlier in the row, in prompt and output alike, and what
came after them is proposed. The longest match wins, and of equally long ones the most recent. A
match that reaches the row's end continues into the proposal itself, as in LZ77, so a row that
repeats itself gets whole blocks.

A row is kept as a string, one character a token, because nothing searches as fast as `rfind`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from dspark_batch.decode import RunningRow
from dspark_batch.drafters.lookup import LookupSettings, Proposal, Source


class NgramSettings(LookupSettings):
    """Which matches count."""

    shortest_match: Annotated[int, Field(ge=1)] | None = None
    """Tokens that must have occurred before. None: 1 alone, 2 ahead of a network, which does better
    than a match of one token."""
    longest_match: Annotated[int, Field(ge=1)] = 8
    """Longer matches are preferred up to here."""

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.shortest_match is not None and self.shortest_match > self.longest_match:
            raise PydanticCustomError("ngram", "shortest_match is above longest_match")
        return self

    def settled(self, *, beside_network: bool) -> Self:
        """See `LookupSettings`."""
        shortest = self.shortest_match or (2 if beside_network else 1)
        if shortest > self.longest_match:
            raise ValueError(f"longest_match is below {shortest}, the shortest")
        return self.model_copy(update={"shortest_match": shortest})

    @property
    def levels(self) -> range:
        """Tokens that matched."""
        return range(self.shortest_match or 1, self.longest_match + 1)


class Match(NamedTuple):
    """An earlier occurrence of a row's last tokens."""

    follows: int
    """Index of the token that came after it."""
    size: int
    """Tokens that are alike."""


class Ngrams(Source):
    """The source. Invariant: `_texts[slot]` is a prefix of the row in that slot."""

    Settings: ClassVar[type[LookupSettings]] = NgramSettings

    def __init__(self, settings: NgramSettings, *, block_size: int) -> None:
        """See `Source`."""
        self._block_size = block_size
        self._levels = settings.levels
        self._texts: dict[int, str] = {}

    def propose(self, row: RunningRow) -> Proposal | None:
        """See `Source`."""
        text = self._texts.get(row.slot, "")
        text += text_from_tokens(row.tokens[len(text) :])
        self._texts[row.slot] = text
        match = longest_match(text, shortest=self._levels[0], longest=self._levels[-1])
        if match is None:
            return None
        return Proposal(continuation(row.tokens, match.follows, self._block_size), match.size)

    def release(self, slot: int) -> None:
        """See `Source`."""
        self._texts.pop(slot, None)


def text_from_tokens(tokens: Iterable[int]) -> str:
    """Tokens as characters; ValueError beyond the 1,114,112 that there are."""
    return "".join(map(chr, tokens))


def longest_match(text: str, *, shortest: int, longest: int) -> Match | None:
    """The most recent occurrence of the longest possible suffix of `text`, before its end.

    Suffixes of `shortest` to `longest` tokens are tried; a longer match than that is not told from
    one of `longest`.
    """
    match, size, end, before = None, shortest, len(text), len(text) - 1
    while size <= longest:
        begin = text.rfind(text[-size:], 0, before)
        if begin < 0:  # where n tokens do not occur, n + 1 do not either
            break
        follows = begin + size
        # Most are longer than what was searched for: that is seen on the spot.
        while size < longest and begin and text[begin - 1] == text[end - size - 1]:
            begin, size = begin - 1, size + 1
        match = Match(follows, size)
        # A longer one ends further ahead, as this one does not go on.
        size, before = size + 1, follows - 1
    return match


def continuation(tokens: Sequence[int], follows: int, block_size: int) -> list[int]:
    """`block_size` tokens from index `follows` on, again from there where the row ends."""
    period = len(tokens) - follows
    if period >= block_size:
        return list(tokens[follows : follows + block_size])
    return [tokens[follows + k % period] for k in range(block_size)]
