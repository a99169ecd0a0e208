"""Calibration data from a file: texts, or the arrays of a model's inputs."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.oneshot.texts import read_texts, token_batches

_ARRAYS = (".npz", ".safetensors")


def read_batches(
    path: Path, model: str, *, samples: int = 128, length: int = 512, batch: int = 16, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Read batches for passes that need calibration data.

    Args:
        path: Texts, one a line; or ``.npz`` or ``.safetensors`` with one array for each input, by the input's name, and the
            examples along dimension 0. Arrays of float64 are read as float32.
        model: The model as the command line names it; for texts a folder with a config and a tokenizer.
        samples: Examples to draw, without repetition; all where there are fewer. At least 1.
        length: Most tokens of a text, at least 1.
        batch: Most examples in a batch, at least 1.
        seed: Of the draw.

    Returns:
        Inputs by name; drawn examples keep their order, but texts of equal length come together, without padding.

    Raises:
        GraphPruneError: The file cannot be read or holds nothing, its arrays have different numbers of examples, a number is below
            1, or texts are given and the model is no folder with a tokenizer.
    """
    if samples < 1 or batch < 1:
        raise GraphPruneError(f"samples={samples}, batch={batch}: give 1 or more of each")
    if path.suffix.lower() in _ARRAYS:
        return array_batches(_read_arrays(path), samples=samples, batch=batch, seed=seed, name=str(path))
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise GraphPruneError(
            f"{path} is read as texts, which need a tokenizer, and {model} is no folder that could have one; give "
            f"input arrays instead: a .npz or .safetensors file with one array for each input of the model"
        )
    return token_batches(folder, read_texts(path, samples, seed), length, batch)


def array_batches(
    arrays: Mapping[str, Tensor], *, samples: int, batch: int, seed: int = 0, name: str = "data"
) -> list[dict[str, Tensor]]:
    """Cut arrays into batches along dimension 0.

    Args:
        arrays: One for each input, all with the same number of examples.
        samples: Examples to draw, without repetition and in order; all where there are fewer.
        batch: Most examples in a batch.
        seed: Of the draw.
        name: Where they come from, for messages.

    Raises:
        GraphPruneError: There are none, one has no dimension or no example, or their numbers of examples differ.
    """
    if not arrays:
        raise GraphPruneError(f"{name} has no array; write one for each input, by the input's name")
    for key, value in arrays.items():
        if not value.dim() or not len(value):
            raise GraphPruneError(f"{name}: array {key!r} of shape {tuple(value.shape)} has no examples in dimension 0")
    counts = {key: len(value) for key, value in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise GraphPruneError(f"{name}: arrays have different numbers of examples in dimension 0: {listed}")
    count = next(iter(counts.values()))
    places = torch.tensor(sorted(random.Random(seed).sample(range(count), min(samples, count))))
    parts = [places[start : start + batch] for start in range(0, len(places), batch)]
    return [{key: value[part] for key, value in arrays.items()} for part in parts]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix.lower() == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            with np.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise GraphPruneError(f"{path} cannot be read as arrays: {(str(error).splitlines() or [''])[0]}") from error
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in found.items()}
