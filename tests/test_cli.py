from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeDecode, FakeEngine, FakeStats, FakeTokenizer

from dspark_batch import __version__
from dspark_batch import errors as error_tree
from dspark_batch.cli import main
from dspark_batch.engine.runtimes.session import ANYWHERE, Placement
from dspark_batch.errors import DSparkError, EngineError, InputError
from dspark_batch.job.definition import Job


class Fakes:
    """What the commands import when they run."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.decode = FakeDecode()
        self.opened: list[tuple[Path, int | None]] = []
        self.exported: list[dict[str, object]] = []

    def open_engine(
        self,
        folder: Path,
        *,
        max_rows: int | None = None,
        with_draft: bool = True,
        placement: Placement = ANYWHERE,
    ) -> FakeEngine:
        self.with_draft, self.placement = with_draft, placement
        self.opened.append((folder, max_rows))
        if folder.name == "missing":
            raise EngineError("no engine missing;\n  build it with: dspark-batch export missing")
        return self.engine

    def read_manifest(self, folder: Path) -> object:
        if folder.name == "missing":
            raise EngineError("no engine missing")
        limits = types.SimpleNamespace(max_tokens=self.engine.max_tokens)
        target = types.SimpleNamespace(vocab_size=self.engine.vocab_size)
        return types.SimpleNamespace(
            has_tokenizer=True,
            limits=limits,
            target=target,
            runtime="onnxruntime",
            precision="fp32",
        )

    def open_tokenizer(self, folder: Path) -> FakeTokenizer:
        assert folder == Path("engines/model")
        return FakeTokenizer()

    def export(self, recipe_path: Path, **options: object) -> Path:
        options["progress"]("building target")
        self.exported.append({"recipe": recipe_path, **options})
        return Path(options["output"])


@pytest.fixture
def fakes(monkeypatch, tmp_path) -> Fakes:
    fakes = Fakes()
    for name, members in {
        "job.opening": {"open_engine": fakes.open_engine},
        "decode": {"decode": lambda *a, **kw: fakes.decode(*a, **kw), "DecodeStats": FakeStats},
        "job.check": {
            "read_manifest": fakes.read_manifest,
            "Tokenizer": types.SimpleNamespace(open=fakes.open_tokenizer),
        },
        "export": {"export": fakes.export},
    }.items():
        for member, fake in members.items():
            monkeypatch.setattr(f"dspark_batch.{name}.{member}", fake)
    monkeypatch.chdir(tmp_path)
    return fakes


def write(prompts: list[str | None], path: str = "in.parquet") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), path)
    return path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_the_shortest_command_writes_beside_the_input(fakes):
    result = invoke("run", write(["one", "two"], "jobs/prompts.parquet"))
    assert result.exit_code == 0, result.output
    assert "rows      2 ok, 0 errors" in result.stdout
    assert f"output    {Path('jobs/prompts.completions/data')}" in result.stdout
    assert "loading engine engines/model" in result.stderr
    assert "loading" not in result.stdout
    assert pq.read_table("jobs/prompts.completions/data").num_rows == 2
    assert fakes.opened == [(Path("engines/model"), None)]
    assert fakes.engine.closed


def test_every_flag_reaches_the_job(fakes, monkeypatch):
    seen = []
    monkeypatch.setattr("dspark_batch.job.run", lambda job, **kw: seen.append((job, kw)) or 1 / 0)
    command = (
        "run in.parquet -o out --engine e --prompt-column p --no-chat-template --system s "
        "--max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 7 --stop a --stop b "
        "--spec off --scheduler threshold --confidence-threshold 0.75 --max-rows 2 --part-rows 9 "
        "--device cpu --workers 1 "
        "--limit 8 --token-ids --output-prefix o_ "
        "--max-error-rate 0 --deadline 60 --overwrite --progress none"
    )
    invoke(*shlex.split(command))
    job, options = seen[0]
    assert job == Job(
        input="in.parquet",
        output=Path("out"),
        engine=Path("e"),
        prompt_column="p",
        chat_template=False,
        system="s",
        max_new_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=7,
        stop=("a", "b"),
        spec="off",
        scheduler="threshold",
        confidence_threshold=0.75,
        max_rows=2,
        device="cpu",
        workers=1,
        part_rows=9,
        limit=8,
        token_ids=True,
        output_prefix="o_",
        max_error_rate=0.0,
        deadline=60.0,
    )
    assert options["overwrite"] is True
    assert options["argv"] == shlex.split(command)


def test_a_job_file_is_run_and_flags_win(fakes):
    write(["a"], "jobs/in.parquet")
    Path("jobs/night.toml").write_text('input = "in.parquet"\nmax_rows = 3\nseed = 1\n')
    result = invoke("run", "jobs/night.toml", "--max-rows", "5", "--json")
    assert result.exit_code == 0, result.output
    assert fakes.opened == [(Path("engines/model"), 5)]
    assert json.loads(result.stdout)["num_rows"] == 1
    record = json.loads(Path("jobs/in.completions/run/record.json").read_text())
    assert record["job"]["seed"] == 1
    assert record["argv"] == ["run", "jobs/night.toml", "--max-rows", "5", "--json"]


def test_json_is_one_object_on_stdout(fakes):
    result = invoke("run", write(["one", None]), "--json", "--max-error-rate", "1")
    values = json.loads(result.stdout)
    assert values["exit_code"] == result.exit_code == 0
    assert (values["num_rows"], values["errors"]) == (2, {"invalid_row": 1})


def test_the_same_command_again_has_nothing_to_do(fakes):
    write(["one"])
    invoke("run", "in.parquet")
    result = invoke("run", "in.parquet")
    assert result.exit_code == 0
    assert "nothing to do" in result.stdout


ERRORS = [kind for kind in vars(error_tree).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", [k for k in ERRORS if issubclass(k, DSparkError)])
def test_every_error_of_ours_is_a_line_a_hint_and_its_exit_code(fakes, kind):
    def fail(num_done: int) -> None:
        raise kind("this went\nwrong", hint="type that")

    fakes.decode.before_yield = fail
    result = invoke("run", write(["one"]), "--progress", "none")
    assert result.exit_code == kind.exit_code
    assert result.stderr == "error: this went wrong\n\nhint: type that\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("run none.parquet", 3, "error: there is no file or folder none.parquet"),
        ("run night.toml", 3, "error: no job file night.toml"),
        ("run in.parquet --engine missing", 5, "build it with: dspark-batch export missing"),
        ("run in.parquet --top-p 2", 2, "error: top_p must be above 0 and at most 1"),
        ("run in.parquet --part-rows 0", 2, "error: --part-rows: Input should be greater than"),
        ("run in.parquet --spec maybe", 2, "'maybe' is not one of 'auto', 'on', 'off'"),
        ("run in.parquet --prompt-column x", 3, "error: the input has no column 'x'"),
        ("run in.parquet --tempature 1", 2, "error: no such option '--tempature'. (Did you mean"),
        ("run", 2, "error: missing argument 'INPUT'"),
        ("status nowhere", 2, "error: nowhere is not the output of a run"),
        ("check in.parquet --engine missing", 5, "error: no engine missing"),
        ("check none.parquet --engine missing", 5, "error: no engine missing"),
        ("check none.parquet", 3, "error: there is no file or folder none.parquet"),
    ],
)
def test_wrong_commands_end_with_code_and_message(fakes, command, code, message):
    write(["one"])
    result = invoke(*shlex.split(command))
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize("source", ["in.parquet", "none.parquet"])
def test_the_progress_display_is_closed_whatever_happens(fakes, monkeypatch, source):
    from dspark_batch.job import progress

    closed = []
    monkeypatch.setattr(progress.PlainProgress, "close", lambda self: closed.append(True))
    write(["one"])
    invoke("run", source)
    assert closed == [True]


def test_too_many_row_errors_print_the_summary_and_exit_4(fakes):
    result = invoke("run", write(["one", None]))
    assert result.exit_code == 4
    assert "1 ok, 1 error (invalid_row 1)" in result.stdout
    error, _, hint = result.stderr.splitlines()[-3:]
    assert error.startswith("error: 1 ok, 1 error (invalid_row 1): more")
    assert hint.startswith("hint: see the columns status and error in ")


def test_a_stop_prints_the_summary_and_exits_75(fakes):
    write([f"{i}" for i in range(9)])
    result = invoke("run", "in.parquet", "--deadline", "1e-9", "--overwrite", "--part-rows", "2")
    assert result.exit_code == 75
    assert "rows      0 ok, 0 errors" in result.stdout
    assert result.stderr.splitlines()[-1].endswith(
        "hint: continue with: dspark-batch run in.parquet --deadline 1e-9 --part-rows 2"
    )


def test_ctrl_c_exits_130_without_a_traceback(fakes):
    def interrupt(num_done: int) -> None:
        raise KeyboardInterrupt

    fakes.decode.before_yield = interrupt
    result = invoke("run", write(["one"]), "--progress", "none")
    assert (result.exit_code, result.stderr) == (
        130,
        "\ninterrupted: finished parts are kept\n\nhint: run the same command to continue\n",
    )


def test_an_unexpected_exception_is_not_dressed_up(fakes):
    def fail(num_done: int) -> None:
        raise ZeroDivisionError("a bug")

    fakes.decode.before_yield = fail
    result = invoke("run", write(["one"]))
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1
    record = json.loads(Path("in.completions/run/record.json").read_text())
    assert (record["state"], record["error"]) == ("failed", "ZeroDivisionError: a bug")


def test_a_run_that_never_began_leaves_no_folder_behind(fakes):
    write(["one"])
    invoke("run", "in.parquet", "--engine", "missing")
    assert not Path("in.completions").exists()
    Path("in.completions").mkdir()
    invoke("run", "in.parquet", "--engine", "missing")
    assert Path("in.completions").exists()
    invoke("run", "in.parquet")
    invoke("run", "in.parquet", "--engine", "missing")
    assert invoke("status", "in.completions").exit_code == 0


def test_check_counts_and_exits_3_for_invalid_rows(fakes):
    result = invoke("check", write(["one", "three"]))
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "rows      2 ok, 0 errors")
    result = invoke("check", write(["one", None, ""]), "--json")
    assert result.exit_code == InputError.exit_code
    assert json.loads(result.stdout)["errors"] == {"invalid_row": 2}
    assert result.stderr.startswith("error: 2 of 3 rows are invalid: row 1: prompt is null\n\nhint")
    assert fakes.opened == []  # the graphs are not loaded for it


def test_status_shows_what_is_there(fakes):
    invoke("run", write(["one", "two", "three"]), "--part-rows", "1")
    result = invoke("status", "in.completions")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:3] == [
        "last run  finished",
        "parts     3 of 3",
        "rows      3 of 3: 3 ok, 0 errors",
    ]
    values = json.loads(invoke("status", "in.completions", "--json").stdout)
    assert (values["state"], values["num_parts"]) == ("finished", 3)


@pytest.mark.parametrize(
    ("command", "recipe", "output"),
    [
        ("export", "export/model.toml", "engines/model"),
        ("export tiny", "export/tiny.toml", "engines/tiny"),
        ("export other/x.toml -o here --force", "other/x.toml", "here"),
        ("export --runtime onnxruntime", "export/model.toml", "engines/model"),
        ("export tiny --runtime tensorrt-rtx", "export/tiny.toml", "engines/tiny-tensorrt-rtx"),
        ("export tiny --runtime tensorrt -o here", "export/tiny.toml", "here"),
    ],
)
def test_export_finds_recipe_and_folder(fakes, command, recipe, output):
    result = invoke(*command.split())
    assert result.exit_code == 0, result.output
    call = fakes.exported[0]
    assert (call["recipe"], call["output"]) == (Path(recipe), Path(output))
    assert call["force"] is ("--force" in command)
    assert result.stdout == f"{Path(output)}\n"
    assert result.stderr == "building target\n"


def test_export_hands_on_what_takes_the_place_of_the_recipe(fakes):
    assert invoke("export").exit_code == 0
    flags = "--runtime tensorrt-rtx --precision bf16 --gpu-arch 89 --gpu-arch 120"
    assert invoke("export", *flags.split()).exit_code == 0
    names = ("runtime", "precision", "gpu_archs")
    plain, other = ([call[name] for name in names] for call in fakes.exported)
    assert plain == [None, None, ()]
    assert other == ["tensorrt-rtx", "bf16", (89, 120)]


def test_version_and_help():
    assert invoke("--version").stdout == f"dspark-batch, version {__version__}\n"
    for args in (["-h"], ["run", "-h"], ["run", "--help"]):
        assert invoke(*args).exit_code == 0


def test_help_names_every_setting_with_its_default():
    text = " ".join(invoke("run", "--help").stdout.split())
    for name, field in Job.model_fields.items():
        if name != "input":
            assert f"--{name.replace('_', '-')}" in text
            assert " ".join(field.description.split()) in text
    assert "[default: 256]" in text


def test_every_command_ends_with_an_example_that_parses():
    for name, command in {"": main, **main.commands}.items():
        example = (command.help or "").rstrip().splitlines()[-1].strip()
        words = shlex.split(example)
        assert words[0] == "dspark-batch", f"{name or 'main'} has no example"
        assert name in ("", words[1])
        target = main.commands[words[1]]
        # Not a bare Context: a command keeps the help option of the first one it sees.
        parent = main.make_context("dspark-batch", words[1:])
        context = target.make_context(words[1], words[2:], parent=parent)
        assert context.params


@pytest.mark.parametrize(
    "command", ["--help", "run --help", "export --help", "doctor --help", "--version"]
)
def test_help_imports_nothing_heavy(command):
    script = (
        "import sys\n"
        "from dspark_batch.cli import main\n"
        f"try: main({command.split()!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'onnxruntime', 'onnx', 'torch', 'pyarrow', 'polars', 'tokenizers', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr.strip() == "[]"
    assert done.stdout


@pytest.mark.parametrize(("spec", "with_draft"), [("off", False), ("on", True), ("auto", True)])
def test_plain_decoding_does_not_load_the_draft(fakes, spec, with_draft):
    assert invoke("run", write(["one"]), "--spec", spec).exit_code == 0
    assert fakes.with_draft is with_draft


def test_the_device_reaches_the_engine(fakes):
    invoke("run", write(["one"]))
    assert fakes.placement == Placement(device="auto")
    assert invoke("run", "in.parquet", "--device", "cpu", "--overwrite").exit_code == 0
    assert fakes.placement == Placement(device="cpu")
