"""int8 on every processor: sums that are exact wherever they are added, channels that are mixed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.engine.manifest import read_manifest
from dspark_batch.engine.runtimes import int8, ort
from dspark_batch.export.probes import TargetProbe
from dspark_batch.models.graph.builder import FLOAT, INT64, GraphBuilder
from dspark_batch.models.graph.linears import MOST_LEVEL, Linears, hadamard, quantize_columns
from dspark_batch.models.graph.rewriting import product

MOST = 2 * MOST_LEVEL  # of an activation as it is stored
SOURCE = Path(__file__).with_name("without_vnni.c")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    target = write_target(folder / "target", target_config("llama"))
    draft = write_draft(folder / "draft", draft_config())
    return export_pair(folder, target, draft, precision="int8")


# Sums ---------------------------------------------------------------------------------------------


def saturating_product(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x `[T, in]` unsigned times weights `[in, out]`, as `vpmaddubsw` adds: pairs in 16 bits."""
    terms = x[:, :, None].astype(np.int64) * weights.astype(np.int64)
    pairs = terms.reshape(len(x), -1, 2, weights.shape[1]).sum(axis=2)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


MATRICES = {
    "bell-shaped": lambda rng: rng.standard_normal((96, 40)),
    "flat": lambda rng: rng.uniform(-1, 1, (96, 40)),
    "all the same": lambda rng: np.ones((96, 40)),
    "two values": lambda rng: rng.choice([-3.0, 3.0], (96, 40)),
    "one large in each column": lambda rng: (
        np.where(np.arange(96) == 5, 50, 1)[:, None] * np.ones(40)
    ),
    "zero": lambda rng: np.zeros((96, 40)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_pairs_of_stored_weights_cannot_saturate(kind: str) -> None:
    """With the largest activations on either side, added as the narrowest kernel adds."""
    rng = np.random.default_rng(0)
    matrix = MATRICES[kind](rng).astype(np.float32)
    weights, scales = quantize_columns(matrix, paired=True)
    rest = rng.integers(0, MOST + 1, (20, 96))
    x = np.concatenate([np.full((1, 96), MOST), np.zeros((1, 96)), rest]).astype(np.uint8)
    x[2, ::2] = MOST
    wanted = x.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(saturating_product(x, weights), wanted)
    assert (scales > 0).all()


def test_weights_that_are_not_paired_would_saturate() -> None:
    """Which is why they are."""
    rng = np.random.default_rng(0)
    weights, _ = quantize_columns(rng.standard_normal((96, 40)).astype(np.float32))
    x = np.full((1, 96), MOST, np.uint8)
    wanted = x.astype(np.int64) @ weights.astype(np.int64)
    assert not np.array_equal(saturating_product(x, weights), wanted)


@pytest.mark.parametrize(("height", "most"), [(1536, 1.3), (97, 3.0), (1, 1.1)])
def test_pairs_cost_less_than_a_bit(height: int, most: float) -> None:
    """A bit less would make the squared error four times as large."""
    matrix = np.random.default_rng(1).standard_normal((height, 300)).astype(np.float32)
    error = {}
    for paired in (True, False):
        weights, scales = quantize_columns(matrix, paired=paired)
        assert int(np.abs(weights.astype(int)).max()) <= 127
        error[paired] = float(np.square(weights * scales - matrix).sum())
    assert error[True] < most * error[False] + 1e-9


def test_products_are_exact_on_this_processor() -> None:
    """With the kernels that ONNX Runtime chooses here, for any number of rows."""
    rng = np.random.default_rng(2)
    weights, _ = quantize_columns(rng.standard_normal((288, 70)).astype(np.float32), paired=True)
    session = int8._session(product(weights))
    for num_rows in (1, 2, 3, 4, 5, 8, 33):
        for x in (np.full((num_rows, 288), MOST), rng.integers(0, MOST + 1, (num_rows, 288))):
            wanted = (x.astype(np.int64) - MOST_LEVEL) @ weights.astype(np.int64)
            np.testing.assert_array_equal(session.run(None, {"x": x.astype(np.uint8)})[0], wanted)


def test_the_doctor_s_check_tells_exact_sums_from_others() -> None:
    rng = np.random.default_rng(3)
    weights, _ = quantize_columns(rng.standard_normal((64, 8)).astype(np.float32), paired=True)
    session = int8._session(product(weights))
    assert int8._is_exact(session, weights, MOST_LEVEL)
    other = weights.copy()
    other[0, 0] += 1
    assert not int8._is_exact(session, other, MOST_LEVEL)


def logits(folder: Path) -> np.ndarray:
    manifest = read_manifest(folder)
    probe = TargetProbe(folder / "target.onnx", manifest.target.cache, capacity=64)
    rows = [np.random.default_rng(i).integers(1, 40, 20).tolist() for i in range(3)]
    return np.concatenate(probe.run(rows, [0] * 3, probe.empty(3))[0])


def test_int8_is_as_near_to_fp32_as_its_rounding_explains(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    fp32, rounded = (
        logits(export_pair(tmp_path / name, target, draft, precision=name))
        for name in ("fp32", "int8")
    )
    assert np.linalg.norm(rounded - fp32) / np.linalg.norm(fp32) < 0.08


@pytest.fixture(scope="module")
def without_vnni(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which programs see a processor with AVX2 and nothing newer."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    info = Path("/proc/cpuinfo")
    if compiler is None or not info.exists() or "cpuid_fault" not in info.read_text():
        pytest.skip("needs a C compiler and a processor that can hide features")
    library = tmp_path_factory.mktemp("preload") / "without_vnni.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def test_without_vnni_sums_can_saturate_and_those_of_an_engine_do_not(
    engine: Path, without_vnni: dict[str, str]
) -> None:
    """On the kernels of such a processor, which this one has too."""
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from dspark_batch.models.graph.rewriting import product\n"
        "from dspark_batch.engine.runtimes import int8\n"
        "from test_int8 import logits\n"
        "weights = np.full((64, 8), 127, np.int8)\n"
        "session = int8._session(product(weights))\n"
        "print(int8._is_exact(session, weights, 104), int8.measure_int8().exact)\n"
        "np.save(sys.argv[2], logits(Path(sys.argv[1])))\n"
    )
    path = engine / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-c", program, str(engine), str(path)],
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": "/usr/bin:/bin", **without_vnni},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(path)
    path.unlink()
    assert done.stdout.split() == ["False", "True"]
    wanted = logits(engine)
    # fp32 sums of the attention have another order there; int8 rounds what differs to a step.
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.95


def test_a_run_needs_no_onnx(engine: Path) -> None:
    """It takes longer to import than the rest of the start."""
    code = (
        "import sys; from pathlib import Path\n"
        "from dspark_batch.engine import open_engine\n"
        "open_engine(Path(sys.argv[1])).close()\n"
        "print('onnx' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Mixed channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_mixing_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)
    assert np.ptp(np.abs(matrix)) == 0  # every channel goes into each, as much


def linear(
    folder: Path, x: np.ndarray, matrix: np.ndarray, factors: np.ndarray | None, mix: int
) -> np.ndarray:
    folder.mkdir()
    b = GraphBuilder("g", folder)
    linears = Linears(b, "int8")
    b.input("x", FLOAT, ["T", x.shape[1]])
    b.input("like", INT64, ["T"])
    value = "x" if factors is None else b.op("Div", "x", b.constant(factors, np.float32))
    activation = linears.activation(value, "like", size=x.shape[1], mix=mix)
    y = linears.linear("w", activation, matrix, factors)
    b.output(y, "y", FLOAT, ["T", matrix.shape[1]])
    feeds = {"x": x, "like": np.zeros(len(x), np.int64)}
    found: np.ndarray = ort.open_session(b.save(), threads=1).run(None, feeds)[0]
    return found


@pytest.mark.parametrize("size", [96, 40])
@pytest.mark.parametrize("divided", [False, True])
def test_mixing_leaves_the_product_and_spreads_outliers(
    size: int, divided: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, size)).astype(np.float32)
    x[:, 3] *= 60
    matrix = rng.standard_normal((size, 24)).astype(np.float32)
    matrix[3] /= 60
    factors = rng.uniform(0.5, 2, size).astype(np.float32) if divided else None
    errors = {
        mix: np.linalg.norm(linear(tmp_path / str(mix), x, matrix, factors, mix) - x @ matrix)
        / np.linalg.norm(x @ matrix)
        for mix in (1, 16)
    }
    assert errors[16] < 0.7 * errors[1]
    assert errors[16] < 0.18


def test_mixed_columns_are_those_of_the_mixed_matrix() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((32, 5)).astype(np.float32)
    rows = rng.uniform(0.5, 2, 32).astype(np.float32)
    quantized, scales = quantize_columns(matrix, rows, 16)
    whole = np.kron(np.eye(2), hadamard(16))  # block by block
    wanted = whole @ (matrix * rows[:, None])
    np.testing.assert_allclose(quantized * scales, wanted, atol=scales.max() / 2 + 1e-6)
    assert int(np.abs(quantized).max()) == 127
