"""``transform``: trace a model where needed, and run a pipeline on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.manager import Instrument, PassManager
from graphprune.pipeline.recipe import Recipe, Step


def transform(
    model: nn.Module | Program,
    passes: Recipe | Step | Sequence[Step] | Path = (),
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    *,
    dynamic_shapes: Mapping[str, object] | None = None,
    labels: bool = False,
    factory: str | None = None,
    in_place: bool = False,
    instruments: Sequence[Instrument] = (),
    reproducer: Path | None = None,
    data: Iterable[object] | None = None,
    **constants: object,
) -> Program:
    """Run passes on a model.

    Args:
        model: A module, which is traced first, or a Program.
        passes: Pass objects, texts such as ``"insert-masks{pattern=4x1,sparsity=0.8}"``, a recipe, or its path.
        example_inputs: As for ``trace``.
        dynamic_shapes: As for ``trace``.
        labels: As for ``trace``.
        factory: As for ``trace``.
        in_place: Work on the model's own parameters rather than on a copy. Saves the copy's memory; passes that fold or
            round weights then change the model.
        instruments: Observers of the pipeline.
        reproducer: Folder for the IR and the rest of the recipe where a pass fails.
        data: Calibration batches for passes that need them, such as ``smooth-quant``: mappings of inputs by name, tuples of
            positional inputs, or single tensors. Each such pass goes through them once.
        **constants: As for ``trace``.

    Returns:
        The transformed Program, in the model's mode. Make optimizers from its parameters, not the model's.

    Raises:
        RecipeError: The recipe is malformed or names something unknown.
        TraceError: The model cannot be traced.
        PassError: A pass cannot run where it stands, needs data that was not given, or failed.
    """
    recipe = Recipe.of(passes)
    manager = PassManager(recipe.passes, tuple(instruments), reproducer, data)
    if isinstance(model, Program):
        program = model
    else:
        program = trace(
            model,
            example_inputs,
            dynamic_shapes,
            labels=labels,
            factory=factory,
            **constants,  # type: ignore[arg-type]
        )
    return manager.run(program, in_place=in_place).program
