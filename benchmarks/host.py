"""The host's time in a round: all that is not the runtime, which has its answers ready here.

A GPU idles for that long. Rows are random text in which few tokens are common, as in language, so
that a lookup finds something for some of them. The target accepts two drafts of a block on average.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from report import BenchmarkCommand, origin, table

from dspark_batch.decode import (
    DecodeStats,
    DraftBlock,
    Prompt,
    SamplingParams,
    VerifyResult,
    decode,
)
from dspark_batch.drafters import LookupInfo
from dspark_batch.engine import CacheInfo, DraftInfo, Engine, EngineManifest, Limits, TargetInfo
from dspark_batch.engine.runtimes import PREFILL, Draws, Ints, Runtime, Span, Step

KINDS = ("plain", "drafted", "with lookup")
BLOCK = 7
VOCAB = 30_000
_POOL = 32  # rounds after which the answers repeat


class Enough(Exception):
    """As many rounds as were wanted."""


class InstantRuntime:
    """A `Runtime` that answers at once, until the rounds that were wanted are over."""

    padded_shapes = None
    prefill_sizes = PREFILL

    def __init__(self, num_rows: int, num_rounds: int) -> None:
        rng = np.random.default_rng(0)
        self._tokens = common_tokens(rng, (_POOL, num_rows, BLOCK))
        self._accepted = np.minimum(rng.geometric(1 / 3, (_POOL, num_rows)) - 1, BLOCK)
        self._confidence = rng.normal(size=(_POOL, num_rows, BLOCK)).astype(np.float32)
        self._num_rounds = num_rounds
        self._clock = time.perf_counter()
        self._elapsed = 0.0
        self.host_seconds: list[float] = []
        """Of every round, from one target pass to the next; the first has the prefill."""

    def admit(self, slot: int) -> None:
        """Nothing is kept of a row."""

    def release(self, slot: int) -> None:
        """See `admit`."""

    def draft(self, slots: list[int], anchors: Ints, draws: Draws) -> DraftBlock:
        """Tokens that have nothing to do with the row."""
        with self._at_work():
            now, num_rows = self._now, len(slots)
            return DraftBlock(
                self._tokens[now, :num_rows],
                self._confidence[now, :num_rows],
                np.full(num_rows, BLOCK),
            )

    def verify(self, spans: list[Span], lengths: Ints, draws: Draws) -> VerifyResult:
        """A prefill."""
        return VerifyResult(np.zeros_like(lengths), self._tokens[0, : len(spans), 0])

    def step(self, step: Step) -> VerifyResult:
        """Accepts some of each row's drafts."""
        with self._at_work():
            self.host_seconds.append(self._elapsed)
            self._elapsed = 0.0
            if len(self.host_seconds) > self._num_rounds:
                raise Enough
            accepted = np.minimum(self._accepted[self._now, : len(step.slots)], step.lengths)
            return VerifyResult(accepted, self._tokens[self._now, : len(step.slots), 0])

    def context(self, spans: list[Span]) -> list[NDArray[np.float32]]:
        """Not asked for."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""

    @property
    def _now(self) -> int:
        return len(self.host_seconds) % _POOL

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What passes in here is not the host's."""
        self._elapsed += time.perf_counter() - self._clock
        try:
            yield
        finally:
            self._clock = time.perf_counter()


def common_tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
    """Random tokens, the n-th most common about 1 / n as often as the first."""
    tokens: Ints = (VOCAB ** rng.random(shape)).astype(np.int64)
    return tokens


def host_seconds(
    kind: str, *, num_rows: int, num_rounds: int, prompt_tokens: int, temperature: float
) -> float:
    """Median seconds of the host in a round of one of `KINDS`."""
    runtime = InstantRuntime(num_rows, num_rounds)
    max_tokens = prompt_tokens + 2 + (num_rounds + 1) * (BLOCK + 1)
    engine = instant_engine(kind, runtime, max_rows=num_rows, max_tokens=max_tokens)
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(
            row,
            tuple(tokens),
            SamplingParams(max_tokens - prompt_tokens, temperature=temperature, seed=row),
        )
        for row, tokens in enumerate(common_tokens(rng, (num_rows, prompt_tokens)).tolist())
    ]
    spec = "off" if kind == "plain" else "on"
    with suppress(Enough):
        list(decode(prompts, engine, spec=spec, stats=DecodeStats()))
    return median(runtime.host_seconds[1:])


def instant_engine(kind: str, runtime: Runtime, *, max_rows: int, max_tokens: int) -> Engine:
    """A pair with a draft network, and prompt lookup ahead of it where the kind has it."""
    cache = CacheInfo(num_layers=1, num_kv_heads=1, head_dim=1)
    settings: dict[str, Any] = {"shortest_match": 2, "longest_match": 8}
    table = ((0.7,) * BLOCK,) * 7
    learnt = {"drafter": "ngram", "acceptance": table, "sampled_acceptance": table}
    manifest = EngineManifest(
        format="",
        name="instant",
        created="",
        versions={},
        runtime="",
        precision="",
        target=TargetInfo(
            family="",
            source="",
            license=None,
            files={},
            vocab_size=VOCAB,
            hidden_size=1,
            cache=cache,
            stop_token_ids=(VOCAB + 1, VOCAB + 2),
        ),
        draft=DraftInfo(
            drafter="",
            source=None,
            files={},
            block_size=BLOCK,
            cache=cache,
            lookup=LookupInfo.model_validate(settings | learnt) if kind == KINDS[2] else None,
            confidence_temperatures=(1.1,) * BLOCK,
            acceptance=(0.7,) * BLOCK,
            sampled_temperatures=(1.2,) * BLOCK,
        ),
        limits=Limits(max_rows=max_rows, max_tokens=max_tokens),
        has_tokenizer=False,
        files={},
        parity={},
    )
    return Engine(manifest, runtime, folder=Path(), max_rows=max_rows, hardware_key="instant")


@click.command(name="host", cls=BenchmarkCommand)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16, 64, 256),
    show_default=True,
    help="Concurrent rows; may be given again.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True)
@click.pass_context
def main(
    ctx: click.Context,
    rows: tuple[int, ...],
    rounds: int,
    prompt_tokens: int,
    temperature: float,
) -> None:
    """Milliseconds of the host in a round, by rows and what a round does; a JSON line at the end.

    \b
    Example:
      python benchmarks/host.py --rows 1 --rows 256
    """
    found = {
        kind: [
            host_seconds(
                kind,
                num_rows=num_rows,
                num_rounds=rounds,
                prompt_tokens=prompt_tokens,
                temperature=temperature,
            )
            for num_rows in rows
        ]
        for kind in KINDS
    }
    click.echo(f"The host's time in a round, ms; blocks of {BLOCK} drafts\n")
    lines = [
        [str(num_rows), *(f"{1e3 * found[kind][i]:.3f}" for kind in KINDS)]
        for i, num_rows in enumerate(rows)
    ]
    click.echo(table(["rows", *KINDS], lines))
    click.echo(json.dumps(origin(ctx) | {"rows": rows, "host_seconds": found}))


if __name__ == "__main__":
    main()
