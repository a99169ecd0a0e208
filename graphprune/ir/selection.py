"""Choose sites by name, pattern and operator, and say why the others were left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from graphprune.errors import RecipeError, suggest
from graphprune.ir.coupling import last_sites
from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, Excluded, Site, find_sites


class Named(Protocol):
    """What can be chosen by name: a site, or anything else that has a name and lies in a module."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def module(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Prunable:
    """Annotation on a weight's node: a pass may prune or quantize it."""


@dataclass(frozen=True)
class Selection:
    """Which sites to take.

    Attributes:
        select: Names to take: a glob over module or parameter names (``encoder.*.query``), or ``re:`` and a regular
            expression that is searched in them. Empty takes all.
        exclude: Names to leave out, in the same form.
        ops: Operators to take, such as ``linear`` or ``conv2d``. Empty takes all.
        include_last: Take the last layer before the output too.
    """

    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = False

    def apply(self, program: Program) -> tuple[tuple[Site, ...], tuple[Excluded, ...]]:
        """Choose among the sites of a Program, for a pass that needs one to work on.

        Returns:
            The chosen sites in graph order, and everything left out with its reason.

        Raises:
            RecipeError: A name or operator matches nothing (with close matches), or nothing at all is chosen.
        """
        chosen, left = self.split(program)
        if not chosen:
            why = "; ".join(sorted({item.reason for item in left})) or "the model has no linear or convolution weights"
            raise RecipeError(f"no site is left to work on: {why}")
        return chosen, left

    def split(self, program: Program) -> tuple[tuple[Site, ...], tuple[Excluded, ...]]:
        """Choose among the sites of a Program, possibly none of them.

        Returns:
            The chosen sites in graph order, and everything left out with its reason.

        Raises:
            RecipeError: A name or operator matches nothing (with close matches).
        """
        sites, excluded = find_sites(program)
        known_ops = {operator.name for operator in OPERATORS.values()}
        for name in self.ops:
            if name not in known_ops:
                raise RecipeError(f"ops: unknown operator {name!r}{suggest(name, known_ops)}")
        selected = matching(sites, self.select, "select") if self.select else {site.name for site in sites}
        named = {site.name for site in sites for text in self.select if text in (site.name, site.module)}
        refused = matching(sites, self.exclude, "exclude")
        last = last_sites(program, sites)
        chosen: list[Site] = []
        left = list(excluded)
        for site in sites:
            reason = None
            if site.name in refused:
                reason = "excluded by name"
            elif site.name not in selected:
                reason = "not selected"
            elif self.ops and site.op not in self.ops:
                reason = f"operator {site.op} is not among ops"
            elif site.name in last and not self.include_last and site.name not in named:
                reason = "last layer before the output; name it in select, or set include_last, to take it"
            if reason is None:
                chosen.append(site)
            else:
                left.append(Excluded(site.name, reason))
        return tuple(chosen), tuple(left)


def matching(items: Iterable[Named], patterns: Iterable[str], option: str, kind: str = "site") -> set[str]:
    """Names of the items that globs or ``re:`` expressions over module and parameter names match.

    Raises:
        RecipeError: One matches no item, or is no regular expression; names ``option`` and what ``kind`` of item there is.
    """
    items = tuple(items)
    found: set[str] = set()
    for text in patterns:
        matched = {item.name for item in items if _matches(item, text, option)}
        if not matched:
            raise RecipeError(f"{option}: {text!r} matches no {kind}{suggest(text, [item.module for item in items])}")
        found |= matched
    return found


def _matches(item: Named, text: str, option: str) -> bool:
    if text.startswith("re:"):
        try:
            return any(re.search(text[3:], name) for name in (item.module, item.name))
        except re.error as error:
            raise RecipeError(f"{option}: {text!r} is no regular expression: {error}") from None
    return any(fnmatch.fnmatchcase(name, text) for name in (item.module, item.name))


def selected_sites(program: Program, selection: Selection) -> tuple[tuple[Site, ...], tuple[Excluded, ...]]:
    """The sites that ``find-prunable`` annotated, where it ran and ``selection`` asks for nothing else; else choose now."""
    annotated = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "get_attr" and program.annotation(node, Prunable) is not None
    }
    if not annotated or selection != Selection():
        return selection.apply(program)
    sites, excluded = find_sites(program)
    left = [Excluded(site.name, "not annotated by find-prunable") for site in sites if site.name not in annotated]
    return tuple(site for site in sites if site.name in annotated), (*excluded, *left)
