"""Fingerprints of what a teacher's outputs depend on: the teacher, the data and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.artifact.files import PROGRAM, sha256
from graphprune.errors import GraphPruneError
from graphprune.ir.interface import is_label
from graphprune.ir.program import Program
from graphprune.training.teacher_checks import PROBE, Tokenizer
from graphprune.training.teaching import ROW

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache")
_CHUNK = 1024


def of_teacher(teacher: nn.Module | str | Path) -> tuple[str, dict[str, Any]]:
    """Fingerprint of config and weights, and the config.

    Args:
        teacher: A model; or a folder or hub id, whose files are read and which is not loaded. A hub id stands for the commit that
            is, or would be, loaded.

    Raises:
        GraphPruneError: The folder holds no weights, or the hub id is not known here.
    """
    if isinstance(teacher, nn.Module):
        return _of_module(teacher)
    folder = Path(teacher)
    if not folder.is_dir():
        return _of_hub(str(teacher))
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    files += [folder / name for name in ("config.json", PROGRAM) if (folder / name).is_file()]
    if len(files) < 2:
        raise GraphPruneError(
            f"{folder} is no teacher: it needs config.json and weights; give the folder of a saved model"
        )
    config = folder / "config.json"
    read = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return _digest([f"{path.name} {sha256(path)}" for path in files]), read


def of_tokenizer(tokenizer: Tokenizer | None) -> str:
    """Fingerprint of a vocabulary and of how a text is split; empty for None."""
    if tokenizer is None:
        return ""
    return _digest([json.dumps(sorted(tokenizer.get_vocab().items())), json.dumps(tokenizer.encode(PROBE))])


def input_columns(data: Any, tokenizer: Tokenizer | None = None) -> tuple[str, ...]:
    """Columns of a data set that a model takes: the tokenizer's, or all numeric ones but labels.

    Raises:
        GraphPruneError: The data set is empty or has no such column.
    """
    if not len(data):
        raise GraphPruneError("the data set is empty; a teacher has nothing to say about it")
    first: Mapping[str, Any] = data[0]
    known: Iterable[str] = getattr(tokenizer, "model_input_names", None) or [
        name for name, value in first.items() if not is_label(name) and name != ROW and _numeric(value)
    ]
    columns = tuple(name for name in known if name in first)
    if not columns:
        raise GraphPruneError(
            f"the data set has columns {', '.join(first)} and none that a model takes; tokenize it first"
        )
    return columns


def of_data(data: Any, columns: Sequence[str]) -> str:
    """Fingerprint of the contents of some columns, in the order of the rows.

    Args:
        data: A ``datasets.Dataset``, or a sequence of mappings.
        columns: Numbers, lists of numbers, arrays or tensors.
    """
    digest = hashlib.sha256()
    arrow = hasattr(data, "with_format")
    source = data.with_format("arrow") if arrow else data
    for start in range(0, len(data), _CHUNK):
        if arrow:
            table = source[start : min(start + _CHUNK, len(data))]
            values = {name: table.column(name).to_numpy(zero_copy_only=False) for name in columns}
        else:
            rows = [source[index] for index in range(start, min(start + _CHUNK, len(data)))]
            values = {name: [row[name] for row in rows] for name in columns}
        for name in columns:
            digest.update(name.encode())
            for value in values[name]:
                item = _array(value)
                digest.update(f"{item.dtype.kind}{item.shape}".encode())
                digest.update(item.tobytes())
    return digest.hexdigest()


def key_of(parts: Mapping[str, str]) -> str:
    """A short name of everything together."""
    return _digest([json.dumps(dict(sorted(parts.items())))])[:24]


def _array(value: Any) -> np.ndarray[Any, Any]:
    item = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if item.dtype == object:  # nested lists of Arrow
        item = np.asarray(item.tolist())
    kind = item.dtype.kind
    return np.ascontiguousarray(item, dtype=np.int64 if kind in "biu" else np.float64 if kind == "f" else None)


def _numeric(value: object) -> bool:
    if isinstance(value, (bool, int, float, torch.Tensor, np.ndarray)):
        return True
    return isinstance(value, Sequence) and not isinstance(value, str) and (not value or _numeric(value[0]))


def _of_module(teacher: nn.Module) -> tuple[str, dict[str, Any]]:
    config = getattr(teacher, "config", None)
    read: dict[str, Any] = {} if config is None else json.loads(json.dumps(config.to_dict(), default=str))
    stable = {name: value for name, value in read.items() if name not in _VOLATILE}
    parts = [type(teacher).__name__, json.dumps(stable, sort_keys=True)]
    if isinstance(teacher, Program):
        parts.append(str(teacher))
    for name, value in sorted(teacher.state_dict().items()):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts.append(f"{name} {value.dtype} {tuple(value.shape)} {hashlib.sha256(raw.tobytes()).hexdigest()}")
    return _digest(parts), read


def _of_hub(name: str) -> tuple[str, dict[str, Any]]:
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise GraphPruneError(
            f"teacher {name} is no folder, and no model of the hub that is known here: {error}"
        ) from error
    path = Path(str(config))  # .../snapshots/<commit>/config.json
    return _digest([name, path.parent.name, sha256(path)]), json.loads(path.read_text(encoding="utf-8"))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()
