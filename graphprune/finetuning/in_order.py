"""Trainers that evaluate rows in their order, which scores of questions and predictions on disk go by.

transformers evaluates in an order by length where training batches are grouped by length.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer

from graphprune.training.trainer import DistillationTrainer


class _InOrder:
    args: Any

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        if self.args.world_size > 1:
            return None  # accelerate cuts it up in order
        return SequentialSampler(eval_dataset)


class InOrderTrainer(_InOrder, Trainer):  # type: ignore[misc]
    """A ``Trainer`` that evaluates in order."""


class InOrderDistillationTrainer(_InOrder, DistillationTrainer):
    """A ``DistillationTrainer`` that evaluates in order."""
