"""The proof that speculation changes no greedy token: plain, fixed and scheduled, row by row.

Where two ways differ, both tokens must be as good as the best one: the gap is how far the worse
of the two lies below the largest logit of an independent full forward over the common prefix. It
is the gap between the top two wherever these are the two tokens. A gap of `--max-gap` or more is
an error of ours; a smaller one is a floating-point tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from oracle import Oracle
from report import BenchmarkCommand, provenance, table

from dspark_batch.bench import MODES, decode_all, read_workload
from dspark_batch.decode import Prompt
from dspark_batch.engine import Engine, ensure_costs, open_engine
from dspark_batch.errors import UsageError
from dspark_batch.export import TargetProbe

LastLogits = Callable[[Sequence[int]], NDArray[np.float32]]
"""Tokens of a row -> logits [V] of the token that follows them."""

_PLAIN = MODES[0]
_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that two ways of decoding end differently."""

    row: int
    """Its place in the input."""
    position: int
    """First new token that differs."""
    tokens: tuple[int | None, int | None]
    """The two tokens there: expected, found. None where the row had ended."""
    gap: float
    """How far the worse one lies below the largest logit; infinite where a row had ended."""


def compare(
    prompts: Sequence[Prompt],
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    *,
    last_logits: LastLogits,
) -> list[Difference]:
    """The rows whose new tokens differ; `last_logits` is asked at the first difference only."""
    differences = []
    for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
        pairs = enumerate(zip_longest(ours, theirs))
        position, pair = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (-1, None))
        if pair is None:
            continue
        gap = float("inf")
        if None not in pair:
            logits = last_logits([*prompt.token_ids, *ours[:position]])
            gap = float(logits.max() - logits[list(pair)].min())
        differences.append(Difference(prompt.row, position, pair, gap))
    return differences


@click.command(name="identity", cls=BenchmarkCommand)
@click.option(
    "--engine",
    "engine_folder",
    type=click.Path(path_type=Path),
    default=Path("engines/model"),
    show_default=True,
    help="Engine folder that `export` built.",
)
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
@click.option("--max-gap", type=click.FloatRange(min=0), default=1e-3, show_default=True)
@click.option(
    "--transformers",
    "reference",
    type=(str, click.IntRange(min=1)),
    metavar="FOLDER_OR_GGUF N",
    help="Compare N rows, evenly over the file, with transformers; needs an fp32 engine.",
)
@click.pass_context
def main(
    ctx: click.Context,
    engine_folder: Path,
    prompts_path: Path,
    rows: int,
    new_tokens: int,
    limit: int | None,
    max_gap: float,
    reference: tuple[str, int] | None,
) -> None:
    """Check that greedy rows come out the same in every mode; exit code 1 if one does not.

    \b
    Example:
      python benchmarks/identity.py --rows 16 --limit 48
    """
    with closing(open_engine(engine_folder, max_rows=rows)) as engine:
        if not engine.block_size:
            raise UsageError(f"{engine_folder} has no draft: there is nothing to compare")
        if reference and engine.manifest.precision != "fp32":
            raise UsageError(
                f"{engine_folder} is {engine.manifest.precision}: its target is not the one that "
                'transformers runs; export with precision = "fp32" to compare them'
            )
        record = provenance(ctx, engine)
        ensure_costs(engine, progress=lambda text: click.echo(text, err=True))
        workload = read_workload(prompts_path, engine, new_tokens=new_tokens, limit=limit)
        prompts = workload.prompts
        decoded = _decode_modes(engine, prompts)
        plain = decoded[_PLAIN][0]
        last_logits = _target_logits(engine, prompts, new_tokens=new_tokens)
        comparisons = {
            f"{mode} = {_PLAIN}": _summary(
                compare(prompts, plain, tokens, last_logits=last_logits), len(prompts), max_gap
            )
            | speculation
            for mode, (tokens, speculation) in decoded.items()
            if mode != _PLAIN
        }
        if reference:
            source, num_rows = reference
            chosen = _evenly(len(prompts), num_rows)
            comparisons[f"{_PLAIN} = transformers"] = _summary(
                _with_transformers(
                    source,
                    [prompts[i] for i in chosen],
                    [plain[i] for i in chosen],
                    new_tokens=new_tokens,
                    stop_token_ids=sorted(engine.stop_token_ids),
                ),
                len(chosen),
                max_gap,
            )
    num_failed = sum(found["num_failed"] for found in comparisons.values())
    record |= {
        "prompts": str(prompts_path),
        "num_rejected": workload.num_rejected,
        "rows": rows,
        "new_tokens": new_tokens,
        "num_new_tokens": sum(map(len, plain)),
        "max_gap": max_gap,
        "transformers": reference[0] if reference else None,
        "comparisons": comparisons,
        "num_failed": num_failed,
    }
    click.echo(_heading(record))
    click.echo(_tables(comparisons))
    click.echo("failed" if num_failed else "passed: every difference is a floating-point tie")
    click.echo(json.dumps(record))
    ctx.exit(1 if num_failed else 0)


