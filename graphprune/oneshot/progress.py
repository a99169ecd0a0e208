"""The state of a walk on disk, so that it goes on after a kill and ends with the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError
from graphprune.oneshot.walk import Live, Walker
from graphprune.oneshot.weights import Meter

FOLDER = ".graphprune-progress"
_FILE = "progress.json"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        request: What was asked for, as a hash; another request cannot go on.
        stops: Stops of the walk that were carried out.
        tokens: Rows of input that each pruned site saw, by name; 0 where it needed none.
        live: Values that the rest of the walk needs, encoded; None before the first stop.
        file: Name of the file with their tensors.
        peak: Most bytes counted so far.
    """

    request: str
    stops: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    live: list[dict[str, object]] | None = None
    file: str = ""
    peak: int = 0


def load_progress(folder: Path) -> Progress | None:
    """Read what was saved; None where nothing was.

    Raises:
        GraphPruneError: The file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GraphPruneError(f"{path} cannot be read: {error}; remove {folder} to begin again") from error


def save_progress(folder: Path, progress: Progress, live: list[Live] | None) -> None:
    """Write the state: first the values, then, as one step, the file that names them."""
    old = progress.file
    if live is not None:
        tensors: dict[str, Tensor] = {}
        progress.live = [{node.name: encode(value, tensors) for node, value in values.items()} for values in live]
        progress.file = f"live-{progress.stops}.safetensors"
        with written(folder / progress.file) as path:
            save_file(tensors, path)
    with written(folder / _FILE) as path:
        path.write_text(json.dumps(progress.__dict__), encoding="utf-8")
    if live is not None and old and old != progress.file:
        (folder / old).unlink(missing_ok=True)


def load_live(folder: Path, progress: Progress, nodes: Mapping[str, fx.Node], device: torch.device) -> list[Live]:
    """Read the values of all batches.

    Raises:
        GraphPruneError: They are damaged.
    """
    try:
        tensors = load_file(folder / progress.file)
        return [
            {nodes[name]: decode(value, tensors, device) for name, value in values.items()}
            for values in progress.live or ()
        ]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise GraphPruneError(
            f"{folder / progress.file} cannot be read: {error}; remove {folder} to begin again"
        ) from error


def encode(value: object, tensors: dict[str, Tensor]) -> object:
    """Write a value as JSON; tensors are put aside under a number, with the strides that operators see.

    Args:
        value: A tensor, a number, None, or a tuple or list of such.
        tensors: Receives contiguous tensors; mutated.

    Raises:
        GraphPruneError: Another kind of value.
    """
    if isinstance(value, Tensor):
        key = str(len(tensors))
        size, stride = list(value.shape), list(value.stride())
        for dim, (length, step) in enumerate(zip(size, stride, strict=True)):
            if step == 0 and length:
                value = value.narrow(dim, 0, 1)  # a repeated dimension is stored once
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key, "size": size, "stride": stride}
    if isinstance(value, (tuple, list)):
        return [encode(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise GraphPruneError(
        f"a value of type {type(value).__name__} in the graph cannot be saved; prune the model in memory"
    )


def decode(value: object, tensors: Mapping[str, Tensor], device: torch.device) -> object:
    """The inverse of ``encode``: equal values with equal strides."""
    if isinstance(value, dict):
        stored = tensors[value["tensor"]].to(device)
        result = torch.empty_strided(tuple(stored.shape), tuple(value["stride"]), dtype=stored.dtype, device=device)
        return result.copy_(stored).expand(tuple(value["size"]))
    if isinstance(value, list):
        return [decode(item, tensors, device) for item in value]
    return value


class Keeper:
    """Keeps the state of a run, and saves it when it is time to.

    Args:
        work: Folder to save in.
        state: Mutated.
        meter: Where the peak of memory is read.
        seconds: Least time between two saves.
    """

    def __init__(self, work: Path, state: Progress, meter: Meter, seconds: float) -> None:
        self.work, self.state, self.meter, self.seconds = work, state, meter, seconds
        self._saved = time.monotonic()

    def step(self, tokens: Mapping[str, int], walker: Walker | None = None) -> None:
        """Take note of sites that were pruned, and of the walk that pruned them."""
        self.state.tokens.update(tokens)
        self.state.peak = max(self.state.peak, self.meter.peak)
        if walker is not None:
            self.state.stops = walker.done
        if time.monotonic() - self._saved >= self.seconds:
            save_progress(self.work, self.state, None if walker is None else walker.live)
            self._saved = time.monotonic()

    def end(self, stops: int) -> None:
        """Save that everything is pruned, so that nothing is needed but to move files."""
        self.state.stops = stops
        save_progress(self.work, self.state, [])
