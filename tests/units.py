"""Checks of groups of units: what pruning heads and neurons does to a model's output."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.ir.groups import UnitGroup, find_heads, find_neurons
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.sparsity.layout import to_logical
from tests.traced import assert_same, run, tensors


def groups_of(program: Program) -> tuple[UnitGroup, ...]:
    return find_heads(program)[0] + find_neurons(program)[0]


@torch.no_grad()
def without(program: Program, group: UnitGroup, units: list[int], inputs: dict[str, Tensor], rest: str) -> object:
    """Output where units contribute nothing: columns are zero; rows are kept, zeroed, or random with their bias."""
    sites = {site.name: site for site in find_sites(program)[0]}
    values = dict(program.named_parameters())
    saved = {name: value.detach().clone() for name, value in values.items()}
    for member in group.members:
        matrix = to_logical(values[member.site], sites[member.site].layout)
        bias = values.get(member.site.removesuffix("weight") + "bias")
        for unit in units:
            first = member.start + unit * member.width
            part = matrix.narrow(member.axis, first, member.width)
            if member.axis == 1 or rest == "zero":
                part.zero_()
            elif rest == "random":
                part.copy_(torch.randn_like(part))
                if bias is not None:
                    bias[first : first + member.width] = torch.randn(member.width)
    output = run(program, inputs)
    for name, value in values.items():
        value.copy_(saved[name])
    return output


def check(program: Program, inputs: dict[str, Tensor], groups: tuple[UnitGroup, ...]) -> None:
    """Pruning units removes what they contribute and nothing else, and their rows reach nothing but their columns."""
    full = tensors(run(program, inputs))
    for group in groups:
        assert group.count > 1
        assert [member.axis for member in group.members] == [0] * (len(group.members) - 1) + [1]
        for units in ([0], [group.count - 1], list(range(1, group.count, 2))):
            gone = without(program, group, units, inputs, "keep")
            assert_same(gone, without(program, group, units, inputs, "zero"), 1e-6)
            assert_same(gone, without(program, group, units, inputs, "random"), 1e-6)
        assert any(not torch.equal(one, other) for one, other in zip(full, tensors(gone), strict=True))


def check_cover(program: Program, groups: tuple[UnitGroup, ...]) -> None:
    """The units of a weight are all of its rows, or all of its columns."""
    sites = {site.name: site for site in find_sites(program)[0]}
    covered: dict[tuple[str, int], int] = {}
    for group in groups:
        for member in group.members:
            covered[member.site, member.axis] = covered.get((member.site, member.axis), 0) + group.count * member.width
    for (name, axis), size in covered.items():
        assert size == sites[name].shape[axis]


def outline(groups: tuple[UnitGroup, ...]) -> list[tuple[str, int, list[tuple[str, int, int, int]]]]:
    return [
        (group.name, group.count, [(m.site.removesuffix(".weight"), m.axis, m.start, m.width) for m in group.members])
        for group in groups
    ]
