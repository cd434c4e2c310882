from __future__ import annotations

import math
from pathlib import Path

import pytest

from dspark_batch.decode.types import SamplingParams
from dspark_batch.errors import InputError, UsageError
from dspark_batch.job.definition import RESULT_FIELDS, Job, invalid_params, load_job


def write(folder: Path, text: str) -> str:
    path = folder / "nightly.toml"
    path.write_text(text)
    return str(path)


def test_an_input_alone_is_a_job_with_the_defaults_of_sampling_params():
    job = load_job("prompts.parquet", {})
    assert job.input == "prompts.parquet"
    assert job.params == SamplingParams()


def test_flags_win_over_the_file(tmp_path):
    source = write(tmp_path, 'input = "a.parquet"\ntemperature = 0.5\ntop_k = 7\n')
    job = load_job(source, {"temperature": 0.9})
    assert (job.temperature, job.top_k) == (0.9, 7)


def test_paths_of_a_file_are_relative_to_it_and_those_of_flags_are_not(tmp_path):
    source = write(tmp_path, 'input = "a.parquet"\nengine = "../engines/x"\n')
    job = load_job(source, {"output": Path("here")})
    assert job.input == str(tmp_path / "a.parquet")
    assert job.engine == tmp_path / "../engines/x"
    assert job.output_folder == Path("here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input = "a"\ntemprature = 1\n', "unknown key 'temprature'; did you mean temperature?"),
        ('input = "a"\nxyz = 1\n', "unknown key 'xyz'"),
        ("temperature = 1\n", "the key 'input' is missing"),
        ('input = "a"\npart_rows = 0\n', "part_rows: Input should be greater than or equal to 1"),
        ('input = "a"\ntop_p = 0.0\n', "top_p must be above 0 and at most 1, not 0.0"),
        ('input = "a"\nspec = "maybe"\n', "spec: Input should be 'auto', 'on' or 'off'"),
        ('input = "a"\nconfidence_threshold = 2\n', "confidence_threshold: Input should be less"),
        (
            'input = "a"\nscheduler = "async"\nconfidence_threshold = 0.5\n',
            "confidence_threshold goes with scheduler = threshold only",
        ),
        ("input = \n", "is not TOML"),
    ],
)
def test_a_wrong_job_file_is_a_usage_error_that_names_file_and_key(tmp_path, text, message):
    source = write(tmp_path, text)
    with pytest.raises(UsageError) as info:
        load_job(source, {})
    assert message in str(info.value)
    assert source in str(info.value)


def test_a_wrong_flag_is_named_as_a_flag():
    with pytest.raises(UsageError, match=r"^--max-error-rate: Input should be less than or equal"):
        load_job("a.parquet", {"max_error_rate": 1.5})


def test_a_missing_job_file_is_an_input_error():
    with pytest.raises(InputError, match=r"no job file nowhere\.toml"):
        load_job("nowhere.toml", {})


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("jobs/prompts.parquet", "jobs/prompts.completions"),
        ("prompts.parquet", "prompts.completions"),
    ],
)
def test_the_default_output_lies_beside_the_input(source, output):
    assert Job(input=source).output_folder == Path(output)


def test_the_default_output_of_a_folder_lies_beside_the_folder(tmp_path):
    (tmp_path / "night.parquet").mkdir()
    output = Job(input=str(tmp_path / "night.parquet")).output_folder
    assert output == tmp_path / "night.parquet.completions"


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    path = tmp_path / "night[1].parquet"
    path.write_text("")
    assert Job(input=str(path)).output_folder == tmp_path / "night[1].completions"


def test_a_pattern_has_no_default_output():
    with pytest.raises(UsageError, match=r"for the pattern in/\*\.parquet\n\nhint: add"):
        _ = Job(input="in/*.parquet").output_folder


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(max_new_tokens=0), "max_new_tokens"),
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(temperature=math.inf), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.01), "top_p"),
        (SamplingParams(top_p=math.nan), "top_p"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(seed=-1), "seed"),
        (SamplingParams(seed=2**63), "seed"),
        (SamplingParams(stop=("a", "")), "stop"),
    ],
)
def test_values_out_of_range_are_named(params, name):
    problem = invalid_params(params)
    assert problem is not None
    assert problem.startswith(f"{name} must")


def test_the_ends_of_the_ranges_are_valid():
    params = SamplingParams(
        max_new_tokens=1, temperature=0.0, top_p=1.0, top_k=0, seed=2**63 - 1, stop=("x",)
    )
    assert invalid_params(params) is None


def test_every_setting_either_decides_the_result_or_may_change_between_runs():
    # A new field must be put on one side: forgetting it would let two jobs share a folder.
    may_change = {"output", "engine", "device", "workers", "max_rows", "max_error_rate", "deadline"}
    may_change |= {"spec", "scheduler", "confidence_threshold"}
    in_the_row_range = {"part_rows", "limit"}
    resolved = {"input", "prompt_column", "messages_column", "token_ids_column"}
    others = may_change | in_the_row_range | resolved
    assert others | set(RESULT_FIELDS) == set(Job.model_fields)
    assert not others & set(RESULT_FIELDS)


@pytest.mark.parametrize(
    ("spec", "scheduler", "needed"),
    [
        ("auto", None, True),
        ("auto", "threshold", True),
        ("on", None, False),
        ("on", "threshold", False),
        ("on", "early-stop", True),
        ("on", "async", True),
        ("off", "async", False),
        ("off", None, False),
    ],
)
def test_costs_are_needed_where_something_is_weighed(spec, scheduler, needed):
    assert Job(input="a", spec=spec, scheduler=scheduler).needs_costs is needed
