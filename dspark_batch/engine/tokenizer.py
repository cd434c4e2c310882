"""Text to token ids and back, and chat templates: the only file that knows a tokenizer format.

An engine folder holds three files, written by `write_tokenizer` and read by `Tokenizer.open`:

    tokenizer.json          of the `tokenizers` library
    tokenizer_config.json   special token texts as templates name them, and `stop_token_ids`;
                            transformers' AutoTokenizer reads the folder as well
    chat_template.jinja     optional

What is rendered and encoded is what transformers gives for the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.errors import EngineError

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from dspark_batch.models.weights import Weights

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_STOP_IDS = "stop_token_ids"

# One thing under three names; templates read the first, except for gpt-oss, which reads the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """A conversation that the chat template refuses or cannot render, or no template at all."""


class Tokenizer:
    """The tokenizer of an engine: text to ids, ids to text, conversations to text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: str | None,
        special_tokens: Mapping[str, str],
        stop_token_ids: Sequence[int],
    ) -> None:
        """Use `open`; here come the parts that it reads."""
        # Settings of the file that pad or cut would change single rows.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._template_source = template
        self._template: jinja2.Template | None = None
        self.special_tokens = dict(special_tokens)
        """Texts of the special tokens by name (`bos_token`, ...)."""
        self.stop_token_ids = tuple(stop_token_ids)
        """Tokens that end a row, as the target's weights name them."""

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read a folder that `write_tokenizer` wrote; `EngineError` where a file is not there."""
        import tokenizers

        for name in (_TOKENIZER, _CONFIG):
            if not (folder / name).exists():
                raise EngineError(
                    f"{folder} has no {name}",
                    hint="build the engine again with dspark-batch export",
                )
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        # The library raises bare Exception for a file that it cannot read.
        except Exception as error:
            raise EngineError(f"cannot read the tokenizer of {folder}: {error}") from error
        path = folder / _TEMPLATE
        return cls(
            backend,
            template=path.read_text(encoding="utf-8") if path.exists() else None,
            special_tokens={key: text for key, text in config.items() if key.endswith("_token")},
            stop_token_ids=config.get(_STOP_IDS, ()),
        )

    @staticmethod
    def present(folder: Path) -> bool:
        """Whether the folder holds a tokenizer at all; an engine may go without."""
        return (folder / _TOKENIZER).exists()

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, added ones counted; the model's table may be longer."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_template(self) -> bool:
        """Whether `render` can be called."""
        return self._template_source is not None

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids. `add_special` puts begin and end tokens around, as the model wants them; a
        rendered conversation has them already. `ValueError` for a text with lone surrogates."""
        return self.encode_batch([text], add_special=add_special)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special: bool) -> list[list[int]]:
        """`encode` for many texts, in threads; one bad text fails all."""
        try:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special)
        except TypeError as error:
            raise ValueError(f"a text is not valid Unicode: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Bytes that are not (yet) a character become U+FFFD, and
        ids beyond the vocabulary, which a model's padded table can give, become nothing."""
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """A conversation (`role`, `content`, ...) as the text that the model continues.

        `template_kwargs` are variables of the template, `tools` and `documents` among them. As the
        text is to be completed, the assistant's header comes last unless told otherwise. Encode
        it with `add_special=False`. `TemplateError` where the template refuses.
        """
        template = self._compiled()
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **template_kwargs,
            "messages": [_with_reasoning(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(variables)
        # A template is a program that came with the weights: it may raise anything, and a row's
        # content may make it do so.
        except Exception as error:
            raise TemplateError(
                f"the chat template failed: {type(error).__name__}: {error}"
            ) from error

    def _compiled(self) -> jinja2.Template:
        if self._template_source is None:
            raise TemplateError("the engine has no chat template; give prompts instead of messages")
        if self._template is None:
            import jinja2

            try:
                self._template = _environment().from_string(self._template_source)
            except jinja2.TemplateSyntaxError as error:
                raise TemplateError(
                    f"the chat template is not valid in line {error.lineno}: {error.message}"
                ) from error
        return self._template


def write_tokenizer(weights: Weights, folder: Path) -> None:
    """Write the tokenizer of a target into an engine folder; nothing where it has none."""
    tokenizer = weights.tokenizer_json()
    if tokenizer is None:
        return
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **weights.special_tokens,
        _STOP_IDS: list(weights.stop_token_ids),
    }
    (folder / _TOKENIZER).write_bytes(tokenizer.encode())
    (folder / _CONFIG).write_bytes((json.dumps(config, indent=2) + "\n").encode())
    template = weights.chat_template()
    if template is not None:
        (folder / _TEMPLATE).write_bytes(template.encode())


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a message whose reasoning, if any, is under the names that templates read."""
    copy = dict(message)
    given = [copy[key] for key in _REASONING_KEYS if copy.get(key) is not None]
    if given:
        copy["reasoning_content"] = given[0]
        copy.setdefault("thinking", given[0])
    return copy


def _environment() -> jinja2.Environment:
    """The Jinja dialect of chat templates: sandboxed, with the helpers that transformers gives."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            """A call block, so that the body is a scope of its own as in transformers."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which models were not trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
