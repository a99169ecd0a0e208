"""What a run leaves: a checkpoint of the model's own class, the Program, the recipe, and an artifact; and whether it loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.artifact.checkpoint import load_program, save_program
from graphprune.artifact.verification import verify
from graphprune.errors import VerifyError
from graphprune.ir.program import Program, device_of
from graphprune.ir.properties import Property
from graphprune.ir.sites import find_sites
from graphprune.ir.source_model import source_model
from graphprune.pipeline.legalize import legalized

PROGRAM = "program"
_PLAIN = ("fold-masks", "freeze-quant", "remove-quant")
_CLOSE = 1e-5
"""Difference that reloading may make, as a fraction of the largest output: none is expected, but threads add in any order."""


def save_outputs(program: Program, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` loads, with its tokenizer, and the Program in a folder of its own.

    Pruned weights are zero in the checkpoint and quantized ones on their grid; quantized activations are in the Program only.
    """
    plain = source_model(legalized(program, _PLAIN))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        saving: Any = plain
        saving.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for item in sorted(Path(name).iterdir()):
            shutil.move(item, folder / item.name)  # within one file system: renamed
    save_program(program, folder / PROGRAM)


def sparsity_of_weights(program: Program) -> float:
    """Fraction of zeros in the weights that can be pruned, the head included, once masks are folded."""
    plain = legalized(program, _PLAIN[:1])
    sites, _ = find_sites(plain)
    weights = [plain.tensor(site.name) for site in sites]
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))


def verify_loading(
    program: Program,
    model_class: Any,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    artifact: Path | None = None,
) -> list[str]:
    """Load what was written and compare all of its outputs with those of the Program in memory.

    Args:
        program: What was trained.
        model_class: Class whose ``from_pretrained`` loads the checkpoint.
        folder: Where ``save_outputs`` wrote.
        batches: Inputs by name.
        artifact: An artifact, which is verified from its files.

    Returns:
        What was compared, a line each.

    Raises:
        VerifyError: An output differs, or one is missing; says which, where and by how much.
    """
    examples = list(batches)
    expected = [_outputs(program, batch) for batch in examples]
    lines = [_compare(load_program(folder / PROGRAM), expected, examples, folder / PROGRAM)]
    if program.properties & Property.FAKE_QUANT:
        lines.append(f"{folder}: activations are float in a plain checkpoint, so its outputs are not compared")
    else:
        lines.append(_compare(model_class.from_pretrained(folder).eval(), expected, examples, folder))
    if artifact is not None:
        result = verify(artifact)
        if not result.passed:
            raise VerifyError(
                f"{artifact} does not compute what the Program computes; see graphprune verify {artifact}"
            )
        lines.append(f"{artifact}: verified")
    return lines


def _compare(
    loaded: nn.Module, expected: list[dict[str, Tensor]], examples: list[Mapping[str, Tensor]], folder: Path
) -> str:
    worst = 0.0
    for number, (batch, wanted) in enumerate(zip(examples, expected, strict=True)):
        found = _outputs(loaded, batch)
        for name, value in wanted.items():
            if name not in found:
                raise VerifyError(f"{folder}: what was loaded has no output {name}")
            scale = max(1.0, float(value.abs().max()))
            difference = float((found[name] - value).abs().max()) / scale
            if not difference <= _CLOSE:
                raise VerifyError(
                    f"{folder}: output {name} of what was loaded differs by {difference:.3g} of its largest value, in batch {number}; "
                    f"allowed are {_CLOSE:g}. The files are not what was trained"
                )
            worst = max(worst, difference)
    return f"{folder}: loaded, all outputs of {len(examples)} batches within {worst:.2g}"


@torch.no_grad()
def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    training, device = model.training, device_of(model)
    model.eval()
    try:
        result = model(**{name: value.to(device) for name, value in batch.items()})
    finally:
        model.train(training)
    return {name: value.float().cpu() for name, value in result.items() if isinstance(value, Tensor)}
