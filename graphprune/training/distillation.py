"""Distillation: a student learns from the logits, hidden states and attention maps of one teacher or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError, suggest
from graphprune.ir.interface import is_label
from graphprune.training.entries import WHOLE, Entries, labeled_mask, token_mask
from graphprune.training.layers import LayerPair, check_layers, make_projections
from graphprune.training.losses import (
    FEATURE_KINDS,
    LOGITS_KINDS,
    FeatureKind,
    LogitsKind,
    embedding_loss,
    feature_loss,
    logits_loss,
    mean_pool,
)
from graphprune.training.matching import Matcher, Output, check_shapes
from graphprune.training.teacher_cache import TeacherCache
from graphprune.training.teacher_checks import label_order
from graphprune.training.teaching import ROW, accepted, inner_program, run_in_eval
from graphprune.training.weights import teacher_shares

if TYPE_CHECKING:
    from graphprune.pipeline.stages import DistillationSettings

LOGITS = ("logits", "start_logits", "end_logits")
PROJECTIONS = "graphprune_projections.safetensors"
Teacher = nn.Module | TeacherCache


@dataclass(frozen=True)
class DistillationLoss:
    """A loss and what it is made of.

    Attributes:
        total: ``task weight * task + distillation``, for ``backward``.
        task: The model's own loss; None where there is none.
        distillation: The weighted sum of the parts.
        parts: ``logits``, ``hidden``, ``attentions``, ``embedding``, without their weights.
    """

    total: Tensor
    task: Tensor | None
    distillation: Tensor
    parts: Mapping[str, Tensor]


class Distillation(nn.Module):
    """A weighted sum of a model's own loss and losses against a teacher.

    Its parameters are the projections that ``prepare`` makes, and nothing else: teachers are not among them, and are in no
    ``state_dict``. Give them to the optimizer beside the student's.

    Args:
        teacher: A module that takes the student's inputs, a ``TeacherCache``, or several of them. Modules run in eval mode without
            gradients.
        logits: Weight of the logits' loss: the mean over those of ``logits``, ``start_logits`` and ``end_logits`` that both have.
        task: Weight of the loss that the student itself returns.
        hidden: Weight of the hidden states' loss, the mean over the layer pairs; trace a Program with ``output_hidden_states=True``.
        attentions: Weight of the attention maps' loss, likewise with ``output_attentions=True``.
        embedding: Weight of the embeddings' loss, of the mean-pooled last hidden states.
        loss: How logits are compared: ``kl``, ``ce`` or ``mse``; see ``logits_loss``.
        temperature: Softens the logits.
        hidden_loss: How hidden states and attention maps are compared: ``mse``, ``kl``, ``l1``, ``cosine`` or ``relative``.
        layers: Pairs (student, teacher) of layer numbers or module names; empty = spread evenly. See ``graphprune.training.layers``.
        project: Compare hidden states of other widths through a trainable linear layer, made by ``prepare``.
        teacher_weights: One for each teacher, positive; they are divided by their sum. None = equal.

    Raises:
        GraphPruneError: All weights are zero, or a value is out of range.
    """

    __call__: Callable[..., DistillationLoss]

    def __init__(
        self,
        teacher: Teacher | Sequence[Teacher],
        *,
        logits: float = 0.0,
        task: float = 0.0,
        hidden: float = 0.0,
        attentions: float = 0.0,
        embedding: float = 0.0,
        loss: LogitsKind = "kl",
        temperature: float = 1.0,
        hidden_loss: FeatureKind = "mse",
        layers: Sequence[LayerPair] = (),
        project: bool = True,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.teachers: tuple[Teacher, ...] = (teacher,) if isinstance(teacher, Teacher) else tuple(teacher)
        self.weights = {"logits": logits, "hidden": hidden, "attentions": attentions, "embedding": embedding}
        self.task, self.loss_kind, self.temperature = task, loss, temperature
        self.hidden_kind, self.layers, self.project = hidden_loss, check_layers(layers), project
        self.shares = teacher_shares(teacher_weights, len(self.teachers))
        _check(self)
        self.projections = nn.ModuleDict()
        self.prepared = False
        self._matcher = Matcher(self.layers)
        self._orders: list[tuple[int, ...] | None] = [None] * len(self.teachers)

    @classmethod
    def from_settings(
        cls,
        settings: DistillationSettings,
        teacher: Teacher | Sequence[Teacher],
        student: nn.Module | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> Distillation:
        """Make it from the ``distillation`` of a recipe.

        Args:
            settings: All but ``teacher``, which the caller has loaded.
            teacher: As for the class; for ``self``, ``frozen_copy`` of the model as it is before pruning.
            student: With ``example``, ``prepare`` is called.
            example: A batch.
        """
        names = ("logits", "task", "hidden", "attentions", "loss", "temperature", "hidden_loss", "layers", "project")
        made = cls(teacher, **{name: getattr(settings, name) for name in names})
        if student is not None and example is not None:
            made.prepare(student, example)
        return made

    # -- before training ----------------------------------------------------------------------------------------------

    def prepare(self, student: nn.Module, example: Mapping[str, Any]) -> None:
        """Run both once, compare labels and shapes, and make the projections; before the optimizer is made.

        Args:
            student: Run in eval mode without gradients; its mode is put back.
            example: A batch on the device of both; one row does.

        Raises:
            GraphPruneError: Labels, shapes or layers do not fit, or an output that a weight asks for is missing.
        """
        teacher = self.teachers[0]
        self._matcher.attach(student, teacher if isinstance(teacher, nn.Module) else None)
        inputs = {name: value for name, value in example.items() if not is_label(name)}
        given = {name: value for name, value in inputs.items() if name != ROW}
        with torch.no_grad():
            output = run_in_eval(student, {**given, **self.arguments(student)})
            output = self._matcher.collect(output, "student")
            taught = self.teach(inputs)
            if output.get("logits") is not None:
                config = getattr(inner_program(student) or student, "config", None)
                self._orders = [label_order(config, getattr(item, "config", None)) for item in self.teachers]
            self.projections = nn.ModuleDict()
            if self.weights["hidden"] and self.project:
                pairs = self._matcher.hidden(output, taught[0])
                widths = [(one.shape[-1], two.shape[-1]) for one, two in pairs]
                self.projections = make_projections(widths).to(
                    pairs[0][0].device, torch.promote_types(torch.float32, pairs[0][0].dtype)
                )
            self(output, taught, inputs, task_loss=torch.zeros(()))
        self.prepared = True

    def arguments(self, student: nn.Module) -> dict[str, bool]:
        """Arguments that a student must be called with so that it returns what is compared; none for a Program."""
        return {} if inner_program(student) is not None or not hasattr(student, "config") else self._wanted()

    def _wanted(self) -> dict[str, bool]:
        asked = {
            "output_hidden_states": bool(self.weights["hidden"]) and self._matcher.numbered,
            "output_attentions": bool(self.weights["attentions"]),
        }
        return {name: True for name, wanted in asked.items() if wanted}

    def close(self) -> None:
        """Take hooks off student and teacher; only named modules have any."""
        self._matcher.close()

    # -- the teacher --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any]) -> tuple[Output, ...]:
        """What the teachers say about a batch, without gradients.

        Args:
            inputs: The student's inputs by name; labels and inputs that a teacher does not take are left out.

        Returns:
            One output a teacher.
        """
        return tuple(self._taught(teacher, inputs) for teacher in self.teachers)

    def _taught(self, teacher: Teacher, inputs: Mapping[str, Any]) -> Output:
        if isinstance(teacher, TeacherCache):
            return teacher(inputs)
        extra = {} if getattr(teacher, "config", None) is None else self._wanted()
        output: Output = run_in_eval(teacher, {**accepted(teacher, inputs), **extra})
        return self._matcher.collect(output, "teacher")

    # -- the loss -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        student: Output,
        teacher: Output | Sequence[Output],
        inputs: Mapping[str, Any] | None = None,
        *,
        task_loss: Tensor | None = None,
        share: Entries = WHOLE,
    ) -> DistillationLoss:
        """The loss of one batch.

        Args:
            student: The student's output object.
            teacher: What ``teach`` returned, or one output.
            inputs: The batch: of it, ``attention_mask`` and ``labels`` say which tokens count.
            task_loss: In place of the loss in ``student``.
            share: What fraction of an accumulated batch this is, entry by entry; every mean is multiplied by its own.

        Raises:
            GraphPruneError: An output that a weight asks for is missing on either side, or shapes differ.
        """
        inputs = inputs or {}
        teachers = (teacher,) if isinstance(teacher, Mapping) else tuple(teacher)
        for output in (student, *teachers):
            if not isinstance(output, Mapping):
                raise GraphPruneError(
                    f"an output is a {type(output).__name__}; distillation reads outputs by name, return a mapping with 'logits'"
                )
        student = self._matcher.collect(student, "student")
        if task_loss is None:
            task_loss = student.get("loss")
        if self.task and task_loss is None:
            raise GraphPruneError(
                "the student returns no loss, and task is not 0; give it labels (and trace it with labels=True), or set task=0"
            )
        parts: dict[str, Tensor] = {}
        if self.weights["logits"]:
            parts["logits"] = self._logits(student, teachers, inputs, share)
        if self.weights["hidden"]:
            parts["hidden"] = self._hidden(student, teachers[0], inputs) * share.tokens
        if self.weights["attentions"]:
            parts["attentions"] = self._attentions(student, teachers[0], inputs) * share.tokens
        if self.weights["embedding"]:
            parts["embedding"] = _embedding(student, teachers[0], inputs) * share.rows
        distillation = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        if task_loss is not None and float(share.task) == 0:
            task_loss = torch.zeros_like(task_loss)  # a mean over no label at all is NaN, and so would its gradient be
        task = None if task_loss is None else task_loss * share.task
        total = distillation if task is None or not self.task else distillation + self.task * task
        return DistillationLoss(total, task, distillation, parts)

    def _logits(self, student: Output, teachers: Sequence[Output], inputs: Mapping[str, Any], share: Entries) -> Tensor:
        """The mean over the outputs that both have."""
        shared = [name for name in LOGITS if all(item.get(name) is not None for item in (student, *teachers))]
        if not shared:
            raise GraphPruneError(f"student and teacher share none of {', '.join(LOGITS)} to distil from")
        losses = []
        for name in shared:
            own, part = student[name], share.rows
            others = [self._ordered(item[name], number, name) for number, item in enumerate(teachers)]
            for other in others:
                check_shapes(name, own, other)
            mask = classes = None
            if name != "logits":  # positions are the classes, and those of padding are none
                classes = token_mask(inputs)
                classes = classes if classes is not None and classes.shape == own.shape else None
            elif own.dim() == 3:
                mask, part = labeled_mask(inputs, own.shape[:2]), share.labeled
            options: dict[str, Any] = {"mask": mask, "classes": classes, "weights": self.shares}
            losses.append(part * logits_loss(own, others, self.temperature, kind=self.loss_kind, **options))
        return torch.stack(losses).mean()

    def _ordered(self, logits: Tensor, number: int, name: str) -> Tensor:
        order = self._orders[number]
        return logits if order is None or name != "logits" else logits[..., list(order)]

    def _hidden(self, student: Output, teacher: Output, inputs: Mapping[str, Any]) -> Tensor:
        real, losses = token_mask(inputs), []
        for position, (one, two) in enumerate(self._matcher.hidden(student, teacher)):
            if str(position) in self.projections:
                projection = self.projections[str(position)]
                one = projection(one.to(next(projection.parameters()).dtype))
            if one.shape != two.shape:
                way = (
                    "call prepare(student, batch) before the optimizer is made: it makes a projection"
                    if self.project
                    else "allow projections with project=True"
                )
                raise GraphPruneError(
                    f"layer pair {position}: the student's is {list(one.shape)}, the teacher's {list(two.shape)}; map layers of "
                    f"one width, or {way}"
                )
            mask = real if real is not None and real.shape == one.shape[:-1] else None
            named = bool(self.layers) and isinstance(self.layers[position][0], str)
            kind = None if named else False
            losses.append(feature_loss(one, two, self.hidden_kind, mask=mask, distributions=kind))
        return torch.stack(losses).mean()

    def _attentions(self, student: Output, teacher: Output, inputs: Mapping[str, Any]) -> Tensor:
        real, losses = token_mask(inputs), []
        for one, two in self._matcher.attentions(student, teacher):
            mask = columns = None
            if real is not None and real.shape == (one.shape[0], one.shape[-1]):
                mask, columns = real[:, None, :], real[:, None, None, :]
            losses.append(feature_loss(one, two, self.hidden_kind, mask=mask, columns=columns, distributions=True))
        return torch.stack(losses).mean()

    # -- state --------------------------------------------------------------------------------------------------------

    def save_projections(self, folder: Path | str) -> None:
        """Write the projections into a checkpoint; nothing where there are none."""
        if self.projections:
            with written(Path(folder) / PROJECTIONS) as path:
                tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
                safetensors.torch.save_file(tensors, path)

    def load_projections(self, folder: Path | str) -> None:
        """Read the projections of a checkpoint; nothing where ``prepare`` made none.

        Raises:
            GraphPruneError: The file is missing, damaged, or of other layers.
        """
        if not self.projections:
            return
        path = Path(folder) / PROJECTIONS
        try:
            self.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, SafetensorError) as error:
            raise GraphPruneError(
                f"{path} cannot be read: {error}; the checkpoint was not written to its end, resume from an earlier one"
            ) from error
        except RuntimeError as error:
            raise GraphPruneError(f"{path} holds projections of other layers or widths: {error}") from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distillation:  # type: ignore[override]
        for teacher in self.teachers:  # they move along, though they are no part of the state
            if isinstance(teacher, nn.Module):
                teacher._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


def _embedding(student: Output, teacher: Output, inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None:
        raise GraphPruneError("the embedding loss pools over tokens and needs the attention mask")
    own, other = (mean_pool(item["last_hidden_state"], mask) for item in (student, teacher))
    return embedding_loss(own, other)


def _check(made: Distillation) -> None:
    if not made.teachers:
        raise GraphPruneError("distillation needs a teacher, and the list of teachers is empty")
    for name, weight in {**made.weights, "task": made.task}.items():
        if weight < 0:
            raise GraphPruneError(f"the weight {name}={weight} is negative; a weight is 0 or more")
    if not any(made.weights.values()):
        raise GraphPruneError(
            "distillation with all weights zero does nothing; set logits, hidden, attentions or embedding"
        )
    if made.temperature <= 0:
        raise GraphPruneError(f"temperature={made.temperature} is not positive")
    for value, known in ((made.loss_kind, LOGITS_KINDS), (made.hidden_kind, FEATURE_KINDS)):
        if value not in known:
            raise GraphPruneError(f"there is no loss {value!r}{suggest(value, known)}")
    if not any(weight for name, weight in made.weights.items() if name != "logits"):
        return
    if len(made.teachers) > 1:
        raise GraphPruneError(
            f"{len(made.teachers)} teachers teach their logits only; set hidden, attentions and embedding to 0"
        )
    if isinstance(made.teachers[0], TeacherCache):
        raise GraphPruneError(
            "a cache holds a teacher's logits only; give the teacher itself, or set hidden, attentions and embedding to 0"
        )
