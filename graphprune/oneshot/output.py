"""The folder that a checkpoint is pruned into: begun, gone on with, and finished."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.oneshot.progress import FOLDER, Progress, load_progress, save_progress
from graphprune.oneshot.shards import INDEX, Stored, copy_files

_WEIGHT_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".ckpt",
    ".index.json",
)


def begin(source: Path, target: Path, request: str) -> Progress:
    """Look at what is in the folder, and begin or go on.

    Returns:
        The state that a killed run of the same request left, or a new one, which is saved.

    Raises:
        GraphPruneError: The folder holds something else.
    """
    if target.exists() and (not target.is_dir() or target.resolve() == source.resolve()):
        raise GraphPruneError(
            f"{target} is {'the checkpoint itself' if target.is_dir() else 'a file'}; choose another folder"
        )
    work = target / FOLDER
    state = load_progress(work)
    if state is not None:
        if state.request != request:
            raise GraphPruneError(
                f"{target} holds the progress of another request (recipe, data, dtype or checkpoint differ); repeat that one, or "
                f"remove the folder"
            )
        return state
    if target.is_dir() and any(item.name != FOLDER for item in target.iterdir()):
        raise GraphPruneError(f"{target} holds files already; choose an empty folder")
    state = Progress(request)
    save_progress(work, state, None)
    return state


def finish(source: Path, target: Path, index: Mapping[str, Stored]) -> None:
    """Move pruned shards into place, copy everything that is no weight, and remove the progress; can be repeated after a kill."""
    work = target / FOLDER
    others = [
        item.name
        for item in source.iterdir()
        if item.is_file() and not item.name.startswith(".") and not item.name.endswith(_WEIGHT_FILES)
    ]
    if (source / INDEX).is_file():
        others.append(INDEX)
    for name in sorted({place.file for place in index.values()} | set(others)):
        if not (target / name).is_file():
            copy_files(source, work, [name])
            (work / name).replace(target / name)
    shutil.rmtree(work)
