"""Inputs for a comparison of artifacts: sizes that all of them take, and values that are valid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphprune.artifact.contenders import Entry
from graphprune.artifact.manifest import InputEntry
from graphprune.artifact.samples import Arrays
from graphprune.errors import GraphPruneError, VerifyError

BATCH, LENGTH = 1, 128
"""Sizes of free dimensions that are not asked for."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of inputs.

    Attributes:
        batch: Examples in a call.
        length: Size of the dimensions that are free and not the batch; None where there are none.
        shapes: Shape of each input by name.
    """

    batch: int
    length: int | None
    shapes: Mapping[str, tuple[int, ...]]


def common_sizes(entries: Sequence[Entry], batch: int | None = None, length: int | None = None) -> Sizes:
    """Sizes of the inputs that all artifacts take.

    Args:
        entries: The artifacts.
        batch: Size of free first dimensions; None takes the one that an artifact is fixed to, else 1.
        length: Size of other free dimensions; None takes 128, or as many as the model has positions.

    Raises:
        GraphPruneError: A size is fixed to another one, or is more than the model has positions for; or two artifacts take
            different inputs.
    """
    first = entries[0]
    free = any(_has_length(entry.manifest.inputs) for entry in entries)
    if batch is None:
        fixed = (item.shape[0] for entry in entries for item in entry.manifest.inputs if item.shape)
        batch = next((size for size in fixed if isinstance(size, int)), BATCH)
    if length is None and free:
        length = min([LENGTH, *(_positions(entry.folder) or LENGTH for entry in entries)])
    wanted = _shapes(first, batch, length)
    types = {item.name: item.dtype for item in first.manifest.inputs}
    for other in entries[1:]:
        found = _shapes(other, batch, length)
        dtypes = {item.name: item.dtype for item in other.manifest.inputs}
        if (found, dtypes) != (wanted, types):
            mine, theirs = (_signature(*item) for item in ((wanted, types), (found, dtypes)))
            raise GraphPruneError(
                f"{first.folder} takes {mine} and {other.folder} takes {theirs}; only artifacts that take the same inputs can be "
                f"compared"
            )
    return Sizes(batch, length if free else None, wanted)


def _signature(sizes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {types[name]}{list(size)}" for name, size in sizes.items())


def _shapes(entry: Entry, batch: int, length: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of an artifact; ``length`` is None only where no dimension but the batch is free."""
    inputs = entry.manifest.inputs
    for item in inputs:
        if item.shape and isinstance(item.shape[0], int) and item.shape[0] != batch:
            raise GraphPruneError(
                f"{entry.folder}: input {item.name} is fixed to batch {item.shape[0]}, so it does not run with batch {batch}; trace "
                f"the model with a free batch, or benchmark with batch {item.shape[0]}"
            )
    positions = _positions(entry.folder)
    if _has_length(inputs):
        if length is not None and positions is not None and positions < length:
            raise GraphPruneError(
                f"{entry.folder}: the model has {positions} positions, so it does not run with length {length}"
            )
    elif length is not None and not any(len(item.shape) > 1 and item.shape[1] == length for item in inputs):
        fixed = ", ".join(f"{item.name} {list(item.shape)}" for item in inputs)
        raise GraphPruneError(
            f"{entry.folder} does not run with length {length}: besides the batch its inputs have fixed sizes ({fixed}); leave the "
            f"length out, or trace the model with a free one"
        )
    first = _batch_names(inputs)
    sizes = {True: batch, False: LENGTH if length is None else length}
    return {
        item.name: tuple(size if isinstance(size, int) else sizes[size in first] for size in item.shape)
        for item in inputs
    }


def _batch_names(inputs: Sequence[InputEntry]) -> set[str]:
    """Names of free dimensions that are the batch."""
    return {item.shape[0] for item in inputs if item.shape and isinstance(item.shape[0], str)}


def _has_length(inputs: Sequence[InputEntry]) -> bool:
    """Whether a dimension other than the batch is free."""
    first = _batch_names(inputs)
    return any(isinstance(size, str) and size not in first for item in inputs for size in item.shape)


def _positions(folder: Path) -> int | None:
    """How many positions the model has, as its ``config.json`` says; None where it does not."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return None
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions")) if isinstance(config, dict) else ()
    return next((item for item in found if isinstance(item, int) and item > 0), None)


def fill(sizes: Mapping[str, tuple[int, ...]], sample: Arrays, seed: int = 0) -> Arrays:
    """Values for inputs of given shapes.

    Args:
        sizes: Shapes by name.
        sample: Inputs of another size, whose values are valid.
        seed: Of floats.

    Returns:
        Masks of ones, so that nothing is padding; normally distributed floats; other integers and bools repeat the sample's.

    Raises:
        VerifyError: The sample lacks an input.
    """
    generator = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, shape in sizes.items():
        if name not in sample or not sample[name].size:
            raise VerifyError(f"the samples of the artifact hold no input {name}; export it again")
        dtype = sample[name].dtype
        if np.issubdtype(dtype, np.floating):
            arrays[name] = generator.standard_normal(shape).astype(dtype)
        elif "mask" in name:
            arrays[name] = np.ones(shape, dtype=dtype)
        else:
            arrays[name] = np.resize(sample[name], shape)
    return arrays
