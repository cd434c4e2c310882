"""Breaks the code in one place at a time and says which tests notice.

    python tests/mutants.py                 # what `make quick` catches, a minute each; of the GPU's
                                            # kernel, which needs Triton, what its own tests catch
    python tests/mutants.py --whole         # what the other tests catch of it, many minutes each
    python tests/mutants.py --only mask     # those whose name has the word

Every mutant is one replacement in a copy of the working tree; the tests run there, up to three
failures. It ends with a table, and with exit code 1 if a mutant survived. The last table is in
docs/testing.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
ENOUGH = 3  # failures
KERNEL = "dspark_batch/models/plugin/triton_kernel.py"
KERNEL_TESTS = ("tests/test_triton_kernel.py",)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One replacement; `old` occurs once in the file."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """Files whose tests are run, all of them, where the quick set has none for this place."""


MUTANTS = (
    Mutant(
        "acceptance off by one",
        "dspark_batch/models/plugin/onnx_body.py",
        "accepted_else = ArgMax <axis = 1, keepdims = 0> (fails_g_end)",
        "accepted_g0 = ArgMax <axis = 1, keepdims = 0> (fails_g_end)\n"
        "            accepted_g1 = Sub (accepted_g0, one)\n"
        "            accepted_else = Max (accepted_g1, zero)",
    ),
    Mutant(
        "mask off by one",
        "dspark_batch/models/decoder.py",
        'b.op("LessOrEqual", self._key_positions, queries)',
        'b.op("Less", self._key_positions, queries)',
    ),
    Mutant(
        "sliding window off by one",
        "dspark_batch/models/decoder.py",
        "b.constant(window - 1)",
        "b.constant(window)",
    ),
    Mutant(
        "wrong seed position",
        "dspark_batch/engine/network.py",
        "sampling.uniforms(self._seed[places], at, num=num)",
        "sampling.uniforms(self._seed[places], places, num=num)",
    ),
    Mutant(
        "the limit is one token late",
        "dspark_batch/decode/loop.py",
        "            if not row.num_remaining:\n",
        "            if row.num_remaining < 0:\n",
    ),
    Mutant(
        "the draft misses a token of context",
        "dspark_batch/engine/runtimes/ort.py",
        "row.pending.append(results[2][begin : begin + num_kept])",
        "row.pending.append(results[2][begin : begin + max(num_kept - 1, 1)])",
    ),
    Mutant(
        "a file is renamed before it is synced",
        "dspark_batch/engine/files.py",
        "        _sync(scratch)\n        scratch.replace(path)\n",
        "        scratch.replace(path)\n",
    ),
    Mutant(
        "a shard is skipped on resume",
        "dspark_batch/job/runner.py",
        "        return pending\n",
        "        return pending[1:] if parts else pending\n",
    ),
    Mutant(
        "pairs of weights may saturate",
        "dspark_batch/models/graph/linears.py",
        "np.abs(first + second) - PAIR_LIMIT, 0)",
        "np.abs(first + second) - 2 * PAIR_LIMIT, 0)",
    ),
    Mutant(
        "weights are mixed, activations are not",
        "dspark_batch/models/graph/linears.py",
        'value = b.op("Reshape", mixed, b.constant([0, size]))',
        'mixed = b.op("Reshape", mixed, b.constant([0, size]))',
    ),
    Mutant(
        "a tap of the layer before",
        "dspark_batch/models/decoder.py",
        "context = [streams[i] for i in taps]",
        "context = [streams[max(i - 1, -1)] for i in taps]",
    ),
    Mutant(
        "a sampled row gets the likeliest token",
        "dspark_batch/models/plugin/onnx_body.py",
        "chosen_then = Where (hot, drawn, greedy_token)",
        "chosen_then = Identity (greedy_token)",
    ),
    Mutant(
        "the draft is not taken off the residual",
        KERNEL,
        "return probs, tl.maximum(probs - proposed, 0.0)",
        "return probs, probs",
        KERNEL_TESTS,
    ),
    Mutant(
        "slices write over each other's share of a list",
        KERNEL,
        "before += tl.sum(tl.where(other < part, numbers, 0.0), 1, keep_dims=True)",
        "before += tl.sum(tl.where(other < 0, numbers, 0.0), 1, keep_dims=True)",
        KERNEL_TESTS,
    ),
    Mutant(
        "top-p takes its share of what top-k cut off too",
        KERNEL,
        "_last(weight, low, p * left - weight_above, True, ROWS)",
        "_last(weight, low, p * total - weight_above, True, ROWS)",
        KERNEL_TESTS,
    ),
    Mutant(
        "a cell that was not judged this time has the last call's verdict",
        KERNEL,
        "broken += tl.load(there + 1, mask=needed, other=0.0)",
        "broken += tl.load(there + 1)",
        KERNEL_TESTS,
    ),
    Mutant(
        "the bonus is looked for with the mass of its own slice below it",
        KERNEL,
        "tl.where(part == here, after - found, 0.0)",
        "tl.where(part == here, after, 0.0)",
        KERNEL_TESTS,
    ),
)


@click.command()
@click.option("--whole", is_flag=True, help="All tests, not the quick ones.")
@click.option("--only", default="", help="Mutants whose name has this.")
def main(whole: bool, only: str) -> None:
    """Run the mutants that were asked for."""
    survivors = 0
    for mutant in MUTANTS:
        if only in mutant.name:
            found = caught(mutant, [] if whole else [*mutant.tests] or ["--quick"])
            survivors += not found
            names = ", ".join(f"`{name}`" for name in found) or "none"
            click.echo(f"| {mutant.name} | {names} |")
    sys.exit(survivors > 0)


def caught(mutant: Mutant, arguments: list[str]) -> list[str]:
    """The first tests that fail of a copy of the tree with the mutant in it."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in files.splitlines():
            if (ROOT / file).is_file():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copy / file)
        path = copy / mutant.file
        path.write_text(mutated(mutant, path.read_text()))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--maxfail={ENOUGH}"]
        command += ["--numprocesses", "logical", "--dist", "loadfile", "-rfE", *arguments]
        command += ["--ignore", "tests/test_mutants.py"]  # it sees that the text has changed
        done = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    pattern = r"^(?:FAILED|ERROR) tests/(test_\w+)\.py(?:::(\w+))?"
    failed = re.findall(pattern, done.stdout, re.MULTILINE)
    return sorted({f"{module.removeprefix('test_')}: {test}" for module, test in failed})[:ENOUGH]


def mutated(mutant: Mutant, text: str) -> str:
    """The text with the replacement. Raises ValueError where `old` does not occur once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {mutant.old!r} not once")
    return text.replace(mutant.old, mutant.new)


if __name__ == "__main__":
    main()
