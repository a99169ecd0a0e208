"""Sparsity patterns: which weights of a logical matrix ``[out, in]`` are pruned together.

A new pattern is one small class; listing it in ``PATTERNS`` lets text name it.
"""

from __future__ import annotations

from graphprune.errors import SparsityError, suggest
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.grouped import NM
from graphprune.sparsity.pattern_base import Pattern, Region, Shape
from graphprune.sparsity.tiled import Block, Tiled, Unstructured

__all__ = [
    "NM",
    "PATTERNS",
    "Block",
    "Channel",
    "Pattern",
    "Region",
    "Shape",
    "Tiled",
    "Unstructured",
    "parse_pattern",
]

PATTERNS: tuple[type[Pattern], ...] = (Unstructured, Block, Channel, NM)
"""Every pattern that text can name, tried in this order."""


def parse_pattern(text: str) -> Pattern:
    """Read a pattern: "unstructured" (or "1x1"), "4x1", "2:4" (keeps 2 of 4), "channelx1", "8xchannel".

    Args:
        text: The text; case and outer spaces do not matter.

    Returns:
        The pattern.

    Raises:
        SparsityError: The text names no pattern, or impossible numbers.
    """
    cleaned = text.strip().lower()
    for cls in PATTERNS:
        pattern = cls.from_text(cleaned)
        if pattern is not None:
            return pattern
    known = [example for cls in PATTERNS for example in cls.examples]
    raise SparsityError(f"unknown sparsity pattern {text!r}{suggest(cleaned, known)}")
