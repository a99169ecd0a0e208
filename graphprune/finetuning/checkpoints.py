"""Checkpoints of a run: which is the last whole one, and what stages are finished."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STAGE = "stage.json"


def last_checkpoint(folder: Path, needed: tuple[str, ...] = (), note: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a Trainer; None where there is none.

    A checkpoint that was being written when its process ended is passed over, with a note.

    Args:
        folder: The Trainer's output folder.
        needed: Files that must be there besides the Trainer's own, such as a session's.
        note: Told of what is passed over.
    """
    found = [(int(match[1]), item) for item in _folders(folder) if (match := _CHECKPOINT.fullmatch(item.name))]
    for _, item in sorted(found, reverse=True):
        problem = damage(item, needed)
        if problem is None:
            return item
        note(f"{item} was not written to its end ({problem}); it is passed over")
    return None


def damage(checkpoint: Path, needed: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut off"
    for name in needed:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path.name} is cut off"
    for path in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def finish_stage(folder: Path, record: dict[str, object]) -> None:
    """Write down that a stage is finished, and what it was asked; the last file that it writes."""
    with written(folder / _STAGE) as path:
        path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def finished_stage(folder: Path, asked: dict[str, object]) -> dict[str, object] | None:
    """The record of a finished stage; None where it is not finished.

    Args:
        folder: Of the stage.
        asked: What is asked now, as it was given to ``finish_stage``; metrics are not compared.

    Raises:
        GraphPruneError: It is finished, but was asked something else.
    """
    path = folder / _STAGE
    if not path.is_file():
        return None
    try:
        record: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    for name, value in asked.items():
        if record.get(name) != value:
            raise GraphPruneError(
                f"{folder} holds a finished stage that was asked something else ({name}: {_short(record.get(name))}, now {_short(value)}); "
                f"give another --output_dir, or --overwrite_output_dir to replace it"
            )
    return record


def _folders(folder: Path) -> list[Path]:
    return [item for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
