"""What a precision costs and gives: agreement with fp32, invariance and speed of two engines.

The first engine (fp32) writes greedy text. Both targets then read prompt and text in one pass,
and their next-token distributions over the text are compared: share of equal argmaxes, mean KL
divergence, largest difference of a logit. Speed is plain decoding of the same prompts, one engine
after the other; rows whose text comes out otherwise are counted, and the gap of such a row is how
far below its best token fp32 sees the token that the other engine took. The first of those texts
are printed from where they part.

ONNX Runtime runs the graphs of both. Of a TensorRT engine these are what its plans were built from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from identity import Difference, compare
from numpy.typing import NDArray
from report import BenchmarkCommand, provenance, table

from dspark_batch.bench import Workload, decode_all, read_workload
from dspark_batch.engine import Engine, Tokenizer, read_manifest
from dspark_batch.engine.runtimes import ort
from dspark_batch.errors import UsageError
from dspark_batch.export import TargetProbe, divergence

_SHOWN = 5  # texts


@click.command(name="precision", cls=BenchmarkCommand)
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    default=Path("jobs/prompts.parquet"),
    show_default=True,
    help="Parquet file as for `run`.",
)
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many rows of the file.")
@click.pass_context
def main(
    ctx: click.Context,
    reference: Path,
    candidate: Path,
    prompts_path: Path,
    rows: int,
    new_tokens: int,
    limit: int | None,
) -> None:
    """Compare the engine CANDIDATE with REFERENCE, an fp32 engine of the same target.

    \b
    Example:
      python benchmarks/precision.py engines/model-fp32 engines/model --limit 32
    """
    texts: list[list[int]] = []
    expected: list[NDArray[np.float32]] = []
    lines: list[dict[str, Any]] = []
    for folder in (reference, candidate):
        with closing(_open(folder, rows)) as engine:
            record = provenance(ctx, engine)
            workload = read_workload(prompts_path, engine, new_tokens=new_tokens, limit=limit)
            decoded = decode_all(engine, workload.prompts, "off")
            found_texts = [list(c.token_ids) for c in decoded.completions]
            texts = texts or found_texts
            tokenizer = engine.tokenizer
            logits = _logits(engine, workload, texts)
        if not expected:
            expected = logits
        if expected[0].shape != logits[0].shape:
            raise UsageError(f"{reference} and {candidate} are not engines of one target")
        wanted, found = np.concatenate(expected), np.concatenate(logits)
        differing = _differing(workload, texts, found_texts, expected)
        lines.append(
            {
                "engine": str(folder),
                "precision": engine.manifest.precision,
                "agreement": float((wanted.argmax(-1) == found.argmax(-1)).mean()),
                "kl": divergence(wanted, found),
                "largest_difference": float(np.abs(wanted - found).max()),
                "num_rows": len(texts),
                "num_differing": len(differing),
                "gaps": sorted(d.gap for d in differing),
                "invariance": engine.manifest.parity["invariance"],
                "tokens_per_second": decoded.tokens_per_second,
                "num_tokens": len(wanted),
            }
        )
    click.echo(
        table(
            [
                *("precision", "agreement", "KL, nats", "largest difference", "invariance"),
                *("other text", "largest gap", "plain tokens/s", "ratio"),
            ],
            [
                [
                    line["precision"],
                    f"{line['agreement']:.4f}",
                    f"{line['kl']:.5f}",
                    f"{line['largest_difference']:.3f}",
                    f"{line['invariance']:.1e}",
                    f"{line['num_differing']} of {line['num_rows']}",
                    f"{max(line['gaps'], default=0.0):.3f}",
                    f"{line['tokens_per_second']:.0f}",
                    f"{line['tokens_per_second'] / lines[0]['tokens_per_second']:.2f}",
                ]
                for line in lines
            ],
        )
    )
    places = {prompt.row: i for i, prompt in enumerate(workload.prompts)}
    for difference in differing[:_SHOWN]:
        both = [all_texts[places[difference.row]] for all_texts in (texts, found_texts)]
        click.echo(_parting(difference, both, tokenizer))
    click.echo(json.dumps(record | {"engines": lines}))


def _parting(difference: Difference, both: Sequence[list[int]], tokenizer: Tokenizer | None) -> str:
    """The two texts of a row, from a few tokens before they part."""
    begin, end = max(difference.position - 4, 0), difference.position + 12
    parts = [ids[begin:end] for ids in both]
    shown = [repr(tokenizer.decode(ids) if tokenizer else ids) for ids in parts]
    return (
        f"row {difference.row}, token {difference.position}, gap {difference.gap:.3f}:\n"
        f"  reference {shown[0]}\n  candidate {shown[1]}"
    )


def _open(folder: Path, rows: int) -> Engine:
    manifest = read_manifest(folder)
    return Engine(
        manifest,
        ort.open_pair(folder, manifest, rows),
        folder=folder,
        max_rows=rows,
        hardware_key=ort.hardware_key(manifest),
    )


def _differing(
    workload: Workload,
    texts: list[list[int]],
    found: list[list[int]],
    logits: list[NDArray[np.float32]],
) -> list[Difference]:
    """Rows of another text; `logits` [n, V] of a row predict each token of `texts`."""
    differing = []
    for prompt, ours, theirs, row in zip(workload.prompts, texts, found, logits, strict=True):
        num_before = len(prompt.token_ids)

        def at(tokens: Sequence[int], row: Any = row, skipped: int = num_before) -> Any:
            return row[len(tokens) - skipped]

        differing += compare([prompt], [ours], [theirs], last_logits=at)
    return differing


def _logits(
    engine: Engine, workload: Workload, texts: list[list[int]]
) -> list[NDArray[np.float32]]:
    """Logits [n, V] that predict each token of each text."""
    longest = max(len(p.token_ids) + len(t) for p, t in zip(workload.prompts, texts, strict=True))
    probe = TargetProbe(
        engine.folder / "target.onnx", engine.manifest.target.cache, capacity=longest
    )
    found = []
    for prompt, text in zip(workload.prompts, texts, strict=True):
        row = [*prompt.token_ids, *text]
        logits = probe.run([row], [0], probe.empty(1))[0][0]
        found.append(logits[len(prompt.token_ids) - 1 : -1])
    return found


if __name__ == "__main__":
    main()
