"""int8 on every processor: exact sums, the probe that chooses how, and channels that are mixed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import draft_config, export_pair, target_config, write_draft, write_target

from dspark_batch.engine.engine import open_engine
from dspark_batch.engine.manifest import read_manifest
from dspark_batch.engine.runtimes import int8, ort
from dspark_batch.export.probes import TargetProbe
from dspark_batch.models.graph.builder import FLOAT, INT64, GraphBuilder
from dspark_batch.models.graph.linears import Linears, hadamard, quantize_columns
from dspark_batch.models.graph.unsigned import product

SOURCE = Path(__file__).with_name("without_vnni.c")


@pytest.fixture
def unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose sums saturate."""
    monkeypatch.setattr(int8, "sums_exactly", lambda: False)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    target = write_target(folder / "target", target_config("llama"))
    draft = write_draft(folder / "draft", draft_config())
    return export_pair(folder, target, draft, precision="int8")


def product_node(a: str, b: str, y: str, zero_point: str) -> onnx.NodeProto:
    inputs = [a, b, "one", "one", zero_point]
    return helper.make_node("MatMulIntegerToFloat", inputs, [y], domain="com.microsoft")


def shared_and_branched(folder: Path, weights: np.ndarray) -> Path:
    """`x @ weights` twice and once more in a branch; the weight lies in a file of its own."""
    height, width = weights.shape
    (folder / "data").write_bytes(weights.tobytes())
    stored = TensorProto(name="w", data_type=TensorProto.INT8, dims=weights.shape)
    stored.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", "0"), ("length", str(weights.nbytes))):
        stored.external_data.add(key=key, value=value)
    out = [helper.make_tensor_value_info(n, FLOAT, ["T", width]) for n in ("z", "other")]
    then = helper.make_graph([product_node("x", "w", "z", "middle")], "then", [], [out[0]])
    other = helper.make_graph([product_node("x", "w", "other", "middle")], "else", [], [out[1]])
    nodes = [
        product_node("x", "w", "first", "middle"),
        product_node("x", "w", "second", "middle"),
        helper.make_node("If", ["flag"], ["third"], then_branch=then, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["T", height]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(n, FLOAT, None) for n in ("first", "second", "third")],
        [
            stored,
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array(128, np.uint8), "middle"),
        ],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "g.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    )
    return path


@pytest.mark.parametrize("worst", [True, False])
def test_rewritten_products_are_exact_wherever_a_weight_is_used(
    worst: bool, tmp_path: Path, unsigned: None
) -> None:
    rng = np.random.default_rng(0)
    shape = (96, 40)
    weights = np.full(shape, 127, np.int8) if worst else rng.integers(-128, 128, shape, np.int8)
    session = ort.open_session(shared_and_branched(tmp_path, weights), threads=1)
    for num_rows in (1, 2, 7, 33):
        x = np.full((num_rows, 96), 255, np.uint8)
        if not worst:
            x = rng.integers(0, 256, (num_rows, 96), np.uint8)
        wanted = (x.astype(np.int64) - 128) @ weights.astype(np.int64)
        for flag in (True, False):
            for found in session.run(None, {"x": x, "flag": np.array(flag)}):
                np.testing.assert_array_equal(found, wanted)


