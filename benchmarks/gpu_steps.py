"""What `gpu.py` measures, each step in a process of its own: records in, records out."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dspark_batch.bench import MODES, Decoded, Workload, decode_all, read_workload
from dspark_batch.bench.forecast.catalogue import GPUS
from dspark_batch.decode import Prompt, SamplingParams
from dspark_batch.decode.algorithm import CostTable
from dspark_batch.engine import (
    Engine,
    ensure_costs,
    find_cpu,
    find_gpus,
    installed_versions,
    open_engine,
    read_manifest,
)
from dspark_batch.engine.runtimes import Placement
from dspark_batch.errors import EngineError, UsageError
from dspark_batch.export import TargetProbe

Record = dict[str, Any]
Keep = Callable[[Record], None]

FORMAT = "dspark-batch-reference/1"
_BEST = 8  # tokens whose gaps a reference keeps, at every position
_TEXT_ROWS = 16
_LEAST_PROMPTS, _PER_ROW = 4, 3
_PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "triton", "cuda-bindings", "TensorRT")
_LOOKED_UP = ("Gather", "RotaryEmbedding")  # they read a few rows of a table


@dataclass(frozen=True, slots=True)
class Settings:
    """What all steps know."""

    engine: Path
    prompts: Path
    source: str | None
    rows: tuple[int, ...]
    new_tokens: int
    repeat: int
    texts: int
    text_tokens: int
    max_gap: float
    reference: Path | None
    bandwidth: float | None


def prompts_of(settings: Settings, engine: Engine, *, new_tokens: int) -> Workload:
    """The prompts of the chosen source, tokenized as `run` does it.

    Raises:
        UsageError: the file has none of that source.
    """
    whole = read_workload(settings.prompts, engine, new_tokens=new_tokens, limit=None)
    if settings.source is None:
        return whole
    chosen = [i for i, source in enumerate(whole.sources) if source == settings.source]
    if not chosen:
        known = ", ".join(sorted({str(source) for source in whole.sources}))
        raise UsageError(f"no prompt has the source {settings.source!r}; there are {known}")
    return replace(
        whole,
        prompts=tuple(whole.prompts[i] for i in chosen),
        sources=tuple(whole.sources[i] for i in chosen),
    )


def facts(settings: Settings) -> Record:
    """The machine, the versions and the engine; `bandwidth` is in bytes per second, or None."""
    gpus, cpu = find_gpus(), find_cpu()
    manifest = read_manifest(settings.engine, verify=False)
    speed, origin = _bandwidth(settings, [gpu.name for gpu in gpus.gpus])
    return {
        "kind": "facts",
        "gpus": [gpu.name for gpu in gpus.gpus],
        "gpu_problem": gpus.problem,
        "driver": gpus.driver,
        "cuda": gpus.cuda,
        "cpu": f"{cpu.name}, {cpu.num_cores} cores",
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
        "engine": str(settings.engine),
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "target": manifest.target.source,
        "prompts": str(settings.prompts),
        "bandwidth": speed,
        "bandwidth_from": origin,
    }


def _bandwidth(settings: Settings, names: Sequence[str]) -> tuple[float | None, str]:
    if settings.bandwidth is not None:
        return settings.bandwidth * 1e9, "given"
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        return _copy_speed(torch), "a copy of 1 GiB by torch"
    key = catalogue_key(names[0]) if names else None
    if key is None:
        return None, "unknown"
    return GPUS[key].bandwidth_gbs * 1e9, f"{GPUS[key].source}, chosen by name"


def _copy_speed(torch: Any) -> float:
    """Bytes read and written per second."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * 2**30 / best


