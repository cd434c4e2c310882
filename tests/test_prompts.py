from __future__ import annotations

import math

import pytest
from fake_engine import BEGIN, FakeEngine, FakeTokenizer

from dspark_batch.decode.types import ErrorCode, SamplingParams
from dspark_batch.errors import DSparkError, InputError, UsageError
from dspark_batch.job.columns import PromptColumns, choose_columns
from dspark_batch.job.definition import Job
from dspark_batch.job.prompts import PromptPreparer, row_seed

TEXT = PromptColumns("prompt", "prompt", ())
MESSAGES = PromptColumns("messages", "messages", ())
TOKENS = PromptColumns("prompt_token_ids", "prompt_token_ids", ())
PARAMS = PromptColumns(
    "prompt", "prompt", ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
)
NONE_GIVEN = dict.fromkeys(PARAMS.params)


def choose(kinds: dict[str, str], **settings: object) -> PromptColumns:
    types = {name: f"<{kind}>" for name, kind in kinds.items()}
    return choose_columns(kinds, types, Job(input="x.parquet", **settings))


def preparer(
    columns: PromptColumns = TEXT, engine: FakeEngine | None = None, **settings: object
) -> PromptPreparer:
    return PromptPreparer(
        Job(input="x.parquet", **settings), columns, engine or FakeEngine(max_tokens=512)
    )


def text_of(prepared) -> str:
    assert prepared.error is None, prepared.error
    return FakeTokenizer().decode(prepared.prompt.token_ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("prompt", "string"), ("messages", "messages"), ("prompt_token_ids", "integers")],
)
def test_the_only_prompt_column_is_taken(name, kind):
    assert choose({"id": "string", name: kind}) == PromptColumns(name, name, ())


@pytest.mark.parametrize("flag", ["prompt_column", "messages_column", "token_ids_column"])
def test_a_flag_chooses_among_several(flag):
    kinds = {"prompt": "string", "messages": "messages", "prompt_token_ids": "integers"}
    name = {"token_ids_column": "prompt_token_ids"}.get(flag, flag.removesuffix("_column"))
    assert choose(kinds, **{flag: name}).kind == name


def test_parameter_columns_are_found_by_name():
    columns = choose(
        {"question": "string", "seed": "null", "top_p": "number", "n": "integer"},
        prompt_column="question",
    )
    assert columns == PromptColumns("prompt", "question", ("top_p", "seed"))


def test_the_prompt_column_overrides_no_setting():
    columns = choose({"stop": "string", "seed": "integer"}, prompt_column="stop")
    assert columns == PromptColumns("prompt", "stop", ("seed",))


@pytest.mark.parametrize(
    ("kinds", "settings", "error", "message"),
    [
        (
            {"id": "string", "text": "string"},
            {},
            InputError,
            "no column prompt, messages or prompt_token_ids; its columns are id and text\n\n"
            "hint: name the one with the prompts: --prompt-column NAME",
        ),
        (
            {"prompt": "string", "messages": "messages"},
            {},
            InputError,
            "has the columns prompt and messages, and each could hold the prompts\n\n"
            "hint: --prompt-column prompt or --messages-column messages",
        ),
        (
            {"prompt": "string", "prompt_token_ids": "integers"},
            {},
            InputError,
            "--prompt-column prompt or --token-ids-column prompt_token_ids",
        ),
        (
            {"prompt": "string"},
            {"prompt_column": "promt"},
            InputError,
            "no column 'promt'; did you mean prompt?\n\nhint: its columns are prompt",
        ),
        (
            {"prompt": "string", "messages": "messages"},
            {"prompt_column": "prompt", "messages_column": "messages"},
            UsageError,
            "--prompt-column and --messages-column exclude each other",
        ),
        (
            {"prompt": "integer"},
            {},
            InputError,
            "column 'prompt' has the type <integer>, but prompt must be text",
        ),
        (
            {"prompt": "string", "stop": "other"},
            {},
            InputError,
            "column 'stop' has the type <other>, but stop must be text or a list of texts",
        ),
    ],
)
def test_a_choice_that_is_not_clear_is_an_error_with_the_way_out(kinds, settings, error, message):
    with pytest.raises(error) as info:
        choose(kinds, **settings)
    assert message in str(info.value)


