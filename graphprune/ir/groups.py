"""Find attention heads and feed-forward neurons: rows and columns of several weights that are pruned together.

Both are the same question: into which units do the input features of a layer fall, so that each unit comes from features of
earlier layers of its own, and from nothing that another unit or anything else in the graph uses? See ``features`` for how
features are followed. Where attention lies between, units come out as heads (one key/value head with all its query heads);
where only elementwise operators do, as neurons.

Zeroing a unit's columns of the last layer removes all that the unit contributes, so that its rows, and the biases of those
rows, no longer matter.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.ir.features import (
    LostTrackError,
    Span,
    Spans,
    follow,
    followed_region,
    is_product,
    sees_values,
    unite,
)
from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, Site, find_sites
from graphprune.sparsity.layout import Layout

HEAD = "head"
NEURON = "neuron"


@dataclass(frozen=True)
class Member:
    """A part of a weight that is cut along one dimension into the units of a group.

    Attributes:
        site: Name of the weight.
        axis: 0 = output rows, 1 = input columns, of the logical matrix.
        start: First row or column of unit 0.
        width: Rows or columns a unit: unit ``i`` has ``start + i * width`` up to ``start + (i + 1) * width``.
    """

    site: str
    axis: int
    start: int
    width: int


@dataclass(frozen=True)
class UnitGroup:
    """The heads of one attention, or the neurons of one feed-forward block.

    Attributes:
        name: Where it is, such as ``encoder.layer.0.attention``; unique among groups of its kind.
        kind: "head" or "neuron".
        count: Number of units.
        members: Parts of weights that lose a unit together: first rows of the layers that make it, then columns of the layer
            that uses it. A fused projection has several.
    """

    name: str
    kind: str
    count: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class _Found:
    """What ends at one use of a layer: a group without a name, and the uses of layers it is made of."""

    kind: str
    last: Site
    count: int
    members: tuple[Member, ...]
    uses: frozenset[tuple[str, int]]


class _NoGroupError(Exception):
    """Why no group ends at a layer."""


def find_heads(program: Program) -> tuple[tuple[UnitGroup, ...], Mapping[str, str]]:
    """Find the heads of every attention whose projections and output projection are sites.

    With grouped queries a unit is one key/value head with all its query heads. Where all queries share one key/value head,
    units are query heads, and key and value are no members.

    Returns:
        The groups in graph order, and for every site outside of them why it is there. A site has at most one group for its
        rows and one for its columns.

    Raises:
        PassError: The Program is partitioned.
    """
    return _find(program, HEAD)


def find_neurons(program: Program) -> tuple[tuple[UnitGroup, ...], Mapping[str, str]]:
    """Find the neurons between linear layers: features that reach one linear layer through elementwise operators alone.

    A gated block (``down(act(gate(x)) * up(x))``) has three members. Convolutions are left out.

    Returns:
        As ``find_heads``.

    Raises:
        PassError: The Program is partitioned.
    """
    return _find(program, NEURON)


def _find(program: Program, kind: str) -> tuple[tuple[UnitGroup, ...], Mapping[str, str]]:
    sites, _ = find_sites(program)
    linear = {site.name: site for site in sites if site.layout is not Layout.CONV}
    nodes = {node.name: node for node in program.graph.nodes}
    layers = {nodes[use]: site for site in linear.values() for use in site.uses}
    found: list[_Found] = []
    reasons: dict[str, str] = {}
    causes: dict[str, str] = {}
    for node, site in layers.items():
        region, starts = followed_region(_input(node), layers)
        if not starts:
            continue
        this = HEAD if any(is_product(item) for item in region) else NEURON
        if this != kind:
            continue
        try:
            found.append(_group(program, this, node, region, starts, layers))
        except (LostTrackError, _NoGroupError) as error:
            reasons[site.name] = str(error)
            for start in starts:
                causes.setdefault(layers[start].name, f"{site.name}: {error}")
    kept = _consistent(found, linear, reasons)
    inside = {member.site for item in kept for member in item.members}
    left_out = {site.name: _reason(site, kind, reasons, causes) for site in sites if site.name not in inside}
    return _named(kept), left_out


def _reason(site: Site, kind: str, reasons: Mapping[str, str], causes: Mapping[str, str]) -> str:
    if site.layout is Layout.CONV:
        return "convolution: heads and neurons are looked for between linear layers only"
    nothing = {
        HEAD: "it is part of no attention between prunable layers",
        NEURON: "no linear layer feeds it, or is fed by it, elementwise",
    }
    return reasons.get(site.name) or causes.get(site.name) or nothing[kind]


def _group(
    program: Program,
    kind: str,
    node: fx.Node,
    region: set[fx.Node],
    starts: list[fx.Node],
    layers: Mapping[fx.Node, Site],
) -> _Found:
    """The group that ends at one use of a layer; raises where there is none."""
    leaks = {start: _leak(start, region, node, layers) for start in starts}
    if all(leaks.values()):
        raise _NoGroupError(leaks[starts[0]] or "")
    columns = _by_site(follow(program.graph, region, starts)[_input(node)], layers)
    varying = {key: span for key, span in columns.items() if not _is_same(span)}
    if not varying:
        what = "it has one head only, or its heads are mixed" if kind == HEAD else "operators before it mix features"
        raise _NoGroupError(what)
    cuts = _cuts(varying.values())
    count = len(cuts) - 1
    if count == 1:
        raise _NoGroupError("every input feature hangs together with every other")
    sources = [Member(site, 0, *_regular(span, cuts)) for (site, _), span in varying.items()]
    width = cuts[1]
    if cuts != list(range(0, cuts[-1] + width, width)):
        raise _NoGroupError(f"its input features fall into {count} units of different sizes")
    members = {member.site for member in sources}
    for start, leak in leaks.items():
        if leak and layers[start].name in members:
            raise _NoGroupError(leak)
    return _Found(
        kind,
        layers[node],
        count,
        (*sources, Member(layers[node].name, 1, 0, width)),
        frozenset({(start.name, 0) for start in starts if layers[start].name in members} | {(node.name, 1)}),
    )


def _leak(start: fx.Node, region: set[fx.Node], last: fx.Node, layers: Mapping[fx.Node, Site]) -> str | None:
    """Say where features of a layer go besides into ``last``, or None where they go nowhere else."""
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user is last and [arg for arg in user.args if arg is node] == [_input(last)]:
                continue
            if not sees_values(user):
                continue
            if user not in region or user in layers:
                where = layers[user].name if user in layers else "the output" if user.op == "output" else user.name
                return f"the features of {layers[start].name} are also used by {where}"
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return None


def _input(layer: fx.Node) -> fx.Node:
    """What a layer multiplies its weight with."""
    value = layer.args[OPERATORS[layer.target].weight - 1]
    assert isinstance(value, fx.Node)
    return value


def _by_site(spans: Spans, layers: Mapping[fx.Node, Site]) -> dict[tuple[str, int], Span]:
    """Ranges of each input feature, by site and part of the site: parts that overlap are one."""
    parts: list[tuple[str, int, int, Span]] = []
    for origin in sorted(spans, key=lambda item: (layers[item.use].name, item.first, item.last)):
        low, high = spans[origin]
        ahead = list(range(low.dim() - 1))
        span = (low.amin(ahead), high.amax(ahead)) if ahead else (low, high)
        name = layers[origin.use].name
        if parts and parts[-1][0] == name and origin.first <= parts[-1][2]:
            _, first, last, known = parts.pop()
            parts.append((name, first, max(last, origin.last), unite(known, span)))
        else:
            parts.append((name, origin.first, origin.last, span))
    order = {site.name: place for place, site in enumerate(dict.fromkeys(layers.values()))}
    return {(name, first): span for name, first, _, span in sorted(parts, key=lambda part: (order[part[0]], part[1]))}


def _is_same(span: Span) -> bool:
    """Whether all input features depend on the same range."""
    return bool((span[0] == span[0][0]).all()) and bool((span[1] == span[1][0]).all())


def _cuts(spans: Iterable[Span]) -> list[int]:
    """Places between input features where no range reaches across, both ends included."""
    spans = list(spans)
    size = len(spans[0][0])
    open_ = torch.ones(size - 1, dtype=torch.bool)
    for low, high in spans:
        before = high.cummax(0).values[:-1]
        after = low.flip(0).cummin(0).values.flip(0)[1:]
        open_ &= before < after
    return [0, *(open_.nonzero().flatten() + 1).tolist(), size]


def _regular(span: Span, cuts: list[int]) -> tuple[int, int]:
    """Start and width of the rows of each unit; raises where they are not equally many, one unit after the other."""
    low = torch.stack([part.min() for part in span[0].tensor_split(cuts[1:-1])]).long()
    high = torch.stack([part.max() for part in span[1].tensor_split(cuts[1:-1])]).long()
    start, width = int(low[0]), int(high[0] - low[0]) + 1
    expected = start + width * torch.arange(len(low))
    if width < 1 or not torch.equal(low, expected) or not torch.equal(high, expected + width - 1):
        raise _NoGroupError("its units are no equally wide, consecutive rows of the layers before it")
    return start, width


def _consistent(found: list[_Found], linear: Mapping[str, Site], reasons: dict[str, str]) -> list[_Found]:
    """One of each group, where it holds for all uses of all its weights."""
    uses: dict[tuple[Member, ...], set[tuple[str, int]]] = {}
    for item in found:
        uses.setdefault(item.members, set()).update(item.uses)
    kept: list[_Found] = []
    for item in {item.members: item for item in reversed(found)}.values():
        wanted = {(use, member.axis) for member in item.members for use in linear[member.site].uses}
        if wanted <= uses[item.members]:
            kept.append(item)
        else:
            shared = sorted({member.site for member in item.members if len(linear[member.site].uses) > 1})
            for member in item.members:
                reasons.setdefault(member.site, f"{', '.join(shared)}: used several times, in different ways")
    return kept[::-1]


def _named(found: list[_Found]) -> tuple[UnitGroup, ...]:
    """Name every group by what the names of its layers have in common, or by its last layer where that is not unique."""
    common = [_common(member.site.rpartition(".")[0] for member in item.members) for item in found]
    often = Counter(common)
    return tuple(
        UnitGroup(name if name and often[name] == 1 else item.last.module, item.kind, item.count, item.members)
        for name, item in zip(common, found, strict=True)
    )


def _common(names: Iterable[str]) -> str:
    """The leading parts that dotted names share."""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)
