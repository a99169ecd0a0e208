"""All criteria by name. A new one is one small class; listing it here lets text name it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graphprune.sparsity.block_masks import BlockMask, RetrainFree
from graphprune.sparsity.criterion import AccumulatedCriterion, Criterion
from graphprune.sparsity.l0 import L0
from graphprune.sparsity.movement import Movement, SoftMovement
from graphprune.sparsity.obs import OBS
from graphprune.sparsity.regrowth import RigL, TopKast
from graphprune.sparsity.sensitivities import Gradient, Magnitude, Random, Snip, SnipMomentum, Taylor
from graphprune.sparsity.sparsegpt import SparseGPT
from graphprune.sparsity.spelling import parse_named
from graphprune.sparsity.wanda import Wanda

__all__ = [
    "CRITERIA",
    "L0",
    "OBS",
    "AccumulatedCriterion",
    "BlockMask",
    "Criterion",
    "Gradient",
    "Magnitude",
    "Movement",
    "Random",
    "RetrainFree",
    "RigL",
    "Snip",
    "SnipMomentum",
    "SoftMovement",
    "SparseGPT",
    "Taylor",
    "TopKast",
    "Wanda",
    "parse_criterion",
]

CRITERIA: Mapping[str, type[Criterion]] = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            Magnitude,
            Gradient,
            Snip,
            SnipMomentum,
            Taylor,
            Movement,
            SoftMovement,
            BlockMask,
            RetrainFree,
            L0,
            RigL,
            TopKast,
            OBS,
            Wanda,
            SparseGPT,
            Random,
        )
    }
)
"""Every criterion that text can name."""


def parse_criterion(text: str) -> Criterion:
    """Read a criterion: "magnitude", "snip_momentum" or with options "snip_momentum(decay=0.8,gain=1.0)".

    Args:
        text: The text; ``str(criterion)`` is the canonical form.

    Returns:
        The criterion.

    Raises:
        SparsityError: The text is malformed, or the name, an option or a value is not known.
    """
    return parse_named(text, CRITERIA, "criterion")
