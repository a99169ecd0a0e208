"""What is known to hold of a Program between two passes."""

from __future__ import annotations

import enum


class Property(enum.Flag):
    """Facts about a Program; passes require, establish and destroy them, and the verifier checks them.

    ``FUNCTIONAL``: the graph computes what the source model computes (up to the masks and quantizers that passes added).
    ``SITES``: prunable weights are chosen and annotated. ``MASKED``: mask operators are in the graph.
    ``FAKE_QUANT``: fake-quantize operators are in the graph. ``FROZEN``: their scales are fixed and weights lie on the grid.
    ``PLANNED``: operators are annotated with what will be quantized. ``OBSERVED``: observers are in the graph.
    ``PARTITIONED``: repeated blocks run as modules of their own, so the graph is not flat.
    """

    NONE = 0
    FUNCTIONAL = enum.auto()
    SITES = enum.auto()
    MASKED = enum.auto()
    FAKE_QUANT = enum.auto()
    FROZEN = enum.auto()
    PARTITIONED = enum.auto()
    PLANNED = enum.auto()
    OBSERVED = enum.auto()

    def names(self) -> tuple[str, ...]:
        """The single properties in this set, in lower case and in order of definition."""
        return tuple((flag.name or "").lower().replace("_", "-") for flag in type(self) if flag and flag in self)

    def __str__(self) -> str:
        return ", ".join(self.names()) or "none"
