"""How a benchmark presents itself: its command, what it ran on, an aligned table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dspark_batch import __version__
from dspark_batch.engine import Engine
from dspark_batch.errors import DSparkError

_ARGV = "benchmarks.argv"
_PACKAGES = ("numpy", "onnx", "onnxruntime", "tokenizers", "torch", "transformers")
_HERE = Path(__file__).parent


class BenchmarkCommand(click.Command):
    """Keeps the arguments as they were typed; an error of ours becomes a line and its exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        ctx.meta[_ARGV] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        try:
            return super().invoke(ctx)
        except DSparkError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)


def provenance(ctx: click.Context, engine: Engine) -> dict[str, Any]:
    """Everything that the figures of a benchmark depend on, for its JSON line.

    `load_average` is that of the last minute: above the number of cores, timings mean little.
    """
    manifest = engine.manifest
    draft = manifest.draft
    return {
        "benchmark": ctx.command.name,
        "command": shlex.join(["python", f"benchmarks/{ctx.command.name}.py", *ctx.meta[_ARGV]]),
        "commit": _commit(),
        "versions": _versions(),
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


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rule = [f"{'-' * (width - 1)}:" for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in (headers, rule, *rows)
    )


def _versions() -> dict[str, str]:
    """Read from the installed packages' metadata: nothing is imported for it."""
    versions = {"python": platform.python_version(), "dspark-batch": __version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _commit() -> str | None:
    """The checkout's commit, `-dirty` if tracked files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