def catalogue_key(name: str) -> str | None:
    """The GPU of the catalogue whose name is a word, or two, of `name`; None if there is none."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    joined = {*words, *(a + b for a, b in pairwise(words))}
    return next((key for key in GPUS if key in joined), None)


def make_reference(settings: Settings, *, progress: Callable[[str], None]) -> Record:
    """Greedy tokens of the engine on the CPU, and its best tokens with their gaps.

    `best[row][position]` are pairs of a token and how far its logit is below the largest.

    Raises:
        UsageError: the engine is not in fp32.
    """
    placement = Placement(device="cpu")
    with closing(
        open_engine(settings.engine, max_rows=_TEXT_ROWS, with_draft=False, placement=placement)
    ) as engine:
        if engine.manifest.precision != "fp32":
            raise UsageError(
                f"{settings.engine} is {engine.manifest.precision}: a reference is fp32",
                hint='export with precision = "fp32"',
            )
        whole = prompts_of(settings, engine, new_tokens=settings.text_tokens)
        prompts = whole.resized(min(settings.texts, len(whole.prompts))).prompts
        progress(f"decoding {len(prompts)} rows")
        run = decode_all(engine, prompts, "off")
        target, cache = engine.fingerprint["target"], engine.manifest.target.cache
    capacity = max(len(prompt.token_ids) for prompt in prompts) + settings.text_tokens
    probe = TargetProbe(settings.engine / "target.onnx", cache, capacity=capacity)
    rows = []
    for prompt, completion in zip(prompts, run.completions, strict=True):
        progress(f"logits of row {prompt.row + 1} of {len(prompts)}")
        tokens = list(completion.token_ids)
        logits = probe.run([[*prompt.token_ids, *tokens[:-1]]], [0], probe.empty(1))[0][0]
        best = [_best(values) for values in logits[-len(tokens) :]]
        rows.append({"prompt": list(prompt.token_ids), "tokens": tokens, "best": best})
    return {
        "format": FORMAT,
        "target": target,
        "new_tokens": settings.text_tokens,
        "rows": rows,
    }


def _best(logits: NDArray[np.float32]) -> list[tuple[int, float]]:
    order = np.argsort(-logits, kind="stable")[:_BEST]
    return [(int(token), float(logits[order[0]] - logits[token])) for token in order]


def text(settings: Settings, *, progress: Callable[[str], None]) -> Iterator[Record]:
    """The engine's greedy text against the reference's, plainly and with drafts.

    Raises:
        UsageError: the file is no reference, or one of another target.
    """
    assert settings.reference is not None
    if settings.reference.is_dir():
        found = make_reference(replace(settings, engine=settings.reference), progress=progress)
    else:
        found = _read_reference(settings.reference)
    rows = found["rows"]
    params = SamplingParams(max_new_tokens=found["new_tokens"])
    prompts = [Prompt(i, tuple(row["prompt"]), params) for i, row in enumerate(rows)]
    limit = read_manifest(settings.engine, verify=False).limits.max_rows
    for mode in MODES[:2]:
        with closing(_open(settings, mode, min(_TEXT_ROWS, limit, len(prompts)))) as engine:
            if engine.fingerprint["target"] != found["target"]:
                raise UsageError(f"{settings.reference} is of other weights than the engine")
            progress(f"decoding {len(prompts)} rows, spec {mode}")
            run = decode_all(engine, prompts, mode)
        ours = [completion.token_ids for completion in run.completions]
        differences = [d for d in map(_difference, range(len(rows)), rows, ours) if d]
        num_faults = sum(not d["gap"] < settings.max_gap for d in differences)
        yield {
            "kind": "text",
            "spec": mode,
            "num_rows": len(rows),
            "num_tokens": sum(map(len, ours)),
            "max_gap": settings.max_gap,
            "num_rounding": len(differences) - num_faults,
            "num_faults": num_faults,
            # JSON has no infinity: None is a gap beyond the kept tokens.
            "differences": [
                d | {"gap": d["gap"] if d["gap"] < np.inf else None} for d in differences
            ],
        }


def _read_reference(path: Path) -> Record:
    try:
        found: Record = json.loads(path.read_text())
        known = found["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UsageError(f"{path} is not a file that --write-reference wrote")
    return found


def _difference(row: int, expected: Mapping[str, Any], ours: Sequence[int]) -> Record | None:
    """The first difference of a row; None if there is none.

    `gap` is how far the worse of both tokens lies below the reference's best, infinite if one is
    not among those that were kept, or a row had ended.
    """
    for position, pair in enumerate(zip_longest(expected["tokens"], ours)):
        if pair[0] != pair[1]:
            kept = expected["best"][position] if position < len(expected["best"]) else []
            gaps = {token: gap for token, gap in kept}
            gap = max(gaps.get(token, np.inf) for token in pair)
            return {"row": row, "position": position, "tokens": pair, "gap": gap}
    return None


def costs(settings: Settings, *, progress: Callable[[str], None]) -> Iterator[Record]:
    """The cost table for `auto`, of the most rows that the engine opens with."""
    for num_rows in sorted(settings.rows, reverse=True):
        try:
            engine = open_engine(settings.engine, max_rows=num_rows)
        except EngineError as problem:
            if num_rows <= read_manifest(settings.engine, verify=False).limits.max_rows:
                raise
            yield {"kind": "refused", "rows": num_rows, "problem": problem.line}
            continue
        with closing(engine):
            ensure_costs(engine, progress=progress)
            assert engine.costs is not None
            yield {"kind": "costs", "rows": num_rows, "costs": engine.costs.to_json()}
        return


def _open(settings: Settings, mode: str, max_rows: int) -> Engine:
    """`off` without its draft, as `run --spec off` has it."""
    return open_engine(settings.engine, max_rows=max_rows, with_draft=mode != "off")


def speed(
    settings: Settings,
    num_rows: int,
    *,
    records: Sequence[Record],
    seconds: float,
    progress: Callable[[str], None],
) -> Iterator[Record]:
    """Runs of every mode in turns; `seconds` bounds the number of prompts, not below the rows.

    `auto` is left out where no cost table was measured.
    """
    begin = time.perf_counter()
    table = next((record["costs"] for record in records if record["kind"] == "costs"), None)
    modes = MODES if table is not None else MODES[:2]
    reads = target_reads(settings.engine)
    with ExitStack() as stack:
        opened = {
            kind: stack.enter_context(closing(_open(settings, kind, num_rows)))
            for kind in MODES[:2]
        }
        engines = {mode: opened["off" if mode == "off" else "on"] for mode in modes}
        if table is not None:
            opened["on"].costs = CostTable.from_json(table)
        whole = prompts_of(settings, opened["on"], new_tokens=settings.new_tokens)
        warm_up, slowest = whole.resized(num_rows).prompts, 0.0
        for mode in modes:  # whole rows: sizes and lengths on the way have graphs of their own
            progress(f"{num_rows} rows, spec {mode}: warm-up")
            slowest += decode_all(engines[mode], warm_up, mode).seconds / num_rows
        left = seconds - (time.perf_counter() - begin)
        fitting = int(0.8 * left / (slowest * settings.repeat))
        wanted = max(_LEAST_PROMPTS, _PER_ROW * num_rows)
        prompts = whole.resized(max(min(wanted, fitting), num_rows)).prompts
        for turn in range(settings.repeat):
            shift = turn % len(modes)
            for mode in modes[shift:] + modes[:shift]:
                progress(f"{num_rows} rows, spec {mode}: turn {turn + 1} of {settings.repeat}")
                run = decode_all(engines[mode], prompts, mode)
                yield _run_record(num_rows, mode, turn, prompts, run, reads)


def _run_record(
    num_rows: int,
    mode: str,
    turn: int,
    prompts: Sequence[Prompt],
    run: Decoded,
    reads: tuple[int, int] | None,
) -> Record:
    stats = run.stats
    read = None
    if reads is not None:
        # A row's rounds read, on average, its prompt and half of its new tokens.
        cached = sum(
            c.spec.num_rounds * (len(p.token_ids) + len(c.token_ids) / 2)
            for p, c in zip(prompts, run.completions, strict=True)
        )
        read = stats.num_rounds * reads[0] + cached * reads[1]
    return {
        "kind": "run",
        "rows": num_rows,
        "spec": mode,
        "turn": turn,
        "num_prompts": len(prompts),
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_new_tokens": stats.num_new_tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "prefill_seconds": stats.prefill_seconds,
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "host_seconds": stats.host_seconds,
        "num_rounds": stats.num_rounds,
        "num_drafted_rounds": stats.num_drafted_rounds,
        "accepted_length": stats.spec.accepted_length,
        "target_bytes": read,
    }


def target_reads(folder: Path) -> tuple[int, int] | None:
    """Bytes of weights that a pass of the target reads, and of keys and values per cached token.

    Tables of which it reads a few rows are left out. None if the graph is not in the folder or has
    no caches to be read off it.
    """
    path = folder / "target.onnx"
    if not path.exists():
        return None
    graph = onnx.load(str(path), load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    kind = kinds.get("past_key_0")
    if kind is None:
        return None
    used = {name for op, names in _uses(graph) if op not in _LOOKED_UP for name in names}
    weights = sum(_stored_bytes(t) for t in graph.initializer if t.name in used)
    size = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    shapes = read_manifest(folder, verify=False).target.cache.cache_shapes
    return weights, sum(2 * heads * width * size for heads, width in shapes)


def _uses(graph: onnx.GraphProto) -> Iterator[tuple[str, list[str]]]:
    """Op and inputs of every node, those of branches too."""
    for node in graph.node:
        yield node.op_type, list(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _uses(attribute.g)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    outside = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in outside:
        return int(outside["length"])
    return len(tensor.raw_data) or tensor.ByteSize()
