"""Input row -> `Prompt` or `RowError`: parameters, chat template, tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from dspark_batch.decode import ErrorCode, Prompt, RowError, SamplingParams
from dspark_batch.errors import InputError, UsageError
from dspark_batch.job.columns import PromptColumns
from dspark_batch.job.definition import Job, invalid_params

if TYPE_CHECKING:
    from dspark_batch.engine import Tokenizer


class EngineText(Protocol):
    """What preparing prompts needs of an engine."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for an engine that takes and gives token ids only."""

    @property
    def max_tokens(self) -> int:
        """Prompt and new tokens that a row may have."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""


def row_seed(seed: int, row: int) -> int:
    """The default seed of a row: 63 bits of SHA-256 over "{seed}:{row}".

    So a row draws the same numbers whatever the other rows, the batch and the parts are.
    """
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row ready for decode, or what is wrong with it: exactly one of `prompt` and `error`."""

    row: int
    prompt: Prompt | None
    error: RowError | None
    num_prompt_tokens: int | None
    seed: int | None


class _BadRow(Exception):
    """The row cannot be decoded; never leaves this module."""

    def __init__(self, code: ErrorCode, stage: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code, stage, message)


class PromptPreparer:
    """Turns rows into prompts for one job and one engine.

    Raises `UsageError` or `InputError` where job, input and engine do not fit together.
    """

    def __init__(self, job: Job, columns: PromptColumns, engine: EngineText) -> None:
        tokenizer = engine.tokenizer
        templated = columns.kind == "messages" or (
            columns.kind == "prompt"
            and job.chat_template
            and tokenizer is not None
            and tokenizer.has_template
        )
        if tokenizer is None and columns.kind != "prompt_token_ids":
            raise InputError(
                f"the engine has no tokenizer, so it cannot read column {columns.name!r}",
                hint="give token ids: --token-ids-column NAME",
            )
        if tokenizer is None and not job.token_ids:
            raise UsageError(
                "the engine has no tokenizer to write text with", hint="add --token-ids"
            )
        if columns.kind == "messages":
            if not job.chat_template:
                raise UsageError(
                    "messages need the chat template", hint="leave out --no-chat-template"
                )
            if tokenizer is not None and not tokenizer.has_template:
                raise InputError(
                    "the engine has no chat template for messages",
                    hint="give text: --prompt-column NAME",
                )
        if job.system is not None and not templated:
            raise UsageError(
                "--system needs a chat template, and none is applied to this input",
                hint="leave out --system, or put it into the prompts",
            )
        if job.max_new_tokens >= engine.max_tokens and "max_new_tokens" not in columns.params:
            raise UsageError(
                f"{job.max_new_tokens} new tokens leave no room for a prompt: the engine holds "
                f"{engine.max_tokens} tokens per row",
                hint="lower --max-new-tokens",
            )
        self._job = job
        self._columns = columns
        self._engine = engine
        self._tokenizer = tokenizer
        self._templated = templated

    def prepare(self, row: int, values: Mapping[str, object]) -> PreparedRow:
        """Prepare input row `row`; `values` holds its prompt and parameter columns.

        A value of type `bytes` stands for text that is not UTF-8.
        """
        seed: int | None = None
        num_tokens: int | None = None
        try:
            params = self._params(row, values)
            seed = params.seed
            token_ids = self._token_ids(values[self._columns.name])
            num_tokens = len(token_ids)
            self._check_tokens(token_ids, params)
        except _BadRow as bad:
            return PreparedRow(row, None, bad.error, num_tokens, seed)
        return PreparedRow(row, Prompt(row, token_ids, params), None, num_tokens, seed)

    def _params(self, row: int, values: Mapping[str, object]) -> SamplingParams:
        params = replace(self._job.params, seed=row_seed(self._job.seed, row))
        for name in self._columns.params:
            value = values[name]
            if value is not None:
                try:
                    params = replace(params, **{name: _PARAM_VALUES[name](value)})
                except (ValueError, OverflowError):
                    raise _BadRow(
                        ErrorCode.INVALID_PARAMS, "read", f"{name} cannot be {value!r}"
                    ) from None
        problem = invalid_params(params)
        if problem:
            raise _BadRow(ErrorCode.INVALID_PARAMS, "read", problem)
        return params

    def _token_ids(self, value: object) -> tuple[int, ...]:
        name, kind = self._columns.name, self._columns.kind
        if value is None:
            raise _BadRow(ErrorCode.INVALID_ROW, "read", f"{name} is null")
        if isinstance(value, bytes):
            raise _BadRow(ErrorCode.INVALID_ROW, "read", f"{name} is not valid UTF-8")
        if kind == "prompt_token_ids":
            assert isinstance(value, list)
            if None in value:
                raise _BadRow(ErrorCode.INVALID_ROW, "read", f"{name} holds a null")
            return tuple(value)
        assert self._tokenizer is not None
        text = self._render(value) if self._templated else value
        assert isinstance(text, str)
        try:
            # The template has written the special tokens: adding them would double the first one.
            return tuple(self._tokenizer.encode(text, add_special=not self._templated))
        except ValueError as exc:
            raise _BadRow(ErrorCode.TOKENIZE_ERROR, "tokenize", str(exc)) from exc

    def _render(self, value: object) -> str:
        assert self._tokenizer is not None
        messages = self._messages(value)
        if self._job.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._job.system}, *messages]
        try:
            return self._tokenizer.render(messages)
        except ValueError as exc:  # the tokenizer's TemplateError is one
            raise _BadRow(ErrorCode.TEMPLATE_ERROR, "render", str(exc)) from exc

    def _messages(self, value: object) -> list[dict[str, object]]:
        if isinstance(value, str):
            if not value:
                raise _BadRow(ErrorCode.INVALID_ROW, "read", f"{self._columns.name} is empty")
            return [{"role": "user", "content": value}]
        assert isinstance(value, list)
        if not value:
            raise _BadRow(ErrorCode.INVALID_ROW, "read", f"{self._columns.name} is empty")
        messages = []
        for index, message in enumerate(value):
            fields = {key: item for key, item in (message or {}).items() if item is not None}
            for key in ("role", "content"):
                if key not in fields:
                    raise _BadRow(ErrorCode.INVALID_ROW, "read", f"message {index} has no {key}")
            messages.append(fields)
        return messages

    def _check_tokens(self, token_ids: tuple[int, ...], params: SamplingParams) -> None:
        if not token_ids:
            raise _BadRow(
                ErrorCode.INVALID_ROW, "tokenize", f"{self._columns.name} is empty: it has no token"
            )
        size = self._engine.vocab_size
        outside = next((token for token in token_ids if not 0 <= token < size), None)
        if outside is not None:
            raise _BadRow(
                ErrorCode.INVALID_ROW,
                "tokenize",
                f"token {outside} is not in the vocabulary of {size} tokens",
            )
        limit = self._engine.max_tokens
        if len(token_ids) + params.max_new_tokens > limit:
            raise _BadRow(
                ErrorCode.PROMPT_TOO_LONG,
                "tokenize",
                f"{len(token_ids)} prompt tokens and {params.max_new_tokens} new tokens are more "
                f"than the {limit} tokens that the engine holds per row",
            )


def _integer(value: object) -> int:
    assert isinstance(value, int | float)
    if int(value) != value:
        raise ValueError(value)
    return int(value)


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError(value)


_PARAM_VALUES: Mapping[str, Callable[[object], Any]] = {
    "max_new_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "seed": _integer,
    "stop": _strings,
}
