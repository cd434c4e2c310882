"""Tables for people: aligned, and Markdown as they stand."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """A Markdown table with aligned columns: the first `left` are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rule = ["-" * width if i < left else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)]
    return "\n".join(
        f"| {' | '.join(_aligned(line, widths, left))} |" for line in (headers, rule, *rows)
    )


def _aligned(line: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    cells = zip(line, widths, strict=True)
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(cells)
    ]
