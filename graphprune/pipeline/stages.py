"""Stages of a recipe: a pipeline, how the result is trained, and from whom it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graphprune.pipeline.base import Pass

_Positive = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
Layer = tuple[int, int] | tuple[str, str]
"""A layer of the student and one of the teacher: indices into ``hidden_states``, or dotted module names."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def said(self) -> dict[str, Any]:
        """What was written, by name, in the order of the fields."""
        written = self.model_dump(mode="json", exclude_unset=True)
        return {name: written[name] for name in type(self).model_fields if name in written}


class TrainingSettings(_Settings):
    """How a stage trains; names and meanings are those of ``transformers.TrainingArguments``. None = not said.

    ``warmup_ratio`` is a fraction of all steps. ``max_seq_length``, ``doc_stride`` and ``pad_to_max_length`` are of the data.
    """

    num_train_epochs: _Positive | None = None
    max_steps: _Count | None = None
    learning_rate: _Positive | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: dict[str, float | int | str | bool] | None = None
    warmup_steps: _NotNegative | None = None
    warmup_ratio: _Fraction | None = None
    weight_decay: _NotNegative | None = None
    adam_beta1: _Fraction | None = None
    adam_beta2: _Fraction | None = None
    adam_epsilon: _Positive | None = None
    max_grad_norm: _NotNegative | None = None
    optim: str | None = None
    label_smoothing_factor: _Fraction | None = None
    per_device_train_batch_size: _Count | None = None
    per_device_eval_batch_size: _Count | None = None
    gradient_accumulation_steps: _Count | None = None
    seed: int | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    max_seq_length: _Count | None = None
    doc_stride: _Count | None = None
    pad_to_max_length: bool | None = None


class DistillationSettings(_Settings):
    """From whom a stage learns, and what.

    The loss is ``task`` times the model's own plus ``logits``, ``hidden`` and ``attentions`` times those against the teacher.

    Attributes:
        teacher: A folder or hub id, ``self`` (the model as the stage finds it), or several; None = the command line names it.
        task: Weight of the model's own loss.
        logits: Weight of the logits' loss.
        loss: Kullback-Leibler divergence, cross entropy or squared error of the logits.
        temperature: Softens the logits.
        hidden: Weight of the hidden states' loss.
        attentions: Weight of the attention maps' loss.
        layers: Which layer of the student learns from which of the teacher's; empty = spread evenly.
        hidden_loss: What hidden states and attentions are compared by.
        project: Where widths differ, compare through a trainable linear projection.
    """

    teacher: str | tuple[str, ...] | None = None
    task: _NotNegative = 0.5
    logits: _NotNegative = 0.5
    loss: Literal["kl", "ce", "mse"] = "kl"
    temperature: _Positive = 1.0
    hidden: _NotNegative = 0.0
    attentions: _NotNegative = 0.0
    layers: tuple[Layer, ...] = ()
    hidden_loss: Literal["mse", "kl", "l1", "cosine", "relative"] = "mse"
    project: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: For messages and folders.
        passes: The pipeline.
        training: How it is trained; whatever is None is said elsewhere.
        distillation: From whom it learns; None = from nobody.
        train: Whether it is trained at all; without, its pipeline is all that happens.
    """

    name: str
    passes: tuple[Pass, ...]
    training: TrainingSettings = field(default_factory=TrainingSettings)
    distillation: DistillationSettings | None = None
    train: bool = True


def merged(base: Mapping[str, Any] | None, over: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a stage says over what the recipe says for all stages."""
    return {**(base or {}), **(over or {})}
