"""How long does the verification kernel take on this GPU, and how long must it?

Times the seven launches of one call, replayed as a CUDA graph. The floor is what the call must read
once, at the speed at which this GPU copies. Without a GPU the kernel is interpreted: that says
nothing about speed, and is for trying this script at tiny sizes.

Needs torch and triton.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import click
import torch
from report import BenchmarkCommand, origin, table

from dspark_batch.models.plugin import launch
from dspark_batch.models.plugin.contract import OUTPUT_NAMES

SETTINGS = {
    "greedy": (0.0, 0, 1.0),
    "temperature": (1.0, 0, 1.0),
    "top-k, top-p": (1.0, 50, 0.9),
    "top-p": (1.0, 0, 0.9),
}
"""Temperature, top-k and top-p of every row."""
SPREAD = 3.0  # standard deviation of the logits, about that of a language model


def make_operands(
    device: torch.device, rows: int, vocab: int, drafts: int, setting: str
) -> dict[str, Any]:
    """Operands of a call by name: random logits, and a draft that is right more often than not."""
    torch.manual_seed(0)
    temperature, top_k, top_p = SETTINGS[setting]
    cells = rows * (drafts + 1)
    logits = torch.randn(cells, vocab, device=device) * SPREAD
    draft_logits = logits.view(rows, drafts + 1, vocab)[:, :drafts].contiguous()
    draft_logits += torch.randn_like(draft_logits) * 0.3

    def per_row(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return {
        "logits": logits,
        "logit_rows": torch.arange(cells, device=device).view(rows, drafts + 1),
        "draft_tokens": draft_logits.argmax(-1),
        "lengths": per_row(drafts, torch.int64),
        "certain": per_row(0, torch.int64),
        "draft_logits": draft_logits,
        "draft_vocab": torch.arange(vocab, device=device),
        "temperature": per_row(temperature, torch.float32),
        "top_k": per_row(top_k, torch.int64),
        "top_p": per_row(top_p, torch.float32),
        "uniforms": torch.rand(rows, drafts + 1, device=device),
        "num_logits": cells,
        "vocab_size": vocab,
        "draft_vocab_size": vocab,
        "num_drafts": drafts,
        "block_size": drafts,
        **{name: per_row(-7, torch.int64) for name in OUTPUT_NAMES},
    }


def make_call(device: torch.device, operands: dict[str, Any]) -> Callable[[], None]:
    """What runs a call once, compiled as `launch` compiles it."""
    import triton

    from dspark_batch.models.plugin.triton_kernel import dspark_verify

    rows = len(operands["lengths"])
    sizes = tuple(operands[name] for name in ("num_drafts", "vocab_size", "draft_vocab_size"))
    num_bytes = launch.workspace_bytes(rows, *sizes)
    operands["workspace"] = torch.empty(num_bytes // 4, device=device)
    values = [operands[name] for name in launch.PARAMETERS]
    options: dict[str, Any] = {}
    kernel = dspark_verify
    if device.type == "cuda":
        # An engine's kernels know nothing of what addresses and sizes are multiples of.
        kernel = triton.jit(dspark_verify.fn, do_not_specialize=list(launch.PARAMETERS))
        options = {"num_warps": launch.NUM_WARPS, "enable_fp_fusion": False}

    def call() -> None:
        for i, stage in enumerate(launch.STAGES):
            constants = dict(
                zip(launch.CONSTANTS, (i, 1, launch.SLICE, launch.CAPACITY), strict=True)
            )
            kernel[launch.grid(stage, rows, *sizes)](*values, **constants, **options)

    return call


def milliseconds(device: torch.device, call: Callable[[], Any], repeat: int) -> float:
    """The median of `repeat` runs, after one that is not counted."""
    call()
    times = []
    if device.type != "cuda":
        for _ in range(repeat):
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
        return median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def bytes_per_second(device: torch.device) -> float:
    """Bytes that a copy reads and writes, by the second."""
    size = 2**30 if device.type == "cuda" else 2**22
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(device, lambda: target.copy_(source), 10) * 1000


def floor(operands: dict[str, Any], speed: float) -> float:
    """Milliseconds to read once the logits that a call decides on."""
    read = operands["logits"].nbytes
    if operands["temperature"].any():
        read += operands["draft_logits"].nbytes
    return 1000 * read / speed


@click.command("verification", cls=BenchmarkCommand)
@click.option("--rows", multiple=True, type=int, default=(1, 16, 64, 256), show_default=True)
@click.option("--vocab", multiple=True, type=int, default=(49_152, 151_936), show_default=True)
@click.option("--drafts", type=int, default=7, show_default=True, help="Drafts of a row.")
@click.option("--repeat", type=int, default=20, show_default=True, help="Runs of each.")
@click.pass_context
def main(
    ctx: click.Context, rows: tuple[int, ...], vocab: tuple[int, ...], drafts: int, repeat: int
) -> None:
    """Time the verification kernel, and compare that with the least that memory allows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    speed = bytes_per_second(device)
    results = []
    for size in vocab:
        for setting in SETTINGS:
            for number in rows:
                operands = make_operands(device, number, size, drafts, setting)
                least = floor(operands, speed)
                spent = milliseconds(device, make_call(device, operands), repeat)
                accepted = operands["num_accepted"].float().mean().item()
                results.append(
                    {
                        "vocab": size,
                        "setting": setting,
                        "rows": number,
                        "ms": spent,
                        "floor_ms": least,
                        "accepted": accepted,
                    }
                )
    lines = [
        [
            r["setting"],
            f"{r['vocab']:,}",
            f"{r['rows']}",
            f"{r['ms']:.3f}",
            f"{r['floor_ms']:.3f}",
            f"{r['ms'] / r['floor_ms']:.1f}",
            f"{r['accepted']:.1f}",
        ]
        for r in results
    ]
    heads = ["setting", "vocabulary", "rows", "ms", "floor, ms", "ratio", "accepted"]
    click.echo(table(heads, lines, left=1))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    versions = {module: __import__(module).__version__ for module in ("torch", "triton")}
    record = {"device": name, "copy_gb_per_s": speed / 1e9, "versions": versions}
    click.echo(json.dumps(origin(ctx) | record | {"drafts": drafts, "results": results}))


if __name__ == "__main__":
    main()
