"""Run an AOTInductor package by the note beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.pipeline.target import Run
from graphprune.targets.inductor_model.package import check_package, read_note

MODEL = "model.pt2"
NOTE = "model.json"
FORMAT = 1


def note_of(program: Program, outputs: tuple[str, ...], limits: list[list[int | None]]) -> dict[str, object]:
    """What has to be known to run a package.

    Args:
        program: That was compiled.
        outputs: Names of its results.
        limits: Largest sizes of its inputs.
    """
    inputs = [
        {"name": item.name, "dtype": str(item.dtype).removeprefix("torch."), "largest": largest}
        for item, largest in zip(program.interface.inputs, limits, strict=True)
    ]
    return {"format": FORMAT, "inputs": inputs, "outputs": list(outputs)}


def open_package(folder: Path, threads: int | None = None) -> Run:
    """Load ``model.pt2``; threads are set for all of torch in this process.

    Raises:
        LoweringError: It is missing or damaged, or was made for another CPU.
    """
    path = folder / MODEL
    check_package(path)
    note = read_note(folder / NOTE)
    if threads is not None:
        torch.set_num_threads(threads)
    inductor: Any = importlib.import_module("torch._inductor")
    try:
        model = inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise LoweringError(f"{path} cannot be loaded: {error}; lower the Program again") from error
    inputs, outputs = note["inputs"], note["outputs"]

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {item["name"]: _tensor(item, given) for item in inputs}
        with torch.no_grad():
            results = model(**tensors)
        wide = (value.float() if value.is_floating_point() else value for value in results)
        return {name: value.numpy() for name, value in zip(outputs, wide, strict=True)}

    return run


def _tensor(item: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> Tensor:
    """One input as the compiled code takes it, which checks nothing itself.

    Raises:
        LoweringError: It is missing, of another dtype or rank, or too large.
    """
    name, largest = item["name"], item["largest"]
    if name not in given:
        raise LoweringError(f"input {name!r} is missing; give it")
    array = given[name]
    if str(array.dtype) != item["dtype"] or array.ndim != len(largest):
        raise LoweringError(
            f"input {name!r} is {array.dtype} with {array.ndim} dimensions, and {MODEL} takes {item['dtype']} with "
            f"{len(largest)}; convert it"
        )
    for dim, (size, limit) in enumerate(zip(array.shape, largest, strict=True)):
        if limit is not None and size > limit:
            raise LoweringError(f"input {name!r} has size {size} in dimension {dim}, and {MODEL} takes at most {limit}")
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
