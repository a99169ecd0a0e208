"""Environments of packages that cannot share one with graphprune's own: one folder in the user's cache for each set of pins.

python tools/environment.py ipex        # makes it where it is missing, installs this checkout into it, prints its Python
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Annotated

import typer

PINS = Path(__file__).with_name("environments")
CHECKOUT = Path(__file__).parent.parent
_NEWEST = {"inc": (3, 12), "deepsparse": (3, 11), "ipex": (3, 13)}
"""The last Python that an environment's pins have wheels for."""


def pins(name: str) -> Path:
    """The requirements file of an environment."""
    return PINS / f"{name}.txt"


def folder(name: str) -> Path:
    """Where an environment is, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "graphprune" / f"{name}-{hashlib.sha256(pins(name).read_bytes()).hexdigest()[:8]}"


def interpreter(name: str) -> Path | None:
    """Its Python, None where it is not installed in full."""
    return folder(name) / "bin" / "python" if (folder(name) / ".ready").exists() else None


def install(name: str) -> Path:
    """Make an environment, if it is not there, and return its Python."""
    found = interpreter(name)
    if found is not None:
        return found
    newest = _NEWEST.get(name, sys.version_info[:2])
    if sys.version_info[:2] > newest:
        last = ".".join(map(str, newest))
        sys.exit(
            f"the packages of {pins(name)} have no wheels for Python newer than {last}; run this with Python {last}"
        )
    venv.create(folder(name), with_pip=True, clear=True)
    _pip(folder(name) / "bin" / "python", "--requirement", str(pins(name)))
    (folder(name) / ".ready").touch()
    return folder(name) / "bin" / "python"


def add_checkout(python: Path) -> None:
    """Install this checkout into an environment, without what it depends on: the pins have that."""
    _pip(python, "--no-deps", "--no-build-isolation", "--editable", str(CHECKOUT))


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main(
    name: Annotated[str, typer.Argument(help="Which one: the name of a file in tools/environments, without .txt.")],
    bare: Annotated[bool, typer.Option("--bare", help="Do not install this checkout into it.")] = False,
) -> None:
    """Make an environment where it is missing, and print the path of its Python."""
    if not pins(name).is_file():
        known = ", ".join(sorted(path.stem for path in PINS.glob("*.txt")))
        raise typer.BadParameter(f"{name} is not known; there are {known}")
    python = install(name)
    if not bare:
        add_checkout(python)
    print(python)


if __name__ == "__main__":
    typer.run(main)