def _decode_modes(
    engine: Engine, prompts: Sequence[Prompt]
) -> dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]]:
    """New tokens of each prompt and the speculation that took place, by mode.

    Rows of like length run together, as in `run`.
    """
    found = {}
    for mode in MODES:
        click.echo(f"decoding {len(prompts)} rows, spec {mode}", err=True)
        order = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
        run = decode_all(engine, order, mode)
        tokens = {completion.row: completion.token_ids for completion in run.completions}
        spec = run.stats.spec
        speculation = {
            "accepted_length": spec.accepted_length,
            "num_verified_tokens": spec.num_verified_tokens,
            "num_accepted_tokens": spec.num_accepted_tokens,
        }
        found[mode] = ([tokens[prompt.row] for prompt in prompts], speculation)
    return found


def _target_logits(engine: Engine, prompts: Sequence[Prompt], *, new_tokens: int) -> LastLogits:
    """The exported target in one full forward of a row alone; opened when first asked."""
    longest = max(len(prompt.token_ids) for prompt in prompts) + new_tokens

    @cache
    def probe() -> TargetProbe:
        path = engine.folder / "target.onnx"
        return TargetProbe(path, engine.manifest.target.cache, capacity=longest)

    def last_logits(token_ids: Sequence[int]) -> NDArray[np.float32]:
        logits, _, _ = probe().run([token_ids], [0], probe().empty(1))
        return np.asarray(logits[0][-1])

    return last_logits


def _with_transformers(
    source: str,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop_token_ids: Sequence[int],
) -> list[Difference]:
    """Our plain rows against greedy generation; gaps are of transformers' own logits."""
    oracle = Oracle.open(source)
    expected = []
    for number, prompt in enumerate(prompts, start=1):
        click.echo(f"transformers: row {number} of {len(prompts)}", err=True)
        expected.append(
            oracle.greedy(prompt.token_ids, new_tokens=new_tokens, stop_token_ids=stop_token_ids)
        )
    return compare(
        prompts, expected, plain, last_logits=lambda token_ids: oracle.logits(token_ids)[-1]
    )


def _evenly(size: int, number: int) -> list[int]:
    """`number` indices below `size`, evenly spread; all where there are no more."""
    number = min(number, size)
    return [i * size // number for i in range(number)]


def _summary(differences: Sequence[Difference], num_rows: int, max_gap: float) -> dict[str, Any]:
    return {
        "num_rows": num_rows,
        "num_differing": len(differences),
        "num_failed": sum(not difference.gap < max_gap for difference in differences),
        "max_gap": max((difference.gap for difference in differences), default=0.0),
        "differences": [asdict(difference) for difference in differences],
    }


def _heading(record: Mapping[str, Any]) -> str:
    engine = record["engine"]
    return (
        f"{engine['folder']} ({engine['target']}, {engine['precision']}, block of "
        f"{engine['block_size']}), {record['rows']} concurrent rows\n"
        f"{record['prompts']}, {record['num_rejected']} rejected; greedy, "
        f"{record['num_new_tokens']} new tokens, {record['new_tokens']} a row at most\n"
    )


def _tables(comparisons: Mapping[str, Any]) -> str:
    """One line for each comparison, and the first differing rows."""
    headers = ["compared", "rows", "identical", "different", "largest gap", "failed", "τ"]
    lines, differing = [], []
    for name, found in comparisons.items():
        tau = found.get("accepted_length")
        num_identical = found["num_rows"] - found["num_differing"]
        counts = (found["num_rows"], num_identical, found["num_differing"])
        lines.append(
            [
                name,
                *map(str, counts),
                f"{found['max_gap']:.2g}",
                str(found["num_failed"]),
                "" if tau is None else f"{tau:.2f}",
            ]
        )
        for difference in found["differences"][:_MAX_SHOWN]:
            expected, other = difference["tokens"]
            where = [str(difference["row"]), str(difference["position"])]
            differing.append([name, *where, str(expected), str(other), f"{difference['gap']:.3g}"])
    parts = [table(headers, lines), ""]
    if differing:
        parts += [table(["compared", "row", "position", "expected", "found", "gap"], differing), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
