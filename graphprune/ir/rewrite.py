"""Rewrite rules: a subgraph to look for, a check that says why a match is left alone, and what takes its place.

A *sparsity pattern* is something else; see ``graphprune.sparsity``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from graphprune.ir.program import Program, eliminate_dead


@dataclass(frozen=True)
class Call:
    """A call to look for.

    Attributes:
        name: Name of the node in the match.
        targets: Operators, any of which matches.
        arguments: Calls that must stand at positions of its arguments; other arguments are free.
    """

    name: str
    targets: tuple[object, ...]
    arguments: Mapping[int, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """Where a rule's subgraph was found: its nodes by the names of the rule's calls."""

    root: fx.Node
    nodes: Mapping[str, fx.Node]

    def __getitem__(self, name: str) -> fx.Node:
        return self.nodes[name]


class RewriteRule(abc.ABC):
    """Replaces one small subgraph by another.

    Attributes:
        subgraph: What to look for, from the last operator back to the first.
    """

    subgraph: ClassVar[Call]

    @abc.abstractmethod
    def check(self, program: Program, match: Match) -> str | None:
        """Say why a match is left alone, or None where it is to be rewritten."""

    @abc.abstractmethod
    def rewrite(self, program: Program, match: Match) -> fx.Node:
        """Make what replaces the match and return the value that takes the place of its last one."""

    def label(self, match: Match) -> str:
        """What a match is called in a coverage report."""
        return match.root.name


@dataclass(frozen=True)
class Applied:
    """What a rule did: labels of the matches it rewrote, and of those it left alone, with the reason."""

    rewritten: tuple[str, ...]
    left_out: Mapping[str, str]


def find(node: fx.Node, wanted: Call) -> Match | str:
    """Look for a subgraph that ends in a node.

    Returns:
        The match, or the reason why there is none.
    """
    nodes: dict[str, fx.Node] = {}
    open_calls = [(node, wanted)]
    while open_calls:
        current, call = open_calls.pop()
        if current.op != "call_function" or current.target not in call.targets:
            return f"{current.target} is no {call.name}"
        nodes[call.name] = current
        for position, inner in call.arguments.items():
            value = current.args[position] if position < len(current.args) else None
            if not isinstance(value, fx.Node):
                return f"argument {position} of its {call.name} is no {inner.name}"
            open_calls.append((value, inner))
    return Match(node, nodes)


def apply_rule(program: Program, rule: RewriteRule) -> Applied:
    """Rewrite every match of a rule, in graph order, and erase what is dead then.

    Args:
        program: Mutated.
        rule: The rule.
    """
    rewritten: list[str] = []
    left_out: dict[str, str] = {}
    for node in program.calls(*rule.subgraph.targets):
        match = find(node, rule.subgraph)
        if isinstance(match, str):
            left_out[rule.label(Match(node, {rule.subgraph.name: node}))] = match
            continue
        reason = rule.check(program, match)
        if reason is not None:
            left_out[rule.label(match)] = reason
            continue
        rewritten.append(rule.label(match))
        node.replace_all_uses_with(rule.rewrite(program, match))
        program.graph.erase_node(node)
    if rewritten:
        eliminate_dead(program.graph)
        program.recompile()
    return Applied(tuple(rewritten), left_out)
