"""Sample inputs and the outputs that the Program gives for them; they lie in the artifact, so that it verifies itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphprune.errors import VerifyError
from graphprune.ir.program import Program

SAMPLES = "samples.safetensors"
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
    """Write samples as ``<index>.input.<name>`` and ``<index>.output.<name>``."""
    arrays: Arrays = {}
    for index, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        arrays |= {f"{index}.input.{name}": np.ascontiguousarray(value.numpy()) for name, value in given.items()}
        arrays |= {f"{index}.output.{name}": np.ascontiguousarray(value) for name, value in expected.items()}
    safetensors.numpy.save_file(arrays, folder / SAMPLES)


def read_samples(folder: Path) -> list[tuple[Arrays, Arrays]]:
    """Read ``(inputs, expected outputs)`` of every sample.

    Raises:
        VerifyError: The file is missing or damaged.
    """
    try:
        arrays = safetensors.numpy.load_file(folder / SAMPLES)
    except (OSError, safetensors.SafetensorError) as error:
        raise VerifyError(f"{folder / SAMPLES} cannot be read: {error}") from None
    samples: dict[int, tuple[Arrays, Arrays]] = {}
    for key, value in arrays.items():
        index, kind, name = key.split(".", 2)
        samples.setdefault(int(index), ({}, {}))[0 if kind == "input" else 1][name] = value
    return [samples[index] for index in sorted(samples)]
