"""Distillation: losses that pull a student towards a teacher's logits, hidden states and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.ir.interface import is_label

_LOGITS = ("logits", "start_logits", "end_logits")


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened distributions, times the squared temperature.

    Args:
        student: Logits ``[..., classes]``.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: Positive.

    Returns:
        Scalar; the mean over all leading entries.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    classes = student.shape[-1]
    log_student = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach().reshape(-1, classes) / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of hidden states, relative to the teacher's variance, so that layers of any scale weigh alike.

    Args:
        student: ``[batch, tokens, features]``.
        teacher: The same shape; no gradient flows into it.
        mask: ``[batch, tokens]``, nonzero = a real token; None = all.

    Returns:
        Scalar: mean squared error over real tokens divided by the mean square of the teacher's centered states.
    """
    teacher = teacher.detach()
    weight = torch.ones_like(teacher[..., :1]) if mask is None else mask.unsqueeze(-1).to(teacher.dtype)
    error = ((student - teacher).square() * weight).sum()
    center = (teacher * weight).sum((0, 1)) / weight.sum()
    scale = ((teacher - center).square() * weight).sum()
    return error / scale.clamp_min(torch.finfo(teacher.dtype).tiny)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between embeddings.

    Args:
        student: ``[batch, features]``.
        teacher: The same shape; no gradient flows into it.

    Returns:
        Scalar in [0, 2]: the mean over the batch.
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1).mean()


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states of real tokens: sentence embeddings.

    Args:
        hidden: ``[batch, tokens, features]``.
        mask: ``[batch, tokens]``, nonzero = a real token.

    Returns:
        ``[batch, features]``.

    Source: Reimers and Gurevych, arXiv:1908.10084, section 3.
    """
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9)


@dataclass(frozen=True)
class Distillation:
    """A weighted sum of distillation losses against one teacher.

    Attributes:
        teacher: Any module that takes the student's inputs; it is run in eval mode without gradients.
        logits: Weight of the logits' loss, over ``logits``, ``start_logits`` and ``end_logits`` (summed).
        hidden: Weight of the hidden states' loss (mean over the mapped layers); student and teacher must return
            ``hidden_states``: trace the student with ``output_hidden_states=True``.
        embedding: Weight of the embeddings' loss, of the mean-pooled last hidden states.
        temperature: Softens the logits.
        layers: Pairs ``(student index, teacher index)`` into ``hidden_states``; empty maps each to its own index.
    """

    teacher: nn.Module
    logits: float = 0.0
    hidden: float = 0.0
    embedding: float = 0.0
    temperature: float = 2.0
    layers: Sequence[tuple[int, int]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not (self.logits or self.hidden or self.embedding):
            raise GraphPruneError("distillation with all weights zero does nothing; set logits, hidden or embedding")
        if self.temperature <= 0:
            raise GraphPruneError(f"temperature={self.temperature} is not positive")

    @torch.no_grad()
    def run_teacher(self, inputs: Mapping[str, Tensor]) -> Any:
        """The teacher's output, in eval mode; its mode is put back.

        Args:
            inputs: The student's inputs by name; labels are left out.
        """
        was_training = self.teacher.training
        self.teacher.eval()
        try:
            given = {name: value for name, value in inputs.items() if not is_label(name)}
            if self.hidden and getattr(self.teacher, "config", None) is not None:
                return self.teacher(**given, output_hidden_states=True)
            return self.teacher(**given)
        finally:
            self.teacher.train(was_training)

    def loss(self, student: Any, teacher: Any, mask: Tensor | None = None) -> Tensor:
        """The weighted sum.

        Args:
            student: The student's output object.
            teacher: The teacher's, from ``run_teacher``.
            mask: Attention mask ``[batch, tokens]``; needed for embeddings.

        Returns:
            Scalar.

        Raises:
            GraphPruneError: An output that a weight asks for is missing on either side.
        """
        parts: list[Tensor] = []
        if self.logits:
            pairs = [(student[name], teacher[name]) for name in _LOGITS if name in student and name in teacher]
            if not pairs:
                raise GraphPruneError(f"student and teacher share none of {', '.join(_LOGITS)} to distil from")
            parts += [self.logits * logits_loss(one, other, self.temperature) for one, other in pairs]
        if self.hidden:
            parts.append(self.hidden * self._hidden(_states(student, "student"), _states(teacher, "teacher"), mask))
        if self.embedding:
            if mask is None:
                raise GraphPruneError("the embedding loss pools over tokens and needs the attention mask")
            last = student["last_hidden_state"], teacher["last_hidden_state"]
            parts.append(self.embedding * embedding_loss(mean_pool(last[0], mask), mean_pool(last[1], mask)))
        return torch.stack(parts).sum()

    def _hidden(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        layers = self.layers or [(index, index) for index in range(1, len(student))]
        losses = []
        for one, other in layers:
            if student[one].shape != teacher[other].shape:
                raise GraphPruneError(
                    f"hidden state {one} of the student is {list(student[one].shape)}, {other} of the teacher "
                    f"{list(teacher[other].shape)}; map layers of one width"
                )
            losses.append(hidden_loss(student[one], teacher[other], mask))
        return torch.stack(losses).mean()


def _states(output: Any, who: str) -> Sequence[Tensor]:
    states = output.get("hidden_states")
    if states is None:
        raise GraphPruneError(f"the {who} returns no hidden_states; trace or call it with output_hidden_states=True")
    return tuple(states)
