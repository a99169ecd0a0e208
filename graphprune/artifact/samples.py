"""Sample inputs and the outputs that the Program gives for them; they lie in the artifact, so that it verifies itself."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphprune.errors import VerifyError
from graphprune.ir.program import Program

INPUTS, OUTPUTS = "sample-inputs", "sample-outputs"
"""Folders of an artifact: ``inp_0001.npz`` and on, and ``out_0001.npz`` and on, arrays by name."""
_SIZES = ({0: 2, 1: 16}, {0: 3, 1: 7})  # batch and sequence of each sample, where they are dynamic

Arrays = dict[str, np.ndarray]


def make_inputs(
    program: Program, seed: int = 0, sizes: Sequence[Mapping[int, int]] = _SIZES
) -> list[dict[str, Tensor]]:
    """Random inputs, of two different sizes unless told otherwise.

    Args:
        program: Whose inputs.
        seed: Of the random numbers.
        sizes: For each sample, the size of each dimension where it is dynamic.

    Returns:
        One mapping a sample: ids in the vocabulary, masks with padding at the end, normally distributed floats.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(program, "config", None)
    vocabulary = int(getattr(config, "vocab_size", None) or 8)
    samples = []
    for chosen in sizes:
        sample: dict[str, Tensor] = {}
        for item in program.interface.inputs:
            shape = [size if isinstance(size, int) else chosen.get(dim, 5) for dim, size in enumerate(item.shape)]
            if item.dtype.is_floating_point:
                sample[item.name] = torch.randn(shape, generator=generator).to(item.dtype)
            elif "mask" in item.name:
                sample[item.name] = torch.ones(shape, dtype=item.dtype)
                sample[item.name][-1, shape[-1] // 2 :] = 0
            elif item.name.endswith("_ids") and "type" not in item.name and "position" not in item.name:
                sample[item.name] = torch.randint(0, vocabulary, shape, generator=generator).to(item.dtype)
            else:
                sample[item.name] = torch.zeros(shape, dtype=item.dtype)
        samples.append(sample)
    return samples


@torch.no_grad()
def run_program(program: Program, inputs: Mapping[str, Tensor], names: Sequence[str]) -> Arrays:
    """Outputs of a Program by name, None left out."""
    leaves = [leaf for leaf in pytree.tree_leaves(program(**inputs)) if isinstance(leaf, Tensor)]
    if len(leaves) != len(names):
        raise VerifyError(f"the Program has {len(leaves)} outputs and the lowered model {len(names)}")
    return {
        name: leaf.float().numpy() if leaf.is_floating_point() else leaf.numpy()
        for name, leaf in zip(names, leaves, strict=True)
    }


def write_samples(folder: Path, inputs: Sequence[Mapping[str, Tensor]], outputs: Sequence[Arrays]) -> None:
    """Write samples as npz files that ``numpy.load`` reads: one of inputs and one of outputs each."""
    for name in (INPUTS, OUTPUTS):
        (folder / name).mkdir()
    for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True), 1):
        np.savez(
            folder / INPUTS / f"inp_{number:04}.npz",
            allow_pickle=False,
            **{name: value.numpy() for name, value in given.items()},
        )
        np.savez(folder / OUTPUTS / f"out_{number:04}.npz", allow_pickle=False, **expected)


def read_samples(folder: Path) -> list[tuple[Arrays, Arrays]]:
    """Read ``(inputs, expected outputs)`` of every sample.

    Raises:
        VerifyError: A file is missing or damaged.
    """
    samples = [
        (_read(path), _read(folder / OUTPUTS / path.name.replace("inp_", "out_")))
        for path in sorted((folder / INPUTS).glob("inp_*.npz"))
    ]
    if not samples:
        raise VerifyError(f"{folder / INPUTS} holds no samples; export the artifact again")
    return samples


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise VerifyError(f"{path} cannot be read: {error}") from None
