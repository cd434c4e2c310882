"""Start a script again with the wheels of a folder: for a machine without network.

Standard library only, because the wheels may bring everything else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CUT, FAILED = 3, 1
_FOLDER = "DSPARK_GPU_WHEELS"
_BEGUN = "DSPARK_GPU_BEGUN"


def enter(argv: Sequence[str]) -> None:
    """Install the wheels of `--wheels FOLDER` and start the script again, which then finds them.

    Returns where nothing is asked, or all is done: once installed, the second start passes. Exits
    with `CUT` if `--minutes` are over, with `FAILED` if pip fails or there is no wheel.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    try:
        options = parser.parse_known_args(argv[1:])[0]
    except SystemExit:
        return  # the script itself says better what is wrong with a value
    if options.wheels is None or _FOLDER in os.environ:
        return
    begun = time.time()
    wheels = sorted(map(str, options.wheels.glob("*.whl")))
    if not wheels:
        _leave(f"there is no wheel in {options.wheels}", FAILED)
    folder = tempfile.mkdtemp(prefix="dspark-wheels-")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--quiet", "--disable-pip-version-check", "--target", folder, *wheels]
    try:
        code = subprocess.run(pip, timeout=60 * options.minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        shutil.rmtree(folder, ignore_errors=True)
        if code is None:
            _leave("the time was over before the wheels were installed", CUT)
        _leave(f"pip ended with code {code}", FAILED)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    found = os.environ | {"PYTHONPATH": path, _FOLDER: folder, _BEGUN: repr(begun)}
    os.execve(sys.executable, [sys.executable, *argv], found)


def begun() -> float:
    """When the script was started first, in seconds since the epoch: pip's time counts too."""
    return float(os.environ.get(_BEGUN) or time.time())


def remove() -> None:
    """Delete what `enter` installed."""
    folder = os.environ.get(_FOLDER)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _leave(problem: str, code: int) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(code)
