"""One file of a teacher's cache: the outputs of some consecutive rows, without padding, in Arrow's file format.

The file's name holds a hash of its content, so that a file that was cut off or changed is known from itself alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graphprune.artifact.files import sha256, written
from graphprune.errors import GraphPruneError

Precision = Literal["float32", "float16"]
_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.arrow")
_META = b"graphprune"


@dataclass(frozen=True)
class OutputKind:
    """How rows of one output look.

    Attributes:
        by_token: Whether there is an entry a token, as in token classification and in the start and end logits of questions.
        columns: Numbers an entry; 0 where the entry is one number without a dimension of its own.
    """

    by_token: bool
    columns: int


def kind_of(name: str, value: Tensor) -> OutputKind:
    """What a batch of an output says about its rows: ``[rows, classes]``, ``[rows, tokens, classes]`` or ``[rows, tokens]``."""
    if name != "logits":
        return OutputKind(True, 0)
    return OutputKind(value.dim() == 3, int(value.shape[-1]))


def arrow() -> Any:
    """The module ``pyarrow``.

    Raises:
        GraphPruneError: It is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise GraphPruneError('a teacher\'s cache needs pyarrow; run: pip install "graphprune[train]"') from error
    return pyarrow


def write_shard(
    folder: Path,
    number: int,
    rows: Mapping[str, Sequence[np.ndarray[Any, Any]]],
    kinds: Mapping[str, OutputKind],
    precision: Precision,
) -> Path:
    """Write one file, whole or not at all.

    Args:
        folder: Of the cache.
        number: Of the file, from 0.
        rows: For each output, one flat array a row.
        kinds: For each output, how to read it.
        precision: Of the stored numbers.
    """
    pa = arrow()
    element = pa.float16() if precision == "float16" else pa.float32()
    columns = []
    for values in rows.values():
        offsets = np.cumsum([0, *(len(item) for item in values)], dtype=np.int64)
        flat = np.concatenate(list(values)).astype(precision)
        columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=element)))
    described = {name: [kind.by_token, kind.columns] for name, kind in kinds.items()}
    schema = pa.schema(
        [(name, pa.large_list(element)) for name in rows], metadata={_META: json.dumps(described).encode()}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    content = sink.getvalue().to_pybytes()
    path = folder / f"{number:05d}-{hashlib.sha256(content).hexdigest()[:16]}.arrow"
    with written(path) as temporary:
        temporary.write_bytes(content)
    return path


def find_shards(folder: Path, count: int) -> dict[int, Path]:
    """The whole files of a folder by their numbers below ``count``; a file with another hash than its name says is left out."""
    found = {}
    for path in sorted(folder.glob("*.arrow")):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) < count and sha256(path).startswith(match[2]):
            found[int(match[1])] = path
    return found


class Shard:
    """A file that is read, mapped into memory.

    Args:
        path: Of a whole file.
    """

    def __init__(self, path: Path) -> None:
        pa = arrow()
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        described = json.loads(table.schema.metadata[_META])
        self.kinds = {name: OutputKind(bool(kind[0]), int(kind[1])) for name, kind in described.items()}
        self.rows: int = table.num_rows
        self._values: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
        for name in self.kinds:
            column = table.column(name).chunk(0)
            self._values[name] = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)

    def row(self, name: str, index: int) -> np.ndarray[Any, Any]:
        """One row of an output, flat, in its stored precision."""
        offsets, values = self._values[name]
        return values[offsets[index] : offsets[index + 1]]


def unpadded(value: Tensor, kind: OutputKind, mask: Tensor | None) -> list[np.ndarray[Any, Any]]:
    """The rows of a batch's output as flat arrays, without what padding got.

    Args:
        value: ``[rows, ...]``.
        kind: Of the output.
        mask: Bool ``[rows, tokens]``, True = a real token; None = all are.
    """
    full = value.detach().float().cpu()
    if not kind.by_token or mask is None:
        return [row.reshape(-1).numpy() for row in full]
    return [row[real].reshape(-1).numpy() for row, real in zip(full, mask.cpu(), strict=True)]


def padded(
    rows: Sequence[np.ndarray[Any, Any]], kind: OutputKind, mask: Tensor | None, numbers: Sequence[int], name: str
) -> Tensor:
    """The inverse of ``unpadded``: float32 ``[rows, ...]``, 0 where padding is.

    Raises:
        GraphPruneError: A row has other tokens than when the teacher saw it.
    """
    flat = torch.from_numpy(np.concatenate(list(rows)).astype(np.float32))
    width = max(kind.columns, 1)
    tail = [] if kind.columns == 0 else [kind.columns]
    if not kind.by_token:
        return flat.reshape(len(rows), *tail)
    held = [len(row) // width for row in rows]
    real = torch.ones(len(rows), max(held), dtype=torch.bool) if mask is None else mask.cpu()
    for number, own, wanted in zip(numbers, held, real.sum(1).tolist(), strict=True):
        if own != wanted:
            raise GraphPruneError(
                f"row {number}: the teacher's cache holds {name} of {own} tokens, and the batch has {wanted}; the rows are numbered "
                f"otherwise than when the cache was made, or a collator cuts them; make the cache from this data set"
            )
    result = torch.zeros(*real.shape, *tail)
    result[real] = flat.reshape(-1, *tail)
    return result
