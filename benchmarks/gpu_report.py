"""`gpu.jsonl` as a page, whatever it holds so far."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from report import table

Record = dict[str, Any]

VLLM_MODEL = "smollm2-135m"
VLLM = {"off": 28_391, "on": 45_540}
"""Tokens/s that are published for vLLM: plain, and with prompt lookup."""
_PHASES = ("draft", "verify", "host", "prefill")


def cells(records: Sequence[Record]) -> list[Record]:
    """Medians over the turns of every rows and spec; ratios are to plain runs of the same turn."""
    runs = [record for record in records if record["kind"] == "run"]
    facts: Record = next((r for r in records if r["kind"] == "facts"), {})
    plain = {(r["rows"], r["turn"]): r["tokens_per_second"] for r in runs if r["spec"] == "off"}
    grouped: dict[tuple[int, str], list[Record]] = {}
    for run in runs:
        grouped.setdefault((run["rows"], run["spec"]), []).append(run)
    found = []
    for (rows, spec), own in sorted(grouped.items(), key=lambda item: item[0][0]):
        ratios = [
            run["tokens_per_second"] / plain[rows, run["turn"]]
            for run in own
            if (rows, run["turn"]) in plain
        ]
        bandwidth, read = facts.get("bandwidth"), own[-1]["target_bytes"]
        floor = read / bandwidth if bandwidth and read else None
        num_rounds = sum(run["num_rounds"] for run in own)
        seconds = sum(run["seconds"] for run in own)
        found.append(
            {
                "kind": "cell",
                "rows": rows,
                "spec": spec,
                "num_prompts": own[-1]["num_prompts"],
                "tokens_per_second": median(run["tokens_per_second"] for run in own),
                "ratio_to_plain": median(ratios) if ratios else None,
                "accepted_length": own[-1]["accepted_length"],
                "num_rounds": own[-1]["num_rounds"],
                "round_ms": {
                    phase: 1e3 * sum(run[f"{phase}_seconds"] for run in own) / max(num_rounds, 1)
                    for phase in _PHASES[:3]
                },
                "prefill_share": sum(run["prefill_seconds"] for run in own) / seconds,
                # 1 is a run that takes no longer than reading takes.
                "share_of_floor": floor and median(floor / run["seconds"] for run in own),
                "ratio_to_vllm": _to_vllm(facts, spec, own),
            }
        )
    return found


def _to_vllm(facts: Record, spec: str, runs: Sequence[Record]) -> float | None:
    if VLLM_MODEL not in str(facts.get("target", "")).lower():
        return None
    published = VLLM["off" if spec == "off" else "on"]
    return float(median(run["tokens_per_second"] for run in runs)) / published


def page(records: Sequence[Record]) -> str:
    """Everything in Markdown."""
    parts = ["# GPU benchmark"]
    for record in records:
        kind = record["kind"]
        if kind == "facts":
            parts.append(_facts(record))
        elif kind == "tests":
            parts.append(_tests(record))
        elif kind == "text":
            parts.append(_text(record))
    found = cells(records)
    if found:
        parts.append(_speeds(found))
    problems = [_problem(r) for r in records if r["kind"] in ("cut", "failed", "refused")]
    if problems:
        parts.append("## Missing\n\n" + "\n".join(f"- {problem}" for problem in problems))
    ends = [record for record in records if record["kind"] == "end"]
    if ends:
        parts.append(f"Exit code {ends[-1]['exit_code']} after {ends[-1]['seconds']:.0f} s.")
    return "\n\n".join(parts) + "\n"


def _problem(record: Record) -> str:
    if record["kind"] == "refused":
        return f"{record['rows']} rows are more than the engine takes: {record['problem']}"
    return f"{record['step']}: {record['problem']}"


def _facts(record: Record) -> str:
    speed = record["bandwidth"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = [
        ["card", ", ".join(record["gpus"]) or str(record["gpu_problem"])],
        ["driver", str(record["driver"])],
        ["CUDA", str(record["cuda"])],
        ["CPU", record["cpu"]],
        ["versions", versions],
        ["engine", f"{record['engine']}, {record['runtime']}, {record['precision']}"],
        ["target", record["target"]],
        ["prompts", record["prompts"]],
        [
            "bandwidth",
            f"{speed / 1e9:,.0f} GB/s ({record['bandwidth_from']})" if speed else "unknown",
        ],
    ]
    return "## Facts\n\n" + table(["fact", "value"], rows, left=2)


def _tests(record: Record) -> str:
    if record.get("skipped"):
        return f"## Tests\n\nNot run: {record['skipped']}"
    counts = ", ".join(f"{number} {name}" for name, number in record["counts"].items())
    lines = [f"`pytest -m gpu`: {counts or 'no test'}", *(f"- {n}" for n in record["failing"])]
    return "## Tests\n\n" + "\n".join(lines)


def _text(record: Record) -> str:
    differing = record["num_rounding"] + record["num_faults"]
    lines = [
        f"## Text, spec {record['spec']}",
        f"{record['num_rows'] - differing} of {record['num_rows']} rows equal; "
        f"{record['num_rounding']} part by rounding (gap below {record['max_gap']:g}), "
        f"{record['num_faults']} by a fault",
    ]
    if record["differences"]:
        rows = [
            [
                str(d["row"]),
                str(d["position"]),
                *map(str, d["tokens"]),
                "beyond" if d["gap"] is None else f"{d['gap']:.3g}",
            ]
            for d in record["differences"]
        ]
        lines.append(table(["row", "position", "expected", "found", "gap"], rows))
    return "\n\n".join(lines)


def _speeds(found: Sequence[Record]) -> str:
    headers = ["rows", "prompts", "spec", "tokens/s", "× plain", "τ", "rounds"]
    headers += ["draft ms", "verify ms", "host ms", "prefill", "of the floor", "× vLLM"]
    rows = [
        [str(c["rows"]), str(c["num_prompts"]), c["spec"], f"{c['tokens_per_second']:,.1f}"]
        + [_shown(c["ratio_to_plain"], ".2f"), f"{c['accepted_length']:.2f}", str(c["num_rounds"])]
        + [f"{c['round_ms'][phase]:.2f}" for phase in _PHASES[:3]]
        + [f"{c['prefill_share']:.0%}", _shown(c["share_of_floor"], ".1%")]
        + [_shown(c["ratio_to_vllm"], ".2f")]
        for c in found
    ]
    lines = [
        "## Speed",
        table(headers, rows),
        "Prefill included. *Of the floor* is the time that the card needs to read the target's "
        "weights once a round, and the cached keys and values, over the time taken; prefill and "
        "the draft's reads are not in it.",
    ]
    if any(c["ratio_to_vllm"] is not None for c in found):
        lines.append(
            f"*× vLLM*: published for the same model on one H100, not measured here: "
            f"{VLLM['off']:,} tokens/s plain (for `off`), {VLLM['on']:,} with prompt lookup (for "
            "`on` and `auto`). Prompts and concurrency were others."
        )
    return "\n\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
