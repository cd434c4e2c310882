"""Tables for a terminal, which are also Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NO_LIMIT = 10_000  # columns: a table does not depend on the terminal


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """A table whose first `left` columns are text and whose others are numbers."""
    found = Table(box=box.MARKDOWN)
    for i, header in enumerate(headers):
        found.add_column(header, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        found.add_row(*map(Text, row))
    out = StringIO()
    Console(file=out, width=_NO_LIMIT, color_system=None).print(found)
    return out.getvalue().strip()
