"""Training: the session that drives masks, distillation, calibration, and the callback for Hugging Face's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphprune.ir.calibration import calibrate
from graphprune.training.distillation import Distillation, embedding_loss, hidden_loss, logits_loss, mean_pool
from graphprune.training.report import RuleReport, SessionReport
from graphprune.training.sampler import GradientSampler
from graphprune.training.session import Session

if TYPE_CHECKING:
    from graphprune.training.callback import SessionCallback

__all__ = [
    "Distillation",
    "GradientSampler",
    "RuleReport",
    "Session",
    "SessionCallback",
    "SessionReport",
    "calibrate",
    "embedding_loss",
    "hidden_loss",
    "logits_loss",
    "mean_pool",
]


def __getattr__(name: str) -> Any:
    if name == "SessionCallback":  # importing it imports transformers
        from graphprune.training.callback import SessionCallback

        return SessionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
