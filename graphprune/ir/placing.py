"""Where a rule's masks go: which sites its pattern fits, with which share each, and the mask operators themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphprune.errors import SparsityError
from graphprune.ir import ops
from graphprune.ir.groups import find_heads, find_neurons
from graphprune.ir.masking import Masking
from graphprune.ir.program import Program, attributes
from graphprune.ir.selection import matching
from graphprune.ir.sites import Site
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.distribution import erdos_renyi
from graphprune.sparsity.pattern_base import Pattern


@dataclass(frozen=True)
class Placement:
    """A site that gets a mask.

    Attributes:
        site: The site.
        pattern: Its sparsity pattern.
        coupling: Name of the block whose sites lose their units together; empty for none.
        parts: ``(first channel, channels a unit)`` of each part of the weight that has units of the block.
    """

    site: Site
    pattern: Pattern
    coupling: str = ""
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def bound(self) -> Pattern:
        """The pattern for the geometry of the site."""
        return self.pattern.bound(kernel=self.site.kernel, groups=self.site.groups)


def each(sites: Sequence[Site], pattern: Pattern, *, pad: bool) -> tuple[list[Placement], dict[str, str]]:
    """Place a pattern on each site alone.

    Args:
        sites: Chosen sites.
        pattern: What to place.
        pad: Take also sites that the pattern does not divide.

    Returns:
        What gets a mask, and why the others do not, by name.
    """
    fitting, left_out = [], {}
    for site in sites:
        item = Placement(site, pattern)
        misfit = None if pad else item.bound.misfit(site.shape)
        if misfit:
            left_out[site.name] = f"{misfit}; set ragged=pad to prune it with smaller edge blocks"
        else:
            fitting.append(item)
    return fitting, left_out


def coupled(program: Program, sites: Sequence[Site], kind: str) -> tuple[list[Placement], dict[str, str]]:
    """Place whole attention heads or feed-forward neurons: the channels of several sites that go together.

    Args:
        program: The Program of the sites.
        sites: Chosen sites; a block of which one is not chosen is left out.
        kind: ``head`` or ``neuron``.

    Returns:
        What gets a mask, in graph order, and why other sites do not, by name.
    """
    found, reasons = find_heads(program) if kind == "head" else find_neurons(program)
    chosen = {site.name: site for site in sites}
    placed: dict[str, Placement] = {}
    left_out = {name: reason for name, reason in reasons.items() if name in chosen}
    for group in found:
        names = list(dict.fromkeys(member.site for member in group.members))
        missing = [name for name in names if name not in chosen]
        taken = [name for name in names if name in placed]
        for name in names:
            if missing:
                left_out[name] = f"its {kind}s also need {missing[0]}, which was not chosen"
            elif taken and name not in placed:
                left_out[name] = f"its {kind}s also need {taken[0]}, which belongs to {placed[taken[0]].coupling}"
        if missing or taken:
            continue
        for name in names:
            members = [member for member in group.members if member.site == name]
            if len({member.axis for member in members}) > 1:
                raise SparsityError(
                    f"{name}: {group.name} has {kind}s in its rows and in its columns; exclude the site"
                )
            width = math.gcd(*(number for member in members for number in (member.width, member.start)))
            parts = tuple((member.start, member.width) for member in members)
            placed[name] = Placement(chosen[name], Channel(members[0].axis, width), group.name, parts)
    for site in sites:
        if site.name not in placed:
            left_out.setdefault(site.name, f"it is no part of an attention or feed-forward block with {kind}s")
    return [placed[site.name] for site in sites if site.name in placed], left_out


def share_out(
    placements: Sequence[Placement],
    scope: str,
    sparsity: float,
    targets: Sequence[str],
    bounds: tuple[float, float],
) -> list[float | None]:
    """Give each site its sparsity within ``bounds`` (least, most), or None where sites compete for a common one.

    Raises:
        SparsityError: A target is malformed, out of range or matches no site, or the caps make the sparsity unreachable.
    """
    least, most = bounds
    if scope == "global":
        return [None] * len(placements)
    if scope != "local":
        shapes = [item.site.stored_shape for item in placements]
        caps = [min(most, item.bound.max_sparsity(item.site.shape)) for item in placements]
        return [*erdos_renyi(shapes, sparsity, kernel=scope.endswith("kernel"), max_sparsity=caps, min_sparsity=least)]
    shares: dict[str, float] = {item.site.name: sparsity for item in placements}
    for text in targets:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not name or not least <= value <= most:
            raise SparsityError(
                f"targets: {text!r} is no name=sparsity with a fraction in [min_sparsity={least}, max_sparsity={most}]"
            )
        shares.update(dict.fromkeys(matching([item.site for item in placements], [name.strip()], "targets"), value))
    return [shares[item.site.name] for item in placements]


def add_masks(program: Program, decisions: Sequence[tuple[Placement, Masking]], dense_gradient: bool) -> None:
    """Insert a mask operator behind each weight, with a buffer of True beside the weight and the decision on its node."""
    weights = attributes(program)
    for item, decision in decisions:
        site, weight = item.site, weights[item.site.name]
        name = f"{site.name}_mask"
        program.add_buffer(name, torch.ones_like(program.tensor(site.name), dtype=torch.bool))
        users = list(weight.users)
        with program.graph.inserting_after(weight):
            buffer = program.graph.create_node("get_attr", name)
        with program.graph.inserting_before(min(users)):
            masked = program.graph.call_function(
                ops.mask, (weight, buffer, True) if dense_gradient else (weight, buffer)
            )
        buffer.meta["val"] = torch.empty(site.stored_shape, dtype=torch.bool, device="meta")
        masked.meta = {key: value for key, value in weight.meta.items() if key == "val"}
        for user in users:
            user.replace_input_with(weight, masked)
        program.annotate(buffer, decision)
    program.recompile()
