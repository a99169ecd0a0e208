"""Pruning once, from calibration data and without training: in memory, or a checkpoint larger than memory."""

from graphprune.oneshot.checkpoint import prune_checkpoint
from graphprune.oneshot.prune import prune
from graphprune.oneshot.report import PrunedSite, PruneReport

__all__ = ["PruneReport", "PrunedSite", "prune", "prune_checkpoint"]