def test_text_becomes_one_user_message_without_a_second_begin_token():
    prepared = preparer().prepare(3, {"prompt": "Hi"})
    assert text_of(prepared) == "<user>Hi<assistant>"
    assert BEGIN not in prepared.prompt.token_ids
    assert prepared.prompt.row == 3
    assert prepared.num_prompt_tokens == len("<user>Hi<assistant>")


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        (FakeEngine(tokenizer=FakeTokenizer(has_template=False)), {}),
        (FakeEngine(), {"chat_template": False}),
    ],
)
def test_text_without_a_template_gets_the_special_tokens(engine, settings):
    prepared = preparer(engine=engine, **settings).prepare(0, {"prompt": "Hi"})
    assert prepared.prompt.token_ids == (BEGIN, *b"Hi")


def test_the_system_message_comes_first():
    prepared = preparer(system="Be brief.").prepare(0, {"prompt": "Hi"})
    assert text_of(prepared) == "<system>Be brief.<user>Hi<assistant>"


def test_messages_are_rendered_and_keep_their_own_system_message():
    messages = [
        {"role": "system", "content": "Rhyme.", "name": None},
        {"role": "user", "content": "Hi", "name": None},
    ]
    ready = preparer(MESSAGES, system="Be brief.")
    assert text_of(ready.prepare(0, {"messages": messages})) == "<system>Rhyme.<user>Hi<assistant>"
    without = ready.prepare(0, {"messages": messages[1:]})
    assert text_of(without) == "<system>Be brief.<user>Hi<assistant>"


def test_token_ids_are_taken_as_they_are():
    engine = FakeEngine(tokenizer=None)
    ready = preparer(TOKENS, engine, token_ids=True)
    assert ready.prepare(0, {"prompt_token_ids": [5, 299]}).prompt.token_ids == (5, 299)


def test_a_row_overrides_the_job_and_null_does_not():
    ready = preparer(PARAMS, max_new_tokens=9, temperature=0.5, stop=("a",))
    given = {
        "max_new_tokens": 4.0,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 12,
        "stop": ["x", "y"],
    }
    params = ready.prepare(0, {"prompt": "Hi", **given}).prompt.params
    assert params == SamplingParams(4, 1.0, 0.5, 3, 12, ("x", "y"))
    params = ready.prepare(0, {"prompt": "Hi", **NONE_GIVEN}).prompt.params
    assert params == SamplingParams(9, 0.5, 1.0, 0, row_seed(0, 0), ("a",))
    one = ready.prepare(0, {"prompt": "Hi", **NONE_GIVEN, "stop": "x"}).prompt.params
    assert one.stop == ("x",)


def test_the_seed_of_a_row_depends_on_job_seed_and_row_alone():
    assert row_seed(5, 77) == 5947251454554378337  # documented: it must never change
    seeds = {row_seed(seed, row) for seed in range(4) for row in range(256)}
    assert len(seeds) == 1024
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert preparer(seed=5).prepare(77, {"prompt": "Hi"}).seed == row_seed(5, 77)


