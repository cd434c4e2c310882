"""New tokens per second on this machine: plain decoding, fixed speculation and the scheduler.

The three modes decode the same prompts, one after the other and over again, each time in another
order, so that a machine that slows down slows all of them; a ratio is the median over those turns,
each against its own plain run. Ratios between figures of one run hold;
figures of two runs are not comparable. Plain decoding has the engine opened without its draft, as
`run --spec off` has it. Rows get half to all of the new tokens, so that they do not end together:
real ones do not, and a batch that empties all at once flatters whoever takes equal steps.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from dspark_batch import __version__
from dspark_batch.bench.tables import table
from dspark_batch.bench.workload import MODES, Decoded, Workload, decode_all, read_workload
from dspark_batch.decode import SamplingParams
from dspark_batch.decode.algorithm import CostTable, metrics
from dspark_batch.engine import Engine, ensure_costs, installed_versions, measure_costs, open_engine
from dspark_batch.errors import UsageError

ROWS = (1, 4, 16, 32)
PER_ROW = 4
_MIN_PROMPTS = 16
_WARM_UP_TOKENS = 12
_GOLDEN = 0.5 * (5**0.5 - 1.0)  # its multiples are spread evenly between whole numbers
_PHASES = ("draft", "verify", "prefill")
_PACKAGES = ("numpy", "onnx", "onnxruntime", "tokenizers", "torch", "transformers")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """The outcome: `record` has everything, in words that JSON knows."""

    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return self.record

    def lines(self) -> list[str]:
        """Lines of text for a terminal."""
        return [_heading(self.record), "", _mode_table(self.record), *_closing(self.record)]


def run_bench(
    engine_folder: Path,
    prompts_path: Path,
    *,
    rows: Sequence[int] = (),
    new_tokens: int,
    limit: int | None,
    repeat: int,
    fresh_costs: bool,
    progress: Progress,
    per_row: int = PER_ROW,
) -> Bench:
    """Measure every mode at every concurrency of `rows`, `repeat` times.

    `limit` prompts are used, evenly over the file, and `per_row` of them for each concurrent row.
    With `fresh_costs` the cost table is measured anew; the engine keeps its own.

    Raises:
        UsageError: the engine has no draft.
        InputError: the file has no row that the engine can decode.
    """
    concurrencies = sorted(set(rows or ROWS))
    with closing(open_engine(engine_folder, max_rows=concurrencies[-1])) as engine:
        if not engine.block_size:
            raise UsageError(f"{engine_folder} has no draft, so there is nothing to compare")
        record = about(engine)
        workload = read_workload(prompts_path, engine, new_tokens=new_tokens, limit=limit)
        costs = _costs(engine, fresh=fresh_costs, progress=progress)
    record |= {
        "prompts": str(prompts_path),
        "num_file_prompts": len(workload.prompts),
        "num_rejected": workload.num_rejected,
        "new_tokens": new_tokens,
        "repeat": repeat,
        "costs": costs.to_json() | {"measured": "for this run" if fresh_costs else "for `run`"},
        "concurrencies": [],
    }
    for num_rows in concurrencies:
        part = _staggered(
            workload.resized(_num_prompts(num_rows, per_row=per_row, limit=limit)), new_tokens
        )
        with (
            closing(open_engine(engine_folder, max_rows=num_rows)) as engine,
            closing(open_engine(engine_folder, max_rows=num_rows, with_draft=False)) as plain,
        ):
            engine.costs = costs
            engines = {mode: plain if mode == "off" else engine for mode in MODES}
            found = _measure(engines, part, repeat=repeat, progress=progress)
        record["concurrencies"].append(
            {
                "rows": num_rows,
                "num_prompts": len(part.prompts),
                "num_prompt_tokens": sum(len(prompt.token_ids) for prompt in part.prompts),
                "modes": found,
            }
        )
    record["least_ratio"] = _least_ratio(record["concurrencies"])
    record["load_average_at_end"] = os.getloadavg()[0]
    return Bench(record)


def about(engine: Engine) -> dict[str, Any]:
    """What figures of an engine depend on, whoever measures them.

    `load_average` is that of the last minute: above the number of cores, timings mean little.
    """
    manifest, draft = engine.manifest, engine.manifest.draft
    versions = {"python": platform.python_version(), "dspark-batch": __version__}
    versions |= installed_versions(_PACKAGES)
    return {
        "versions": versions,
        "hardware": engine.hardware_key,
        "platform": platform.platform(),
        "load_average": os.getloadavg()[0],
        "engine": {
            "folder": str(engine.folder),
            "name": engine.name,
            "runtime": manifest.runtime,
            "precision": manifest.precision,
            "target": manifest.target.source,
            "draft": draft.source if draft else None,
            "draft_files": draft.files if draft else None,
            "block_size": engine.block_size,
            "created": manifest.created,
            "fingerprint": engine.fingerprint,
        },
    }


def _num_prompts(num_rows: int, *, per_row: int, limit: int | None) -> int:
    """Enough for `per_row` generations of rows; few at low concurrency, which is slow."""
    wanted = max(_MIN_PROMPTS, per_row * num_rows)
    return min(wanted, limit) if limit else wanted


def _staggered(workload: Workload, new_tokens: int) -> Workload:
    """Each row with its share of the new tokens, half of them to all."""
    shares = (0.5 + 0.5 * (row * _GOLDEN % 1.0) for row in range(1, len(workload.prompts) + 1))
    prompts = [
        replace(prompt, params=replace(prompt.params, max_new_tokens=math.ceil(new_tokens * share)))
        for prompt, share in zip(workload.prompts, shares, strict=True)
    ]
    return replace(workload, prompts=tuple(prompts))


def _least_ratio(concurrencies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`auto` against plain decoding where it does worst, by medians."""
    ratios = {
        part["rows"]: part["modes"]["auto"]["ratio_to_plain"]["median"] for part in concurrencies
    }
    rows = min(ratios, key=ratios.__getitem__)
    return {"rows": rows, "ratio": ratios[rows]}


