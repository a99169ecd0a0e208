"""Bring a Program into the form that something else can take, by passes that may find nothing to do."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from graphprune.ir.program import Program
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe


def legalized(program: Program, passes: Sequence[str]) -> Program:
    """A flat copy in eval mode on the CPU, after some passes.

    Args:
        program: Left as it is.
        passes: Their texts, in order; one whose properties the Program lacks, or has already, is left out.
    """
    legal = copy.deepcopy(program).to("cpu")
    legal.eval()
    for step in Recipe.of(["inline-blocks", *passes]).passes:
        if not step.requires & ~legal.properties and not step.establishes & legal.properties:
            legal = PassManager((step,)).run(legal, in_place=True).program
    return legal
