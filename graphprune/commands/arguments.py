"""Values of command-line options: numbers, fractions, and example inputs described by shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graphprune.errors import RecipeError
from graphprune.pipeline.assignments import pairs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphprune.ir.program import Program


def numbers(texts: list[str] | None, option: str) -> dict[str, float]:
    """Split texts ``NAME=VALUE`` whose values are numbers.

    Raises:
        RecipeError: A text is malformed, a name comes twice, or a value is no number.
    """
    values = {}
    for name, text in pairs(texts, option).items():
        try:
            values[name] = float(text)
        except ValueError:
            raise RecipeError(f"{option} {name}: {text!r} is no number") from None
    return values


def fractions(texts: list[str] | None, option: str) -> tuple[float, ...]:
    """Numbers separated by commas, in one text or several; the option's name is for messages.

    Raises:
        RecipeError: One is no number.
    """
    found = []
    for part in (part for text in texts or [] for part in text.split(",")):
        try:
            found.append(float(part))
        except ValueError:
            raise RecipeError(
                f"{option}: {part!r} is no number; write fractions with commas between, such as 0.5,0.8"
            ) from None
    return tuple(found)


def example_inputs(model: nn.Module | Program, texts: list[str] | None) -> Mapping[str, Tensor] | None:
    """Example inputs from ``--input NAME=SHAPE[:DTYPE]``.

    Returns:
        Tensors on the model's device: normal noise with a fixed seed, or alternating 0 and 1 for integers. None where
        ``texts`` is empty.

    Raises:
        RecipeError: A text is malformed, or the model is a Program, which needs no inputs.
    """
    if not texts:
        return None
    import torch

    from graphprune.ir.program import Program, device_of

    if isinstance(model, Program):
        raise RecipeError("--input: a saved Program is traced already; leave --input out")
    device = device_of(model)
    tensors: dict[str, Tensor] = {}
    for name, text in pairs(texts, "--input").items():
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind or "float32", None)
        parts = sizes.split("x")
        if not isinstance(dtype, torch.dtype) or not all(part.isdecimal() for part in parts):
            raise RecipeError(f"--input {name}={text}: write NAME=SHAPE[:DTYPE], such as x=4x16 or ids=4x8:int64")
        shape = [int(part) for part in parts]
        if dtype.is_floating_point:
            tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        else:
            tensors[name] = (torch.arange(torch.Size(shape).numel()).view(shape) % 2).to(device, dtype)
    return tensors