@pytest.mark.parametrize(
    ("columns", "values", "code", "stage", "message"),
    [
        (TEXT, {"prompt": None}, ErrorCode.INVALID_ROW, "read", "prompt is null"),
        (TEXT, {"prompt": b""}, ErrorCode.INVALID_ROW, "read", "prompt is not valid UTF-8"),
        (TEXT, {"prompt": ""}, ErrorCode.INVALID_ROW, "read", "prompt is empty"),
        (
            TEXT,
            {"prompt": "%broken%"},
            ErrorCode.TEMPLATE_ERROR,
            "render",
            "the template refuses this",
        ),
        (TEXT, {"prompt": "\x00"}, ErrorCode.TOKENIZE_ERROR, "tokenize", "cannot encode a NUL"),
        (
            TEXT,
            {"prompt": "x" * 300},
            ErrorCode.PROMPT_TOO_LONG,
            "tokenize",
            "317 prompt tokens and 256 new tokens are more than the 512 tokens that the engine "
            "holds per row",
        ),
        (MESSAGES, {"messages": None}, ErrorCode.INVALID_ROW, "read", "messages is null"),
        (MESSAGES, {"messages": []}, ErrorCode.INVALID_ROW, "read", "messages is empty"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": None}]},
            ErrorCode.INVALID_ROW,
            "read",
            "message 1 has no content",
        ),
        (MESSAGES, {"messages": [None]}, ErrorCode.INVALID_ROW, "read", "message 0 has no role"),
        (
            TOKENS,
            {"prompt_token_ids": []},
            ErrorCode.INVALID_ROW,
            "tokenize",
            "prompt_token_ids is empty: it has no token",
        ),
        (
            TOKENS,
            {"prompt_token_ids": [1, None]},
            ErrorCode.INVALID_ROW,
            "read",
            "prompt_token_ids holds a null",
        ),
        (
            TOKENS,
            {"prompt_token_ids": [1, 300]},
            ErrorCode.INVALID_ROW,
            "tokenize",
            "token 300 is not in the vocabulary of 300 tokens",
        ),
        (
            TOKENS,
            {"prompt_token_ids": [-1]},
            ErrorCode.INVALID_ROW,
            "tokenize",
            "token -1 is not in the vocabulary of 300 tokens",
        ),
    ],
)
def test_a_bad_row_is_an_error_with_code_stage_and_message(columns, values, code, stage, message):
    prepared = preparer(columns).prepare(0, values)
    assert prepared.prompt is None
    assert (prepared.error.code, prepared.error.stage) == (code, stage)
    assert prepared.error.message == message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", math.nan),
        ("max_new_tokens", math.inf),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", [None]),
        ("stop", [""]),
        ("stop", b""),
    ],
)
def test_a_bad_parameter_is_an_error_row_without_a_seed(name, value):
    prepared = preparer(PARAMS).prepare(0, {"prompt": "Hi", **NONE_GIVEN, name: value})
    assert prepared.prompt is None
    assert prepared.error.code == ErrorCode.INVALID_PARAMS
    assert name in prepared.error.message
    assert prepared.seed is None


def test_a_prompt_that_just_fits_is_decoded():
    engine = FakeEngine(tokenizer=FakeTokenizer(has_template=False), max_tokens=10)
    ready = preparer(engine=engine, max_new_tokens=4)
    assert ready.prepare(0, {"prompt": "12345"}).prompt is not None
    too_long = ready.prepare(0, {"prompt": "123456"})
    assert too_long.error.code == ErrorCode.PROMPT_TOO_LONG
    assert too_long.num_prompt_tokens == 7


@pytest.mark.parametrize(
    ("columns", "engine", "settings", "error", "message"),
    [
        (TEXT, FakeEngine(tokenizer=None), {}, InputError, "give token ids: --token-ids-column"),
        (TOKENS, FakeEngine(tokenizer=None), {}, UsageError, "add --token-ids"),
        (
            MESSAGES,
            FakeEngine(),
            {"chat_template": False},
            UsageError,
            "leave out --no-chat-template",
        ),
        (
            MESSAGES,
            FakeEngine(tokenizer=FakeTokenizer(has_template=False)),
            {},
            InputError,
            "no chat template for messages",
        ),
        (TEXT, FakeEngine(), {"system": "x", "chat_template": False}, UsageError, "--system needs"),
        (TOKENS, FakeEngine(), {"system": "x"}, UsageError, "--system needs"),
        (TEXT, FakeEngine(max_tokens=256), {}, UsageError, "lower --max-new-tokens"),
    ],
)
def test_what_does_not_fit_together_is_said_before_the_first_row(
    columns, engine, settings, error, message
):
    with pytest.raises(DSparkError) as info:
        preparer(columns, engine, **settings)
    assert type(info.value) is error
    assert message in str(info.value)
