"""Every error that graphprune raises, in one tree.

A message says what is wrong, where (a node, a site or a recipe path such as ``pipeline[1].insert-masks.sparsity``), why,
and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphPruneError(Exception):
    """Base of all errors that graphprune raises on purpose."""


class RecipeError(GraphPruneError):
    """A recipe, a pipeline text or an option is malformed or names something unknown."""


class TraceError(GraphPruneError):
    """A model cannot be traced, or its trace does not compute what the model computes."""


class VerifyError(GraphPruneError):
    """A Program or an artifact breaks a rule that it must keep."""


class PassError(GraphPruneError):
    """A pass was run on a Program that it cannot work on, or failed while it ran."""


class SparsityError(GraphPruneError):
    """A sparsity pattern, target or schedule cannot be applied or was not reached."""


class LoweringError(GraphPruneError):
    """A Program cannot be lowered to a target."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known names are close to an unknown one.

    Args:
        name: The name that was not found.
        known: All names that would have been accepted.

    Returns:
        ``"; did you mean 'a' or 'b'?"``, or ``"; known: a, b, ..."`` where nothing is close, or ``""`` where ``known`` is
        empty. Ready to be appended to a message.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}"
