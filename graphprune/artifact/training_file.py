"""The training log beside a Program or an artifact: ``training.jsonl``, one JSON object a point."""

from __future__ import annotations

from pathlib import Path

from graphprune.errors import VerifyError
from graphprune.ir.training_log import LogPoint, TrainingLog, format_log, parse_log

TRAINING = "training.jsonl"


def write_training(folder: Path, log: TrainingLog) -> None:
    """Write ``training.jsonl`` into a folder; nothing where there was no training."""
    if log:
        (folder / TRAINING).write_text(format_log(log.points), encoding="utf-8")


def read_training(folder: Path) -> tuple[LogPoint, ...]:
    """Points of ``training.jsonl`` in a folder; none where it has no such file.

    Raises:
        VerifyError: The file is damaged.
    """
    path = folder / TRAINING
    if not path.is_file():
        return ()
    try:
        return parse_log(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path} cannot be read: {error}; export or save it again") from None
