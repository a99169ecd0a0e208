"""Questions about a Program's dataflow, answered by networkx: what reaches what, and which sites hang together."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import torch
from torch import fx

from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, Site, attribute_behind

aten = torch.ops.aten
_CONTRACTIONS = {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.scaled_dot_product_attention.default,
}  # fmt: skip


def dataflow(program: Program) -> nx.DiGraph[str]:
    """The graph's nodes by name, with an edge from each value to each operator that uses it."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_node(node.name, op=node.op)
        graph.add_edges_from((used.name, node.name) for used in node.all_input_nodes)
    return graph


def last_sites(program: Program, sites: Iterable[Site]) -> set[str]:
    """Sites after which no other site comes on the way to any output: classifier heads.

    A site that is used several times counts by its last use.
    """
    sites = tuple(sites)
    order = _between_sites(program, sites)
    return {site.name for site in sites if order.out_degree(site.name) == 0} if len(sites) > 1 else set()


def _between_sites(program: Program, sites: tuple[Site, ...]) -> nx.DiGraph[str]:
    """Layers, with an edge where the result of one reaches the next one's use without passing a third.

    Layers are the sites, and operators whose weight is no site, such as an output layer that is tied to an embedding.
    """
    owner = {use: site.name for site in sites for use in site.uses}
    for node in program.graph.nodes:
        operator = OPERATORS.get(node.target)
        if operator is None or node.name in owner:
            continue
        if attribute_behind(node.args[operator.weight]) is not None:
            owner[node.name] = node.name
    reaching: dict[fx.Node, frozenset[str]] = {}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(site.name for site in sites)
    for node in program.graph.nodes:
        sources = frozenset().union(*(reaching.get(used, frozenset()) for used in node.all_input_nodes))
        if node.name in owner:
            graph.add_edges_from((source, owner[node.name]) for source in sources if source != owner[node.name])
            sources = frozenset([owner[node.name]])
        reaching[node] = sources
    # a tied weight can close a circle; cut it at the later use so that the order stays acyclic
    while True:
        try:
            circle = nx.find_cycle(graph)
        except nx.NetworkXNoCycle:
            return graph
        graph.remove_edge(*circle[-1])


def coupled_sites(program: Program, sites: Iterable[Site]) -> list[frozenset[str]]:
    """Groups of sites whose output features are added or multiplied together, so that removing one removes it in all.

    Returns:
        Groups of two or more site names, in graph order of their first member. Features travel through elementwise
        operators, normalizations and dropout, and end where the next contraction mixes them.
    """
    owner = {use: site.name for site in sites for use in site.uses}
    reaching: dict[fx.Node, frozenset[str]] = {}
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(owner.values())
    for node in program.graph.nodes:
        if node.name in owner:
            reaching[node] = frozenset([owner[node.name]])
            continue
        if node.target in _CONTRACTIONS or node.op == "output":
            reaching[node] = frozenset()
            continue
        sources = [reaching.get(used, frozenset()) for used in node.all_input_nodes]
        together = sorted(frozenset().union(*sources))
        if sum(bool(item) for item in sources) > 1:
            nx.add_path(graph, together)
        reaching[node] = frozenset(together)
    groups = [frozenset(group) for group in nx.connected_components(graph) if len(group) > 1]
    first = {name: index for index, name in enumerate(dict.fromkeys(owner.values()))}
    return sorted(groups, key=lambda group: min(first[name] for name in group))
