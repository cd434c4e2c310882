"""Where figures begin and end; the only module that imports matplotlib, the extra `plots`.

Figures are made without `pyplot`: no window, no backend to choose, no state between two of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.errors import StorageError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 110


def new_figure(title: str, *, width: float = 8.0, height: float = 5.0) -> Figure:
    """An empty figure of that many inches. Raises `UsageError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "figures need matplotlib", hint="pip install 'dspark-batch[plots]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. Raises `StorageError`."""
    try:
        figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    except OSError as exc:
        raise StorageError(f"cannot write {path}: {exc.strerror or exc}") from exc
