"""Hugging Face's Trainer with a teacher: a thin subclass that computes the loss, and keeps projections in its checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graphprune.errors import GraphPruneError
from graphprune.ir.interface import is_label
from graphprune.training.callback import SessionCallback
from graphprune.training.distillation import Distillation
from graphprune.training.entries import WHOLE, Entries, count_entries
from graphprune.training.teaching import ROW, inner_program

_INSIDE = ("hidden_states", "attentions")


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose student learns from a teacher too.

    The loss of a training step is that of ``Distillation``, as a mean over the whole accumulated batch of all processes:
    accumulating 2 batches of 4 gives the gradient of one batch of 8, also where they hold other numbers of tokens. Evaluation
    reports the student's own loss. The logs have ``task_loss`` and ``distillation_loss`` beside ``loss``, which is
    ``task weight * task_loss + distillation_loss``. Projections are trained by the Trainer's optimizer at its learning rate, clipped
    on a norm of their own, saved in every checkpoint and resumed from it.

    Args:
        *args: As for ``Trainer``; the model may be a Program, with a ``SessionCallback`` among the callbacks.
        distillation: Its teachers are moved to the Trainer's device. With a cached teacher the training set has the column
            ``teacher_row`` (``cache.add_rows``).
        **kwargs: As for ``Trainer``.

    Raises:
        GraphPruneError: Student and teacher do not fit (see ``Distillation.prepare``).
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise GraphPruneError(
                "this version of transformers divides losses by accumulation steps without asking; DistillationTrainer needs one "
                "whose Trainer has loss_is_scaled_for_ga: pip install --upgrade transformers"
            )
        self.distillation = distillation
        super().__init__(*args, **kwargs)
        program = inner_program(self._student)
        if program is not None and self.args.label_names is None:  # Trainer reads them from the name of the class
            self.label_names = [name for name in program.interface.names if is_label(name)]
        self._whole: Entries | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps_logged = 0
        distillation.to(self.args.device)
        example = self._example()
        if example is not None and not distillation.prepared:
            distillation.prepare(self._student, example)
        if distillation.projections and self.is_fsdp_enabled:
            raise GraphPruneError(
                "projections cannot be trained under FSDP, whose optimizer holds sharded parameters only; map layers of one width, "
                "set project=False, or train with DistributedDataParallel"
            )
        self.add_callback(_Projections(distillation))

    @property
    def _student(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    # -- data ---------------------------------------------------------------------------------------------------------

    def _example(self) -> Mapping[str, Any] | None:
        """The first row of the training set as a batch, without a step of any random generator."""
        data = self.train_dataset
        if data is None or not hasattr(data, "__len__") or not len(data):
            return None
        self._set_signature_columns_if_needed()
        known: set[str] | None = set(self._columns()) if self.args.remove_unused_columns else None
        row = {name: value for name, value in data[0].items() if known is None or name in known}
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            batch = self.data_collator([row])
        random.setstate(state)
        return self._prepare_inputs(dict(batch))  # type: ignore[no-any-return]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._columns():
            self._columns().append(ROW)

    def _columns(self) -> list[str]:
        columns: Any = self._signature_columns
        return columns  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimizer step; what counts in them is summed up, over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [
                count_entries(batch, shifted=getattr(self, "_loss_shifts_labels", False)).stacked() for batch in batches
            ]
            whole = torch.stack(counts).sum(0)
            if self._across:
                whole = self._reduce(whole.float().to(device), "sum")
            self._whole = Entries.unstacked(whole)
        return batches, items

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the loss of ``Distillation``; in evaluation the student's own."""
        given = {name: value for name, value in inputs.items() if name != ROW}
        if not model.training:
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        task_loss, output = self._run_student(model, dict(given))
        taught = self.distillation.teach(inputs)
        share, processes = self._share(inputs)
        loss = self.distillation(output, taught, inputs, task_loss=task_loss, share=share)
        self._add("distillation_loss", loss.distillation)
        if loss.task is not None:
            self._add("task_loss", loss.task)
        self._tell_session(loss.total, share)
        total = loss.total * processes
        return (total, output) if return_outputs else total

    def _run_student(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """The student's own loss, a mean over this batch, and its output; no loss where none is asked for and no labels are."""
        arguments = self.distillation.arguments(self._student)
        labeled = any(is_label(name) for name in inputs)
        if not labeled and not self.distillation.task:
            return None, model(**inputs, **arguments)
        loss, output = super().compute_loss(model, {**inputs, **arguments}, return_outputs=True)
        return loss.mean(), output

    def _share(self, inputs: Mapping[str, Any]) -> tuple[Entries, int]:
        """This batch's part of the whole, and what a mean over processes is multiplied by to make a sum."""
        if self._whole is None:
            return WHOLE, 1
        own = count_entries(inputs, shifted=getattr(self, "_loss_shifts_labels", False))
        return own.share(self._whole), self.args.world_size if self._across else 1

    @property
    def _across(self) -> bool:
        """Whether means are over the rows and tokens of all processes."""
        return bool(self.args.average_tokens_across_devices and self.args.world_size > 1)

    def _reduce(self, value: Tensor, how: str) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(value, how)  # type: ignore[no-untyped-call]
        return reduced

    def _tell_session(self, loss: Tensor, share: Entries) -> None:
        """Give a session the loss that is trained, in place of the student's own that it sees; in full, not this part's."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SessionCallback) and callback.session is not None:
                callback.session.record(loss=loss / max(float(share.rows), 1e-9))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As Trainer's; hidden states and attention maps, which only training needs, are no predictions."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", None) or ["past_key_values"])
        given = {name: value for name, value in inputs.items() if name != ROW}
        return super().prediction_step(model, given, prediction_loss_only, [*ignore_keys, *_INSIDE])

    # -- logs ---------------------------------------------------------------------------------------------------------

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; where the training loss is logged, its parts since the last time are too."""
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._steps_logged, 1)
            for name in sorted(self._sums):
                total = self._sums[name]
                if self.args.world_size > 1:
                    total = self._reduce(total, "sum" if self._across else "mean")
                logs[name] = round(float(total) / steps, 6)
            self._sums, self._steps_logged = {}, self.state.global_step
        super().log(logs, start_time)

    # -- projections --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the projections in groups of their own."""
        optimizer = super().create_optimizer(model)
        held = {id(item) for group in optimizer.param_groups for item in group["params"]}
        new = {name: item for name, item in self.distillation.named_parameters() if id(item) not in held}
        for decays in (True, False):
            group = [item for name, item in new.items() if name.endswith("weight") == decays]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": self.args.weight_decay if decays else 0.0})
        if new:
            optimizer.register_step_pre_hook(self._settle_projections)
        return optimizer

    def _settle_projections(self, *_: object) -> None:
        """Average the projections' gradients over processes, as DistributedDataParallel does the student's, and clip them."""
        parameters = [item for item in self.distillation.parameters() if item.grad is not None]
        if self.args.world_size > 1:
            for item in parameters:
                assert item.grad is not None
                item.grad = self._reduce(item.grad, "mean")
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.distillation.load_projections(resume_from_checkpoint)


class _Projections(TrainerCallback):  # type: ignore[misc]
    """Saves projections into every checkpoint, and clears their gradients after every step, as Trainer does the model's."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.distillation.zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.distillation.zero_grad()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.distillation.save_projections(folder)