def test_the_probe_tells_whether_the_worst_product_is_exact() -> None:
    """Against a product that the probe does not have."""
    weights = np.full((64, 8), 127, np.int8)
    x = np.full((5, 64), 255, np.uint8)
    found = int8._session(product(weights)).run(None, {"x": x})[0]
    assert int8.sums_exactly() == bool((found == 127 * 127 * 64).all())
    exact = int8._session(product(weights, unsigned=True)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(exact, 127 * 127 * 64)


def logits(folder: Path) -> np.ndarray:
    manifest = read_manifest(folder)
    probe = TargetProbe(folder / "target.onnx", manifest.target.cache, capacity=64)
    rows = [np.random.default_rng(i).integers(1, 40, 20).tolist() for i in range(3)]
    return np.concatenate(probe.run(rows, [0] * 3, probe.empty(3))[0])


def test_an_engine_computes_the_same_with_the_remedy(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, where weights as they are stored are exact too."""
    if not int8.sums_exactly():
        pytest.skip("here there is no engine without the remedy that is right")
    found = []
    for exact in (True, False):
        monkeypatch.setattr(int8, "sums_exactly", lambda exact=exact: exact)
        found.append(logits(engine))
    np.testing.assert_array_equal(*found)


def test_int8_is_as_near_to_fp32_as_its_rounding_explains(tmp_path: Path) -> None:
    """Sums that saturate are far from it: this fails without the remedy where one is needed."""
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    fp32, rounded = (
        logits(export_pair(tmp_path / name, target, draft, precision=name))
        for name in ("fp32", "int8")
    )
    assert np.linalg.norm(rounded - fp32) / np.linalg.norm(fp32) < 0.05


def test_costs_are_kept_by_remedy(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(engine)
    keys = []
    for exact in (True, False):
        monkeypatch.setattr(int8, "sums_exactly", lambda exact=exact: exact)
        keys.append(ort.hardware_key(manifest))
        floats = manifest.model_copy(update={"precision": "fp32"})
        assert "unsigned" not in ort.hardware_key(floats)
    assert keys[1] == f"{keys[0]}, unsigned int8 weights"


def test_an_engine_from_elsewhere_is_measured_anew(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = not int8.sums_exactly()
    monkeypatch.setattr(int8, "sums_exactly", lambda: other)
    opened = open_engine(engine)
    assert opened.costs is None
    opened.close()


@pytest.fixture(scope="module")
def without_vnni(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which programs see a processor with AVX2 and nothing newer."""
    if not int8.sums_exactly():
        pytest.skip("this processor is one itself")
    compiler = shutil.which("gcc") or shutil.which("cc")
    info = Path("/proc/cpuinfo")
    if compiler is None or not info.exists() or "cpuid_fault" not in info.read_text():
        pytest.skip("needs a C compiler and a processor that can hide features")
    library = tmp_path_factory.mktemp("preload") / "without_vnni.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def test_without_vnni_sums_saturate_the_probe_sees_it_and_the_engine_is_right(
    engine: Path, without_vnni: dict[str, str]
) -> None:
    """On the kernels of such a processor, which this one has too."""
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from dspark_batch.models.graph.unsigned import product\n"
        "from dspark_batch.engine.runtimes import int8\n"
        "from test_int8 import logits\n"
        "weights = np.full((64, 8), 127, np.int8)\n"
        "x = np.full((5, 64), 255, np.uint8)\n"
        "found = int8._session(product(weights)).run(None, {'x': x})[0]\n"
        "print(int(found[0, 0]), int8.sums_exactly())\n"
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
    product, exact = done.stdout.split()
    assert int(product) < 127 * 127 * 64
    assert exact == "False"
    wanted = logits(engine)
    # fp32 sums of the attention have another order there; int8 rounds what differs to a step.
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.95


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
    assert errors[16] < 0.6 * errors[1]
    assert errors[16] < 0.1


def test_mixed_columns_are_those_of_the_mixed_matrix() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((32, 5)).astype(np.float32)
    rows = rng.uniform(0.5, 2, 32).astype(np.float32)
    quantized, scales = quantize_columns(matrix, rows, 16)
    whole = np.kron(np.eye(2), hadamard(16))  # block by block
    wanted = whole @ (matrix * rows[:, None])
    np.testing.assert_allclose(quantized * scales, wanted, atol=scales.max() / 2 + 1e-6)
    assert int(np.abs(quantized).max()) == 127


def test_the_probe_is_the_product_that_graphs_have() -> None:
    """To write it again: `int8._PROBE.write_bytes(product(int8.probe_weights()))`."""
    assert int8._PROBE.read_bytes() == product(int8.probe_weights())


def test_a_run_needs_no_onnx_where_sums_are_exact(engine: Path) -> None:
    """It is imported to rewrite graphs, and takes longer than the rest of the start."""
    code = (
        "import sys; from pathlib import Path\n"
        "from dspark_batch.engine import open_engine\n"
        "from dspark_batch.engine.runtimes import int8\n"
        "open_engine(Path(sys.argv[1])).close()\n"
        "print(int8.sums_exactly(), 'onnx' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout in ("True False\n", "False True\n")
