"""Rebuilds a `tokenizer.json` from the vocabulary in a GGUF file.

It must split text exactly as in training. A GGUF file has only a name for the splitting that comes
before merging (`tokenizer.ggml.pre`), not the rule. An unknown name is an error, since a wrong
split gives plausible tokens that the model has hardly ever seen. With the name `smollm`, digits
stay apart from the spaces and line breaks before them, as in llama.cpp; transformers ignores the
name when it converts, and joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark_batch.errors import EngineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

_SPACE = "▁"  # how SentencePiece spells a space

_CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
_LLAMA3_SPLIT = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How byte-level BPE splits text, and the settings that go with it in published tokenizers."""

    split: str | None = None
    """Regular expression of a piece; None: GPT-2's."""
    single_digits: bool = False
    """Each digit is a piece."""
    whole_words: bool = False
    """A piece that is a token itself is not merged from parts."""
    adds_bos: bool = False
    """Texts start with the BOS token, unless the file says otherwise."""
    composes: bool = False
    """Text is normalized to NFC first."""


_GPT2 = _PreTokenizer()
_DIGITS = _PreTokenizer(single_digits=True)
_LLAMA3 = _PreTokenizer(_LLAMA3_SPLIT, whole_words=True, adds_bos=True)
_QWEN2 = _PreTokenizer(_QWEN2_SPLIT, composes=True)

_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _PreTokenizer(_LLAMA3_SPLIT),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _PreTokenizer(_QWEN2_SPLIT),
    "tekken": _PreTokenizer(_TEKKEN_SPLIT, whole_words=True, adds_bos=True),
}


def tokenizer_json(metadata: Mapping[str, Any], *, architecture: str, origin: str) -> str:
    """The `tokenizer.json` for a GGUF file's metadata.

    Raises:
        EngineError: the tokenizer model or the pre-tokenizer is unknown; names `origin`, the file.
    """
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "gpt-2")
        pre = _PRE_TOKENIZERS.get(name)
        if pre is None:
            raise EngineError(
                f"{origin} has the pre-tokenizer {name!r}, which is not supported; supported: "
                f"{', '.join(_PRE_TOKENIZERS)}",
                hint="use the model's Hugging Face folder, which has a tokenizer.json",
            )
        tokenizer = _byte_level(vocabulary, pre)
        adds_bos = pre.adds_bos
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary, is_gemma=architecture.startswith("gemma"))
        adds_bos = True
    else:
        raise EngineError(
            f"{origin} has a tokenizer of the kind {kind!r}, which is not supported",
            hint="supported: gpt2, llama",
        )
    _add_special_tokens(tokenizer, vocabulary)
    _add_post_processor(tokenizer, vocabulary, adds_bos=adds_bos)
    return str(tokenizer.to_str())


class _Vocabulary:
    """The tokenizer's metadata, under short names."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        def get(key: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{key}", default)

        self.tokens: list[str] = get("tokens")
        self.scores: list[float] = get("scores", [0.0] * len(self.tokens))
        self.kinds: list[int] = get("token_type", [1] * len(self.tokens))
        self.merges: list[str] | None = get("merges")
        self.bos: int | None = get("bos_token_id")
        self.eos: int | None = get("eos_token_id")
        self.unknown: int | None = get("unknown_token_id")
        self.named = {
            self.bos,
            self.eos,
            self.unknown,
            get("padding_token_id"),
            get("eot_token_id"),
        }
        self.adds_bos: bool | None = get("add_bos_token")
        self.adds_eos: bool = get("add_eos_token", False)
        self.adds_space: bool = get("add_space_prefix", True)

    def text(self, id: int | None) -> str | None:
        return None if id is None else self.tokens[id]


def _byte_level(vocabulary: _Vocabulary, pre: _PreTokenizer) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    merges = [_pair(merge) for merge in vocabulary.merges or ()]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: id for id, token in enumerate(vocabulary.tokens)},
            merges=merges,
            ignore_merges=pre.whole_words,
        )
    )
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary, *, is_gemma: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    # The file spells runs of spaces as spaces; the tokenizer looks them up as ▁.
    tokens = [
        _SPACE * len(token) if token and not token.strip(" ") else token
        for token in vocabulary.tokens
    ]
    # Gemma's merges are in the order of its token ids, not of its scores.
    priorities: Sequence[float] = range(0, -len(tokens), -1) if is_gemma else vocabulary.scores
    tokenizer = Tokenizer(
        BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=_merges(tokens, priorities),
            unk_token=vocabulary.text(vocabulary.unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds_space:
        steps.insert(0, normalizers.Prepend(_SPACE))
        decoding.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges(tokens: Sequence[str], priorities: Iterable[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that merge into a token: best priority first, then longest left part."""
    known = set(tokens)
    found = []
    for token, priority in zip(tokens, priorities, strict=True):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in known and token[cut:] in known:
                found.append((-priority, -cut, cut - len(token), token[:cut], token[cut:]))
    found.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in found]


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the tokens that are matched as a whole, before any splitting.

    Control tokens are special: decoding leaves them out. User-defined tokens are not.
    """
    from tokenizers import AddedToken

    special, plain = [], []
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if tokenizer.token_to_id(token) is None:
            continue  # a run of spaces, respelled above: merging makes it
        if kind == _CONTROL or id in vocabulary.named:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, adds_bos: bool) -> None:
    """Put BOS and EOS tokens around a text that is encoded with `add_special`."""
    from tokenizers import processors

    around: list[tuple[str, int]] = []
    template = ["$A"]
    if vocabulary.bos is not None and (
        adds_bos if vocabulary.adds_bos is None else vocabulary.adds_bos
    ):
        around.append((vocabulary.tokens[vocabulary.bos], vocabulary.bos))
        template.insert(0, around[-1][0])
    if vocabulary.eos is not None and vocabulary.adds_eos:
        around.append((vocabulary.tokens[vocabulary.eos], vocabulary.eos))
        template.append(around[-1][0])
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=around
        )
