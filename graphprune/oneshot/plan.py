"""In which order a walk through a graph prunes the sites, and which nodes it must run for that."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from graphprune.errors import SparsityError, TraceError
from graphprune.ir.masking import MaskedSite
from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, users_of_value
from graphprune.ir.watching import add_changes_in_place, collect_needed, without_data
from graphprune.oneshot.inputs import Geometry, geometry
from graphprune.sparsity.activation import ActivationCriterion


@dataclass(frozen=True, eq=False)
class Use:
    """An operator that uses a masked weight.

    Attributes:
        node: The operator.
        value: Its input.
        shape: How it moves over the input.
        index: Its place in the graph.
    """

    node: fx.Node
    value: fx.Node
    shape: Geometry
    index: int


@dataclass(frozen=True, eq=False)
class Stop:
    """A place where the walk prunes sites: before the first operator that uses one of them.

    Attributes:
        sites: Sites with the same inputs in all their uses.
        criterion: Their criterion.
        uses: The uses of each input, one for each time that the weights are used, in graph order.
    """

    sites: tuple[MaskedSite, ...]
    criterion: ActivationCriterion
    uses: tuple[Use, ...]

    @property
    def index(self) -> int:
        """Place in the graph."""
        return self.uses[0].index

    @property
    def groups(self) -> int:
        """Groups of the operator."""
        return int(self.uses[0].shape[4]) if self.uses[0].shape else 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What a walk does.

    Attributes:
        stops: In graph order.
        nodes: Nodes that depend on the data and that some stop needs, in graph order, without placeholders.
        shared: Nodes that do not depend on the data; they have one value for all batches.
        order: Place of every node in the graph.
        last: Place after which a value is needed no more.
        inputs: Placeholders that are needed.
    """

    stops: tuple[Stop, ...]
    nodes: tuple[fx.Node, ...]
    shared: frozenset[fx.Node]
    order: dict[fx.Node, int]
    last: dict[fx.Node, int] = field(repr=False)
    inputs: tuple[fx.Node, ...] = ()

    def between(self, start: int, end: int) -> list[fx.Node]:
        """Nodes to run from one place in the graph up to another, which is not included."""
        return [node for node in self.nodes if start <= self.order[node] < end]


def make_plan(program: Program, sites: Sequence[MaskedSite], given: Collection[str]) -> Plan:
    """Plan a walk.

    Args:
        program: A flat Program.
        sites: Sites with criteria that need activations.
        given: Names of the inputs that every batch has.

    Returns:
        The plan.

    Raises:
        SparsityError: A criterion cannot work on its site; names it.
        TraceError: An input that some site needs is not given; names both.
    """
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    shared = without_data(program.graph.nodes)
    stops = _stops(sites, order)
    needed = _needed(program.graph.nodes, stops, shared, given)
    nodes = tuple(node for node in program.graph.nodes if node in needed and node.op != "placeholder")
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for value in node.all_input_nodes:
            last[value] = order[node]
    for stop in stops:
        for use in stop.uses:
            last[use.value] = max(last.get(use.value, 0), use.index)
    inputs = tuple(node for node in program.graph.nodes if node.op == "placeholder" and node in needed)
    return Plan(stops, nodes, shared, order, last, inputs)


def _stops(sites: Sequence[MaskedSite], order: dict[fx.Node, int]) -> tuple[Stop, ...]:
    alike: dict[object, list[tuple[MaskedSite, tuple[Use, ...]]]] = {}
    for site in sites:
        uses = _uses(site, order)
        groups = int(uses[0].shape[4]) if uses[0].shape else 1
        _check(site, groups)
        key = (site.decision.criterion, tuple((use.value, use.shape) for use in uses))
        alike.setdefault(key, []).append((site, uses))
    stops = []
    for members in alike.values():
        first = min((uses for _, uses in members), key=lambda uses: uses[0].index)
        criterion = members[0][0].criterion
        assert isinstance(criterion, ActivationCriterion)
        stops.append(Stop(tuple(site for site, _ in members), criterion, first))
    return tuple(sorted(stops, key=lambda stop: stop.index))


def _check(site: MaskedSite, groups: int) -> None:
    criterion, decision = site.criterion, site.decision
    assert isinstance(criterion, ActivationCriterion)
    if decision.coupling:
        raise SparsityError(
            f"{site.name}: criterion {criterion} prunes layer after layer, and pattern {decision.pattern} of {decision.coupling} "
            f"couples several; choose a pattern of single layers, or a criterion such as snip"
        )
    problem = criterion.problem(site.pattern, site.shape, groups, goal_of(site))
    if problem:
        raise SparsityError(f"{site.name}: {problem}")


def goal_of(site: MaskedSite) -> float:
    """Sparsity that a site is to have: its share, or its rule's sparsity."""
    share = site.decision.share
    return (site.decision.sparsity or 0.0) if share is None else share


def _uses(site: MaskedSite, order: dict[fx.Node, int]) -> tuple[Use, ...]:
    uses = []
    for node, value in users_of_value(site.node):
        operator = OPERATORS[node.target]
        x = node.args[operator.weight - 1]
        if node.args[operator.weight] is not value or not isinstance(x, fx.Node):
            raise SparsityError(f"{site.name}: {node.name} does not use it as the weight of a layer; exclude the site")
        uses.append(Use(node, x, geometry(node, operator, tuple(site.weight.shape)), order[node]))
    if not uses:
        raise SparsityError(
            f"{site.name} is used by no operator, so there are no inputs to prune it with; exclude the site"
        )
    return tuple(sorted(uses, key=lambda use: use.index))


def _needed(
    nodes: Iterable[fx.Node], stops: Sequence[Stop], shared: frozenset[fx.Node], given: Collection[str]
) -> set[fx.Node]:
    """Everything that depends on the data and that an input of a site depends on."""
    needed: set[fx.Node] = set()
    for stop in stops:
        missing = collect_needed([use.value for use in stop.uses], shared, given, needed)
        if missing:
            raise TraceError(
                f"{stop.sites[0].name} needs the input {missing!r}, which is not in every batch; given: {', '.join(given) or 'nothing'}"
            )
    end = max((use.index for stop in stops for use in stop.uses), default=0)
    add_changes_in_place(itertools.islice(nodes, end), shared, given, needed)
    return needed
