"""Configurations of other tools that flags name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from graphprune.errors import RecipeError
from graphprune.finetuning.arguments import CompressionArguments
from graphprune.importing import Imported, import_recipe
from graphprune.pipeline.recipe import Recipe


def configuration(path: str) -> Recipe:
    """The recipe that a configuration says; a folder holds exactly one.

    Raises:
        RecipeError: It cannot be read, or a folder holds none or several.
    """
    return _imported(path).recipe


def left_out(told: CompressionArguments) -> Iterator[str]:
    """What configurations say that their recipes do not, a line each."""
    for path in (told.pruning_config, told.quantization_config, told.distillation_config):
        if path is not None:
            for entry in _imported(path).not_carried:
                yield f"{path}, line {entry.line}: {entry.key} is left out: {entry.reason}"


@functools.cache
def _imported(path: str) -> Imported:
    place = Path(path)
    if place.is_dir():
        found = sorted(item for item in place.iterdir() if item.suffix in (".yml", ".yaml", ".json"))
        if len(found) != 1:
            raise RecipeError(f"{path} holds {len(found)} configurations; name the file")
        place = found[0]
    return import_recipe(place)
