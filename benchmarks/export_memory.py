"""How much memory an export takes, by the size of the model, step by step.

For each size a random checkpoint in Qwen3-0.6B's shape is written (bfloat16, sharded, block by
block), with as many layers as make up the parameters: tensors stay the same, only their number
grows, so whatever grows is held. It is exported by `dspark-batch export` in a process of its own,
whose resident memory is sampled: what the process allocated ("own"), and file pages that are mapped
("files", which the kernel takes back when it needs them). Two sizes or more give the growth per
parameter of every step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from report import BenchmarkCommand, origin, table

from dspark_batch import __version__

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 16, 8, 128, 151_936
SHARD_BYTES = 2**29
_BLOCK = 2**22  # random values that are drawn once and written over and over
_SECONDS = 0.02  # between two samples


@dataclass
class Usage:
    """Most bytes that were resident at a time, and most that were the process's own."""

    total: int = 0
    own: int = 0

    def see(self, own: int, files: int) -> None:
        """Take in one sample."""
        self.total, self.own = max(self.total, own + files), max(self.own, own)


@dataclass
class Measured:
    """One export."""

    parameters: int
    layers: int
    source_bytes: int
    engine_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    """As the kernel counted it (`ru_maxrss`)."""
    steps: dict[str, Usage] = field(default_factory=dict)


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """One layer's tensors by their names after `model.layers.N.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(folder: Path, parameters: float, *, vocab_size: int = VOCAB) -> Measured:
    """About `parameters` random weights; no more of them than one block is ever in memory."""
    per_layer = sum(int(np.prod(shape)) for shape in layer_shapes().values())
    layers = max(1, round((parameters - vocab_size * HIDDEN) / per_layer))
    shapes = {"model.embed_tokens.weight": (vocab_size, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes().items()}
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    normal = np.random.default_rng(0).standard_normal(_BLOCK).astype(np.float32)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        length = 2 * int(np.prod(shape))
        if shards[-1] and size + length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += length
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, normal)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    return Measured(parameters=total, layers=layers, source_bytes=2 * total)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], normal: Any) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            matrix = len(shape) > 1
            block = normal * shape[-1] ** -0.5 if matrix else np.ones(_BLOCK, np.float32)
            values = block.astype(ml_dtypes.bfloat16).view(np.uint16)
            left = int(np.prod(shape))
            while left:
                file.write(values[:left].tobytes())
                left -= min(left, len(values))


def measure_export(measured: Measured, source: Path, folder: Path, *, precision: str) -> None:
    """Run the export of `source` and note its memory by step."""
    recipe = folder / "export" / "random.toml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(
        f'[target]\nweights = "{source}"\n[draft]\ndrafter = "none"\n'
        f'[engine]\nprecision = "{precision}"\nmax_rows = 1\nmax_tokens = 128\n'
    )
    output = folder / "engine"
    start = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from dspark_batch.cli.commands import main; main()"),
            *("export", str(recipe), "-o", str(output), "--progress", "plain"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    step, lines = ["starting"], []

    def follow() -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                lines.append(line)
                step[0] = line.strip()

    reader = threading.Thread(target=follow)
    reader.start()
    while True:
        done, status, resources = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        _sample(process.pid, measured.steps.setdefault(step[0], Usage()))
        time.sleep(_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    if process.returncode:
        raise click.ClickException("the export failed:\n" + "".join(lines))
    measured.seconds = time.monotonic() - start
    measured.peak_bytes = resources.ru_maxrss * 1024
    measured.engine_bytes = sum(path.stat().st_size for path in output.iterdir())


def _sample(pid: int, usage: Usage) -> None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    if kilobytes:
        usage.see(int(kilobytes["RssAnon"]) * 1024, int(kilobytes["RssFile"]) * 1024)


def rows_of(results: list[Measured]) -> list[list[str]]:
    """The table: a row per step; of each size its peak, then the growth per parameter."""
    rows = []
    for step in results[0].steps:
        usages = [result.steps.get(step, Usage()) for result in results]
        cells = [f"{u.total / 2**20:.0f} ({u.own / 2**20:.0f} own)" for u in usages]
        rows.append([step, *cells, *_growth(results, [(u.total, u.own) for u in usages])])
    peaks = [(result.peak_bytes, 0) for result in results]
    cells = [f"{peak / 2**20:.0f}" for peak, _ in peaks]
    return [*rows, ["whole export", *cells, *_growth(results, peaks)[:1], ""]]


def _growth(results: list[Measured], figures: list[tuple[int, int]]) -> list[str]:
    """Bytes for each parameter more, from the first size to the last: all, own."""
    more = results[-1].parameters - results[0].parameters
    if not more:
        return ["", ""]
    pairs = zip(figures[0], figures[-1], strict=True)
    return [f"{(last - first) / more:.2f}" for first, last in pairs]


@click.command(name="export_memory", cls=BenchmarkCommand)
@click.option(
    "--billions",
    "sizes",
    type=click.FloatRange(min=0.001),
    multiple=True,
    default=(0.25, 0.5, 1.0),
    show_default=True,
    help="Parameters; may be given several times.",
)
@click.option("--precision", type=click.Choice(["fp32", "int8"]), default="int8", show_default=True)
@click.option("--vocabulary", type=click.IntRange(min=64), default=VOCAB, show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="For checkpoints and engines, which are deleted; default: a temporary folder.",
)
@click.pass_context
def main(
    ctx: click.Context,
    sizes: tuple[float, ...],
    precision: str,
    vocabulary: int,
    folder: Path | None,
) -> None:
    """Export random models of growing size and print the memory that each step took.

    \b
    Example:
      python benchmarks/export_memory.py --billions 0.25 --billions 1
    """
    results = []
    for size in sorted(sizes):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = Path(scratch) / "source"
            measured = write_checkpoint(source, size * 1e9, vocab_size=vocabulary)
            measure_export(measured, source, Path(scratch), precision=precision)
            results.append(measured)
            shutil.rmtree(source)
    heads = [f"{r.parameters / 1e9:.2f} B, {r.layers} layers, MiB" for r in results]
    click.echo(table(["step", *heads, "bytes/parameter", "own"], rows_of(results), left=1))
    record = origin(ctx) | {
        "dspark_batch": __version__,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "precision": precision,
        "exports": [asdict(result) for result in results],
    }
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
