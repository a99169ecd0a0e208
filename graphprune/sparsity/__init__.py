"""Sparsity as pure functions over tensors: patterns, criteria, schedules, allocation. No graph, no files."""

from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.criteria import (
    CRITERIA,
    AccumulatedCriterion,
    Criterion,
    Magnitude,
    SnipMomentum,
    parse_criterion,
)
from graphprune.sparsity.layout import Layout, from_logical, logical_shape, to_logical
from graphprune.sparsity.patterns import (
    NM,
    PATTERNS,
    Block,
    Channel,
    Pattern,
    Tiled,
    Unstructured,
    parse_pattern,
)
from graphprune.sparsity.schedules import (
    SCHEDULES,
    Cosine,
    Cubic,
    Exponential,
    FractionSchedule,
    Linear,
    OneShot,
    Schedule,
    Window,
    parse_schedule,
    window,
)
from graphprune.sparsity.selection import select_smallest

__all__ = [
    "CRITERIA",
    "NM",
    "PATTERNS",
    "SCHEDULES",
    "AccumulatedCriterion",
    "Block",
    "Channel",
    "Cosine",
    "Criterion",
    "Cubic",
    "Exponential",
    "FractionSchedule",
    "Layout",
    "Linear",
    "Magnitude",
    "OneShot",
    "Pattern",
    "Schedule",
    "Scope",
    "SnipMomentum",
    "Tiled",
    "Unstructured",
    "Window",
    "allocate",
    "from_logical",
    "logical_shape",
    "parse_criterion",
    "parse_pattern",
    "parse_schedule",
    "select_smallest",
    "to_logical",
    "window",
]
