"""Lower what was trained: here, or with the Python whose environment can."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping
from pathlib import Path

from graphprune.artifact.checkpoint import load_program
from graphprune.artifact.export import export
from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.pipeline.remote import interpreter, variable
from graphprune.pipeline.target import Target


def check_target(target: Target) -> None:
    """Notice before training that a Program could not be lowered after it.

    Raises:
        LoweringError: The target lowers in an environment of its own, and nothing says where that is.
    """
    if _is_elsewhere(target) and interpreter(target.name) is None:
        raise LoweringError(
            f"target {target.name} lowers with {target.elsewhere}, which has an environment of its own: python tools/environment.py "
            f"{target.name} makes it and prints its Python; set {variable(target.name)} to that"
        )


def lower(folder: Path, program: Program | None, target: Target, out: Path, metrics: Mapping[str, float]) -> None:
    """Write and verify an artifact.

    Args:
        folder: Where the Program is saved.
        program: The same one, where it is in memory.
        target: What to lower to.
        out: Folder of the artifact; replaced.
        metrics: For the manifest.

    Raises:
        LoweringError: It cannot be lowered.
        VerifyError: What was written does not compute what the Program computes.
    """
    python = interpreter(target.name) if _is_elsewhere(target) else None
    if python is None:
        export(program or load_program(folder), target, out, overwrite=True, fresh=True, metrics=metrics)
        return
    options = [word for name, value in vars(target).items() for word in ("--option", f"{name}={value}")]
    scores = [word for name, value in metrics.items() for word in ("--metric", f"{name}={value!r}")]
    command = [python, "-m", "graphprune", "export", str(folder), "--target", target.name, "--out", str(out), "--force"]
    done = subprocess.run([*command, *options, *scores], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise LoweringError(
            f"{python} could not lower {folder}: {lines[-1] if lines else 'nothing was said'} (exit code {done.returncode})"
        )


def _is_elsewhere(target: Target) -> bool:
    return bool(target.elsewhere) and importlib.util.find_spec(target.elsewhere) is None
