"""The environment of Intel Neural Compressor 2.6, which needs older packages than graphprune's: one for each set of pins.

python tools/benchmarks/inc_environment.py     # what `make bench-inc` runs; needs Python 3.11 or 3.12
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

PINS = Path(__file__).with_name("inc.txt")


def folder() -> Path:
    """Where it is, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "graphprune" / f"inc-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:8]}"


def interpreter() -> Path | None:
    """Its Python, None where it is not installed in full."""
    return folder() / "bin" / "python" if (folder() / ".ready").exists() else None


def install() -> None:
    """Make it, if it is not there."""
    if interpreter() is None:
        if sys.version_info >= (3, 13):
            sys.exit("neural-compressor 2.6 needs numpy below 2, which has no wheels for Python 3.13; use 3.11 or 3.12")
        venv.create(folder(), with_pip=True, clear=True)
        subprocess.run([folder() / "bin" / "pip", "install", "--quiet", "--requirement", PINS], check=True)
        (folder() / ".ready").touch()
    print(f"neural-compressor 2.6 is in {folder()}")


if __name__ == "__main__":
    install()