def _costs(engine: Engine, *, fresh: bool, progress: Progress) -> CostTable:
    if fresh:
        progress("measuring the cost table")
        return measure_costs(engine)
    ensure_costs(engine, progress=progress)
    assert engine.costs is not None
    return engine.costs


def _measure(
    engines: Mapping[str, Engine], workload: Workload, *, repeat: int, progress: Progress
) -> dict[str, Any]:
    """Every mode `repeat` times; the text of the first plain run is what all must give."""
    short = SamplingParams(max_new_tokens=_WARM_UP_TOKENS)
    num_rows = engines["off"].max_rows
    warm_up = [replace(prompt, params=short) for prompt in workload.prompts[-num_rows:]]
    for mode in MODES:
        decode_all(engines[mode], warm_up, mode)
    runs: dict[str, list[Decoded]] = {mode: [] for mode in MODES}
    for turn in range(repeat):
        progress(f"decoding with {num_rows} rows, turn {turn + 1} of {repeat}")
        shift = turn % len(MODES)
        for mode in MODES[shift:] + MODES[:shift]:
            runs[mode].append(decode_all(engines[mode], workload.prompts, mode))
    plain = runs["off"]
    return {mode: _figures(runs[mode], plain, workload) for mode in MODES}


def _figures(
    runs: Sequence[Decoded], plain: Sequence[Decoded], workload: Workload
) -> dict[str, Any]:
    """What one mode came to. Speculation is the same in every repeat: the last one is counted."""
    speeds = [run.tokens_per_second for run in runs]
    plain_speeds = [run.tokens_per_second for run in plain]
    seconds = sum(run.seconds for run in runs)
    shares = {
        phase: sum(getattr(run.stats, f"{phase}_seconds") for run in runs) / seconds
        for phase in _PHASES
    }
    stats, spec = runs[-1].stats, runs[-1].stats.spec
    return {
        "seconds": [run.seconds for run in runs],
        "num_new_tokens": stats.num_new_tokens,
        "tokens_per_second": {"median": median(speeds), "best": max(speeds), "all": speeds},
        "ratio_to_plain": {
            # Of neighbours in time, so that a clock that drifts over the turns is in both.
            "median": median(a / b for a, b in zip(speeds, plain_speeds, strict=True)),
            "best": max(speeds) / max(plain_speeds),
        },
        "time_shares": shares | {"host": 1.0 - sum(shares.values())},
        "accepted_length": spec.accepted_length,
        "acceptance_rate": spec.acceptance_rate,
        "acceptance_by_position": metrics.acceptance_by_position(spec.accepted_histogram).tolist(),
        "accepted_length_by_source": _by_source(runs[-1], workload),
        "num_row_rounds": spec.num_rounds,
        "num_verified_tokens": spec.num_verified_tokens,
        "num_rounds": stats.num_rounds,
        "num_drafted_rounds": stats.num_drafted_rounds,
        "num_differing_rows": _num_differing(runs, plain[0]),
    }


