"""The weights of a checkpoint in safetensors files, read one at a time and written in place into copies of the files.

A pruned weight has the dtype and shape of the one before, so it takes the same bytes of the file: a copy is patched, and nothing
else of a file is ever in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # the limit of the format's own library
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: Name of the file.
        dtype: Text of the dtype in the file.
        shape: Shape.
        start: First byte in the file.
        size: Bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Read where each tensor of a checkpoint lies: ``model.safetensors``, or the shards of ``model.safetensors.index.json``.

    Raises:
        GraphPruneError: The folder has neither, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        places = _read_index(folder / INDEX)
    elif (folder / SINGLE).is_file():
        places = dict.fromkeys(_read_header(folder / SINGLE), SINGLE)
    else:
        raise GraphPruneError(
            f"{folder} has no {SINGLE} and no {INDEX}; save the model with save_pretrained, which writes safetensors"
        )
    headers = {name: _read_header(folder / name) for name in sorted(set(places.values()))}
    missing = [name for name, file in places.items() if name not in headers[file]]
    if missing:
        raise GraphPruneError(f"{folder / places[missing[0]]} has no tensor {missing[0]}, which the index says it has")
    return {name: headers[file][name] for name, file in places.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraphPruneError(
            f"{path} cannot be read as an index of shards: {type(error).__name__}: {error}"
        ) from error
    for file in found.values():
        if Path(file).name != file or file.startswith("."):
            raise GraphPruneError(f"{path} names the file {file!r}; shards lie beside the index")
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            end = os.fstat(file.fileno()).st_size
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, stop = entry["data_offsets"]
            place = Stored(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, stop - first)
            dtype = DTYPES.get(place.dtype)
            wrong = dtype is not None and torch.Size(place.shape).numel() * dtype.itemsize != place.size
            if wrong or first < 0 or place.size < 0 or place.start + place.size > end:
                raise ValueError(f"{name} does not fit into the file")
            found[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraphPruneError(f"{path} cannot be read as safetensors: {error}") from error
    return found


def read_tensor(folder: Path, name: str, place: Stored) -> Tensor:
    """Read one tensor.

    Raises:
        GraphPruneError: Its dtype is not known, or the file is shorter than it was.
    """
    dtype = DTYPES.get(place.dtype)
    if dtype is None:
        raise GraphPruneError(f"{folder / place.file}: {name} has dtype {place.dtype}; only plain weights can be read")
    value = torch.empty(place.shape, dtype=dtype)
    if place.size:
        with (folder / place.file).open("rb") as file:
            file.seek(place.start)
            if file.readinto(_bytes(value)) != place.size:
                raise GraphPruneError(f"{folder / place.file} is shorter than its header says")
    return value


def patch_tensor(folder: Path, place: Stored, value: Tensor) -> None:
    """Write a tensor over the one that lies there, of the same dtype and shape.

    Raises:
        GraphPruneError: The operating system refuses.
    """
    data = _bytes(value.detach().cpu().contiguous())
    try:
        with (folder / place.file).open("r+b") as file:
            file.seek(place.start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise GraphPruneError(f"cannot write {folder / place.file}: {error.strerror or error}") from error


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    memory: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(memory)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files that are not there yet; each is whole or not there."""
    for name in names:
        if not (target / name).is_file():
            with written(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
