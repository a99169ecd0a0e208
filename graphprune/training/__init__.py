"""Training: the session that drives masks, distillation, calibration, and the callback for Hugging Face's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphprune.ir.calibration import calibrate
from graphprune.training.distillation import Distillation, DistillationLoss
from graphprune.training.losses import embedding_loss, feature_loss, hidden_loss, logits_loss, mean_pool
from graphprune.training.report import RuleReport, SessionReport
from graphprune.training.sampler import GradientSampler
from graphprune.training.session import Session
from graphprune.training.teacher_cache import TeacherCache
from graphprune.training.teacher_checks import check_teacher
from graphprune.training.teaching import frozen_copy
from graphprune.training.weights import hardness_weights, loss_weights

if TYPE_CHECKING:
    from graphprune.training.callback import SessionCallback
    from graphprune.training.lightning import LightningSession
    from graphprune.training.trainer import DistillationTrainer

__all__ = [
    "Distillation",
    "DistillationLoss",
    "DistillationTrainer",
    "GradientSampler",
    "LightningSession",
    "RuleReport",
    "Session",
    "SessionCallback",
    "SessionReport",
    "TeacherCache",
    "calibrate",
    "check_teacher",
    "embedding_loss",
    "feature_loss",
    "frozen_copy",
    "hardness_weights",
    "hidden_loss",
    "logits_loss",
    "loss_weights",
    "mean_pool",
]


def __getattr__(name: str) -> Any:
    if name == "SessionCallback":  # importing it imports transformers
        from graphprune.training.callback import SessionCallback

        return SessionCallback
    if name == "LightningSession":
        from graphprune.training.lightning import LightningSession

        return LightningSession
    if name == "DistillationTrainer":
        from graphprune.training.trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
