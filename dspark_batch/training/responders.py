"""Who responds to prompts: the engine, as an ordinary job, or the target in torch.

Both read a file of prompts and write parts to `OUTPUT/data`, with the prompts' columns and
`output_token_ids`. A part that is there is not made again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dspark_batch.decode import DecodeStats, SamplingParams, decode
from dspark_batch.engine import open_engine, replacing
from dspark_batch.errors import InputError, StoppedEarly
from dspark_batch.job import Job, Progress, read_columns, run, write_columns
from dspark_batch.models.weights import Weights, sha256_of
from dspark_batch.training.decoder import Decoder
from dspark_batch.training.generation import generate, rows_within

PROMPT_COLUMN, OUTPUT_COLUMN = "prompt_token_ids", "output_token_ids"
_PART_ROWS = 256  # rows that a killed job may lose


class Responder(Protocol):
    """One way to get responses."""

    name: str
    """Of the folder that they go to."""

    def __call__(self, prompts: Path, output: Path, params: SamplingParams) -> None:
        """Respond to each row of `prompts`, which has the column `prompt_token_ids`.

        Raises `InputError` where the parts are of other prompts or settings, and `StoppedEarly`.
        """


class JobResponder:
    """The engine of a folder, by the machinery of `run`."""

    name = "responses"

    def __init__(
        self,
        engine_folder: Path,
        *,
        progress: Progress,
        argv: Sequence[str],
        end: float | None,
        overwrite: bool,
    ) -> None:
        """`end` is when to stop, on the monotonic clock."""
        self._engine_folder, self._progress, self._argv = engine_folder, progress, argv
        self._end, self._overwrite = end, overwrite

    def __call__(self, prompts: Path, output: Path, params: SamplingParams) -> None:
        """See `Responder`."""
        job = Job.model_validate(
            {
                "input": str(prompts),
                "output": output,
                "engine": self._engine_folder,
                "token_ids_column": PROMPT_COLUMN,
                "max_new_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "seed": params.seed,
                "spec": "off",
                "part_rows": _PART_ROWS,
                "token_ids": True,
                "max_error_rate": 1.0,
                "deadline": self._seconds_left(),
            }
        )
        try:
            self._run(job, overwrite=False)
        except InputError:  # the parts are of other prompts or settings
            if not self._overwrite:
                raise
            self._run(job, overwrite=True)

    def _seconds_left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.001)

    def _run(self, job: Job, *, overwrite: bool) -> None:
        summary = run(
            job,
            open_engine=partial(open_engine, with_draft=False),
            decode=decode,
            stats=DecodeStats(),
            progress=self._progress,
            argv=self._argv,
            overwrite=overwrite,
        )
        if isinstance(summary.failure, StoppedEarly):
            raise summary.failure


@dataclass(slots=True)
class _Generated:
    """How far a file of prompts is; what a progress display reads."""

    num_rows: int
    num_done: int = 0

    def text(self) -> str:
        """Rows."""
        return f"{self.num_done:,} of {self.num_rows:,} rows"


class TorchResponder:
    """The target in torch, a wave of rows at a time; each wave becomes a part."""

    name = "responses-torch"

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        *,
        num_bytes: int,
        progress: Progress,
        check: Callable[[], None],
        overwrite: bool,
    ) -> None:
        """`num_bytes` bounds the caches; `check` raises `StoppedEarly` when it is time to stop."""
        self._decoder, self._stop_ids = decoder, weights.stop_token_ids
        self._target = [sha256_of(path) for path in weights.files]
        self._num_bytes, self._progress = num_bytes, progress
        self._check, self._overwrite = check, overwrite

    def __call__(self, prompts: Path, output: Path, params: SamplingParams) -> None:
        """See `Responder`."""
        columns, _ = read_columns(prompts)
        rows: list[list[int]] = columns[PROMPT_COLUMN]
        # Rows of like length share a wave; the order decides the parts, and follows from the rows.
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), index))
        about = {
            "target": self._target,
            "prompts": hashlib.sha256(repr(rows).encode()).hexdigest(),
            "settings": [params.temperature, params.top_k, params.top_p, params.seed],
            "max_new_tokens": params.max_new_tokens,
        }
        data = output / "data"
        data.mkdir(parents=True, exist_ok=True)
        ends = self._kept(data, about)
        state = _Generated(len(rows))
        while state.num_done < len(rows):
            begin = state.num_done
            if begin not in ends:
                ends[begin] = self._wave(data, columns, order[begin:], params, about, begin)
            state.num_done = ends[begin]
            self._progress.update(state)

    def _kept(self, data: Path, about: Mapping[str, object]) -> dict[int, int]:
        """The parts that are there: first row and the row after the last."""
        ends = {}
        for part in sorted(data.glob("part-*.parquet")):
            found, metadata = read_columns(part)
            if metadata != about:
                if metadata.keys() != about.keys():
                    raise InputError(
                        f"{part} was not written by a training", hint="move it elsewhere"
                    )
                if not self._overwrite:
                    raise InputError(
                        f"the responses in {data} are to other prompts, or of another target",
                        hint="put the recipe and its files back, or start again with --overwrite",
                    )
                part.unlink()
                continue
            begin = int(part.stem.removeprefix("part-"))
            ends[begin] = begin + len(found[PROMPT_COLUMN])
        return ends

    def _wave(
        self,
        data: Path,
        columns: Mapping[str, list[Any]],
        order: Sequence[int],
        params: SamplingParams,
        about: Mapping[str, object],
        begin: int,
    ) -> int:
        """Respond to as many of the rows at `order` as fit; the row after the last of them."""
        prompts: list[list[int]] = [columns[PROMPT_COLUMN][index] for index in order]
        count = rows_within(
            self._decoder, prompts, params.max_new_tokens, num_bytes=self._num_bytes
        )
        # No two waves draw the same numbers, and a wave that is made again draws its own.
        digest = hashlib.sha256(f"{params.seed}:{begin}".encode()).digest()
        responses = generate(
            self._decoder,
            prompts[:count],
            replace(params, seed=int.from_bytes(digest[:8], "big") >> 1),
            stop_token_ids=self._stop_ids,
            check=self._check,
        )
        wave = {name: [values[i] for i in order[:count]] for name, values in columns.items()}
        with replacing(data / f"part-{begin:08d}.parquet") as temporary:
            write_columns(temporary, {**wave, OUTPUT_COLUMN: responses}, metadata=about)
        return begin + count