def _by_source(run: Decoded, workload: Workload) -> dict[str, float]:
    """τ of the rows of each source; empty without the column."""
    found = {}
    for source in sorted({source for source in workload.sources if source is not None}):
        rows = zip(run.completions, workload.sources, strict=True)
        found[source] = metrics.add(c.spec for c, name in rows if name == source).accepted_length
    return found


def _num_differing(runs: Sequence[Decoded], plain: Decoded) -> int:
    """Rows whose tokens or text were not those of `plain` in at least one of the runs."""
    return sum(
        any(
            (run.completions[i].token_ids, run.completions[i].text)
            != (expected.token_ids, expected.text)
            for run in runs
        )
        for i, expected in enumerate(plain.completions)
    )


def _heading(record: Mapping[str, Any]) -> str:
    engine = record["engine"]
    return (
        f"{engine['folder']} ({engine['target']}, {engine['precision']}, block of "
        f"{engine['block_size']})\n{record['hardware']}; load {record['load_average']:.2f}\n"
        f"{record['num_file_prompts']} prompts of {record['prompts']}, "
        f"{record['num_rejected']} rejected; greedy, {record['new_tokens'] // 2} to "
        f"{record['new_tokens']} new tokens; "
        f"{record['repeat']} turns of one run of each mode, medians and bests"
    )


def _mode_table(record: Mapping[str, Any]) -> str:
    headers = ["rows", "prompts", "spec", "tokens/s", "best", "× plain", "best", "τ"]
    headers += ["draft", "verify", "prefill", "host", "drafted rounds", "differing rows"]
    lines = []
    for part in record["concurrencies"]:
        for mode, values in part["modes"].items():
            speed, ratio = values["tokens_per_second"], values["ratio_to_plain"]
            lines.append(
                [str(part["rows"]), str(part["num_prompts"]), mode]
                + [f"{speed[key]:.1f}" for key in ("median", "best")]
                + [f"{ratio[key]:.2f}" for key in ("median", "best")]
                + [f"{values['accepted_length']:.2f}"]
                + [f"{values['time_shares'][phase]:.0%}" for phase in (*_PHASES, "host")]
                + [f"{values['num_drafted_rounds'] / max(values['num_rounds'], 1):.0%}"]
                + [str(values["num_differing_rows"])]
            )
    return table(headers, lines)


def _closing(record: Mapping[str, Any]) -> list[str]:
    """The least ratio; τ by source, of the most rows; costs; whether the texts agree."""
    least = record["least_ratio"]
    lines = [
        f"\n`auto` against plain decoding: {least['ratio']:.3f} at the least, "
        f"with {least['rows']} rows"
    ]
    last = record["concurrencies"][-1]
    by_source = {mode: last["modes"][mode]["accepted_length_by_source"] for mode in MODES[1:]}
    if by_source["on"]:
        rows = [
            [name, *(f"{by_source[mode][name]:.2f}" for mode in by_source)]
            for name in by_source["on"]
        ]
        lines += [f"\nτ by source; concurrent rows: {last['rows']}\n"]
        lines += [table(["source", *by_source], rows, left=1)]
    lines += ["\nMeasured costs, ms: a draft pass, and a verification by tokens per row\n"]
    lines += [_cost_table(CostTable.from_json(record["costs"]))]
    num_compared = sum(part["num_prompts"] for part in record["concurrencies"])
    num_differing = {
        mode: sum(part["modes"][mode]["num_differing_rows"] for part in record["concurrencies"])
        for mode in MODES
    }
    counts = ", ".join(f"{mode} {count}" for mode, count in num_differing.items())
    verdict = "differ" if any(num_differing.values()) else "are identical"
    return [*lines, f"\nGreedy texts {verdict}: {num_compared} rows; differ from plain: {counts}"]


def _cost_table(costs: CostTable) -> str:
    return table(
        ["rows", "draft", *(str(n) for n in costs.tokens_per_row)],
        [
            [str(num_rows), *(f"{seconds * 1e3:.1f}" for seconds in (draft, *verify))]
            for num_rows, draft, verify in zip(
                costs.rows, costs.draft_seconds, costs.verify_seconds, strict=True
            )
        ],
    )
