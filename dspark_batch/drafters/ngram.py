"""Prompt lookup (Saxena, 2023): propose what followed the last place where the row said the same.

The row's last n tokens are searched for earlier in the row, in prompt and output alike, and what
came after them is proposed. The longest match wins, and of equally long ones the most recent. A
match that reaches the row's end continues into the proposal itself, as in LZ77, so a row that
repeats itself gets whole blocks.

A row is kept as a string, one character a token, because nothing searches as fast as `rfind`, with
an index of its shortest n-grams: most rows have no match, and are not searched at all.
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
    """The source. Invariant: what is kept of a slot is of a prefix of the row in it."""

    Settings: ClassVar[type[LookupSettings]] = NgramSettings

    def __init__(self, settings: NgramSettings, *, block_size: int) -> None:
        """See `Source`."""
        self._block_size = block_size
        self._levels = settings.levels
        self._texts: dict[int, IndexedText] = {}

    def propose(self, row: RunningRow) -> Proposal | None:
        """See `Source`."""
        text = self._texts.get(row.slot)
        if text is None:
            text = self._texts[row.slot] = IndexedText(self._levels)
        match = text.grown(row.tokens)
        if match is None:
            return None
        return Proposal(continuation(row.tokens, match.follows, self._block_size), match.size)

    def release(self, slot: int) -> None:
        """See `Source`."""
        self._texts.pop(slot, None)


class IndexedText:
    """A row that grows, and where each n-gram of the shortest size in it ended last."""

    __slots__ = ("_ends", "_longest", "_num_indexed", "_shortest", "_text")

    def __init__(self, levels: range) -> None:
        self._shortest, self._longest = levels[0], levels[-1]
        self._text = ""
        self._ends: dict[str, int] = {}
        self._num_indexed = self._shortest - 1  # n-grams that end here or earlier are in the index

    def grown(self, tokens: Sequence[int]) -> Match | None:
        """`longest_match` of the row, which has become `tokens`."""
        text, size = self._text, self._shortest
        if len(text) < len(tokens):
            text = self._text = text + text_from_tokens(tokens[len(text) :])
        # All but the n-gram at the end, which is looked for.
        ends, end = self._ends, len(text)
        for last in range(self._num_indexed + 1, end):
            ends[text[last - size : last]] = last
        self._num_indexed = max(self._num_indexed, end - 1)
        follows = ends.get(text[-size:]) if end > size else None
        if follows is None:
            return None
        # A longer match ends there too, or further ahead.
        while True:
            most = min(self._longest, follows)
            while size < most and text[follows - size - 1] == text[end - size - 1]:
                size += 1
            if size == self._longest:
                break
            found = text.rfind(text[end - size - 1 :], 0, follows - 1)
            if found < 0:
                break
            size += 1
            follows = found + size
        return Match(follows, size)


def text_from_tokens(tokens: Iterable[int]) -> str:
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


def continuation(tokens: Sequence[int], follows: int, block_size: int) -> list[int]:
    """`block_size` tokens from index `follows` on, again from there where the row ends."""
    period = len(tokens) - follows
    if period >= block_size:
        return list(tokens[follows : follows + block_size])
    return [tokens[follows + k % period] for k in range(block_size)]
