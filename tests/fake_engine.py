"""An engine, a tokenizer and a decode loop without a model, for tests of everything around them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dspark_batch.decode.algorithm.costs import CostTable
from dspark_batch.decode.types import Completion, FinishReason, Prompt, RowError, SpecCounts

BEGIN = 256
VOCAB_SIZE = 300


@dataclass
class FakeTokenizer:
    """A token per byte; `BEGIN` is the one special token."""

    has_template: bool = True

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        if "\x00" in text:
            raise ValueError("cannot encode a NUL")
        return ([BEGIN] if add_special else []) + list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token < BEGIN).decode(errors="replace")

    def render(self, messages: list[dict[str, str]]) -> str:
        if any("%broken%" in message["content"] for message in messages):
            raise ValueError("the template refuses this")  # TemplateError is a ValueError
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


@dataclass
class FakeEngine:
    name: str = "fake"
    tokenizer: FakeTokenizer | None = field(default_factory=FakeTokenizer)
    max_tokens: int = 512
    block_size: int = 3
    vocab_size: int = VOCAB_SIZE
    fingerprint: dict[str, str] = field(default_factory=lambda: {"target": "a" * 64})
    max_rows: int = 1
    intake: int = 1
    costs: CostTable = field(
        default_factory=lambda: CostTable.measured(
            [1], [1, 2], verify_seconds=[[1.0, 2.0]], draft_seconds=[1.0]
        )
    )
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeStats:
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    saved_seconds: float = 0.0


@dataclass
class FakeDecode:
    """Answers a prompt with its own tokens, backwards; a row's answer depends on the row alone.

    Rows leave the `num_slots` slots in random order. `before_yield` is called with the number of
    completions so far and may raise.
    """

    num_slots: int = 4
    before_yield: Callable[[int], None] = lambda num_done: None
    failing: Callable[[Prompt], RowError | None] = lambda prompt: None
    admitted: list[Prompt] = field(default_factory=list)
    spec: str = ""
    scheduler: str | None = None
    confidence_threshold: float = -1.0

    def __call__(
        self,
        prompts: Iterable[Prompt],
        engine: FakeEngine,
        *,
        spec: str,
        scheduler: str | None,
        confidence_threshold: float,
        stats: FakeStats,
    ) -> Iterator[Completion]:
        self.spec, self.scheduler = spec, scheduler
        self.confidence_threshold = confidence_threshold
        rng = random.Random(7)
        waiting, slots, num_done = iter(prompts), [], 0
        while True:
            while len(slots) < self.num_slots and (prompt := next(waiting, None)) is not None:
                self.admitted.append(prompt)
                slots.append(prompt)
            if not slots:
                return
            prompt = slots.pop(rng.randrange(len(slots)))
            self.before_yield(num_done)
            num_done += 1
            stats.verify_seconds += 0.5
            yield self.answer(prompt, engine)

    def answer(self, prompt: Prompt, engine: FakeEngine) -> Completion:
        token_ids = prompt.token_ids[::-1][: prompt.params.max_new_tokens]
        text = engine.tokenizer.decode(token_ids) if engine.tokenizer else None
        spec = SpecCounts(4, 12, 10, 6, (1, 1, 1, 1), num_drafted_rounds=4)
        error = self.failing(prompt)
        reason = FinishReason.ERROR if error else FinishReason.STOP
        num_prompt_tokens = len(prompt.token_ids)
        return Completion(prompt.row, num_prompt_tokens, token_ids, text, reason, spec, error=error)


def open_fake(engine: FakeEngine) -> Callable[..., FakeEngine]:
    """`open_engine` that opens this engine."""

    def open_engine(folder: Path, *, max_rows: int | None = None) -> FakeEngine:
        return engine

    return open_engine
