"""User turns that the target writes itself: its chat template is opened, and it goes on as a user.

After Magpie (Xu et al., 2024). A chat model was trained on user turns as well, so what it writes
there is like what it was made for, and a draft needs no prompts of anyone else. An opening keeps
the turns apart, which small models need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from dspark_batch.engine import TemplateError, Tokenizer
from dspark_batch.errors import InputError

OPENINGS = (
    *("What is", "What are", "What does", "How do I", "How can I", "How does", "How many", "Why"),
    *("Who", "When did", "Where", "Which", "Can you", "Could you please", "Is it", "Are there"),
    *("Explain", "Describe", "Summarize", "Compare", "Write a", "Write a short", "Write an email"),
    *(
        "Write a Python function",
        "Write a story about",
        "Write a poem about",
        "Create a",
        "Give me",
    ),
    *(
        "List",
        "Name",
        "Translate",
        "Rewrite",
        "Correct",
        "Classify",
        "Suggest",
        "Help me",
        "Tell me",
    ),
    *("I want to", "I need", "I have", "My", "You are", "Imagine", "Given", "The following", "A"),
    *("In", "If", "Calculate", "Solve", "Find the", "There are", "Design", "Plan", "Generate"),
)
"""How user turns begin."""
MOST_TOKENS = 128
"""Of a turn. Longer ones are dropped, as they may be no question at all."""
_MARK = "\ue000"  # a private character, which no template has


class _Written(Protocol):
    """A starter, and what the target wrote after it."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def response(self) -> tuple[int, ...]: ...


class SelfWritten:
    """The turns of one target, opened by its chat template."""

    def __init__(self, tokenizer: Tokenizer | None, *, system: str | None) -> None:
        """Raises `InputError` where the target has no chat template to open."""
        self._system = [] if system is None else [{"role": "system", "content": system}]
        if tokenizer is None or not tokenizer.has_template:
            raise InputError(
                "the target has no chat template, so it cannot write user turns",
                hint="leave out [prompts] self_written, and give files",
            )
        self._tokenizer = tokenizer
        try:
            text = self._render(_MARK, add_generation_prompt=False)
        except TemplateError as error:
            raise InputError(f"[prompts] self_written: {error}") from error
        self._prefix, mark, _ = text.partition(_MARK)
        if not mark:
            raise InputError("the chat template does not show what a user says")

    def starters(self, count: int) -> list[tuple[int, ...]]:
        """Token ids of opened turns, the openings taking turns."""
        opened = [
            tuple(self._tokenizer.encode(self._prefix + opening, add_special=False))
            for opening in OPENINGS
        ]
        return [opened[index % len(opened)] for index in range(count)]

    def prompts(self, written: Iterable[_Written]) -> list[tuple[int, ...]]:
        """Token ids of the turns that came to an end, as prompts; each turn once."""
        stops = self._tokenizer.stop_token_ids
        prefix = self._tokenizer.encode(self._prefix, add_special=False)
        begin = len(self._tokenizer.decode(prefix))
        turns = {
            self._tokenizer.decode((*row.prompt, *row.response[:-1]))[begin:].strip(): None
            for row in written
            if row.response[-1] in stops
        }
        return [self._ids(turn) for turn in turns if turn]

    def _ids(self, turn: str) -> tuple[int, ...]:
        text = self._render(turn, add_generation_prompt=True)
        return tuple(self._tokenizer.encode(text, add_special=False))

    def _render(self, turn: str, *, add_generation_prompt: bool) -> str:
        messages: Sequence[dict[str, str]] = [*self._system, {"role": "user", "content": turn}]
        return self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
