"""The log of a session: one JSON object a step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from graphprune.artifact.files import written


@dataclass(frozen=True)
class StepLog:
    """A file of JSON lines, appended to."""

    path: Path

    def write(self, step: int, sparsity: float, loss: float | Tensor | None) -> None:
        """Append a step; a loss that is not finite is written as null."""
        value = None if loss is None else float(loss)
        entry = {
            "step": step,
            "sparsity": round(sparsity, 6),
            "loss": value if value is None or math.isfinite(value) else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def trim(self, step: int) -> None:
        """Take out what a killed run wrote after the state that is resumed now, at step ``step``."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        with written(self.path) as path:
            path.write_text("".join(lines[:step]), encoding="utf-8")
