"""How a benchmark presents itself: its command, and what it ran on."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import click

from dspark_batch.bench import about
from dspark_batch.bench import table as table
from dspark_batch.engine import Engine
from dspark_batch.errors import DSparkError

_ARGV = "benchmarks.argv"
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


def origin(ctx: click.Context) -> dict[str, Any]:
    """Which benchmark this is, how it was called, and of which commit."""
    return {
        "benchmark": ctx.command.name,
        "command": shlex.join(["python", f"benchmarks/{ctx.command.name}.py", *ctx.meta[_ARGV]]),
        "commit": _commit(),
    }


def provenance(ctx: click.Context, engine: Engine) -> dict[str, Any]:
    """Everything that the figures of a benchmark depend on, for its JSON line."""
    return origin(ctx) | about(engine)


def _commit() -> str | None:
    """The checkout's commit, `-dirty` if tracked files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
