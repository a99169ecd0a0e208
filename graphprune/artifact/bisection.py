"""Find the first operator that a target computes differently: lower ever shorter beginnings of the Program, halving what is left."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.artifact.node_report import absolute_difference
from graphprune.artifact.samples import run_program
from graphprune.errors import LoweringError
from graphprune.ir.origin import origin
from graphprune.ir.program import Program, eliminate_dead
from graphprune.pipeline.remote import opened
from graphprune.pipeline.target import Target

_OUTPUT = "value"


@dataclass(frozen=True)
class Culprit:
    """The first operator whose result differs by more than is allowed.

    Attributes:
        node: Operator, module and source line.
        difference: Largest difference, as a fraction of the result's largest value; infinite where only one side is finite.
        lowerings: How many beginnings were lowered to find it.
    """

    node: str
    difference: float
    lowerings: int

    def __str__(self) -> str:
        return f"the first result that differs is that of {self.node}, by {self.difference:.3g} of its largest value"


def bisect(
    program: Program, target: Target, samples: Sequence[Mapping[str, Tensor]], tolerance: float
) -> Culprit | None:
    """Find the operator at which a lowered Program begins to differ.

    Differences are taken to stay once they have come, so about log2(operators) beginnings are lowered and run.

    Args:
        program: Legalized for the target, flat, in eval mode; it is left as it is.
        target: What it is lowered to; must be able to lower any graph.
        samples: Inputs by name.
        tolerance: Allowed difference, as a fraction of a result's largest value.

    Returns:
        The operator, or None where every beginning that can be lowered agrees.
    """
    names = _candidates(program)
    agrees, differs, found, lowerings = -1, len(names), None, 0
    while differs - agrees > 1:
        middle = (agrees + differs) // 2
        try:
            difference = _difference(_beginning(program, names[middle]), target, samples)
        except LoweringError:  # this value cannot be an output there
            del names[middle]
            differs -= 1
            continue
        lowerings += 1
        if difference > tolerance:
            differs, found = middle, (names[middle], difference)
        else:
            agrees = middle
    if found is None:
        return None
    node = next(item for item in program.graph.nodes if item.name == found[0])
    return Culprit(origin(node), found[1], lowerings)


def _candidates(program: Program) -> list[str]:
    """Names of float results that depend on an input, in the order of the graph."""
    given: set[fx.Node] = set()
    names = []
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(item in given for item in node.all_input_nodes):
            given.add(node)
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                names.append(node.name)
    return names


def _beginning(program: Program, name: str) -> Program:
    """A copy whose only output is the result of one node."""
    cut = copy.deepcopy(program)
    node = next(item for item in cut.graph.nodes if item.name == name)
    cut.output.args = ((node,),)
    cut.interface = replace(cut.interface, output=pytree.tree_flatten({_OUTPUT: 0})[1])
    eliminate_dead(cut.graph)
    unused = frozenset(item.name for item in cut.graph.find_nodes(op="placeholder") if not item.users)
    cut.drop_inputs(unused)
    return cut


@torch.no_grad()
def _difference(program: Program, target: Target, samples: Sequence[Mapping[str, Tensor]]) -> float:
    """Largest difference to what a target computes, as a fraction of the largest value."""
    names = frozenset(program.interface.names)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        lowered = target.lower(program, Path(folder))
        with opened(target, Path(folder)) as run:
            for sample in samples:
                inputs = {name: value for name, value in sample.items() if name in names}
                want = run_program(program, inputs, lowered.outputs)[_OUTPUT]
                have = run({name: value.numpy() for name, value in inputs.items()})[_OUTPUT]
                largest = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
                worst = max(worst, float(absolute_difference(have, want).max(initial=0.0)) / max(largest, 1e-6))
    return worst
