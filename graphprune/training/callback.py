"""A session inside Hugging Face's Trainer: made when training begins, saved with every checkpoint, resumed with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graphprune.errors import SparsityError
from graphprune.ir.masking import masked_sites
from graphprune.training.sampler import GradientSampler
from graphprune.training.session import Session
from graphprune.training.session_file import SESSION_FILE, read_session, write_session

_TRAINING_LOSSES = ("loss", "train_loss")
"""One of them is in each log of training; logs of evaluation, which evaluations return too, are left as they are."""


class SessionCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the masks of the Program that a Trainer trains.

    Pass it as ``Trainer(model=program, callbacks=[SessionCallback()])``: the Trainer's log history then has ``sparsity`` beside each
    training loss. For TensorBoard and everything else in ``report_to`` to show it too, give it to a finished Trainer instead, with
    ``SessionCallback().attach(trainer)``: a Trainer calls those that report before the ones it was given.

    Args:
        log: As for ``Session``.
        sampler: As for ``Session``.
        checkpoint: Folder of the checkpoint that training resumes from, where it is not one of the Trainer's own in ``output_dir``.

    Attributes:
        session: The session, once training has begun.
    """

    def __init__(
        self,
        log: Path | str | None = None,
        sampler: GradientSampler | None = None,
        checkpoint: Path | str | None = None,
    ) -> None:
        self.log = log
        self.sampler = sampler
        self.checkpoint = checkpoint
        self.session: Session | None = None

    def attach(self, trainer: Trainer) -> SessionCallback:
        """Put this callback in front of all others of a Trainer, so that what reports its logs finds the sparsity in them."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(item for item in callbacks if item is not self)]
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the session; where training resumes, load its state from the checkpoint.

        Raises:
            GraphPruneError: The checkpoint has no session's state, or a damaged one.
            SparsityError: See ``Session`` and ``Session.load_state_dict``.
        """
        if self.session is not None:  # the Trainer begins anew, as where it looks for a batch size
            self.session.close()
        self.session = Session(
            kwargs["model"],
            kwargs["optimizer"],
            total_steps=state.max_steps,
            steps_per_epoch=_steps_per_epoch(args, state, kwargs.get("train_dataloader")),
            sampler=self.sampler,
            log=self.log,
        )
        if state.global_step > 0:
            read_session(self._resumed(args, state) / SESSION_FILE, self.session, random=False)

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.checkpoint is not None:
            return Path(self.checkpoint)
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sparsity into what is logged, and into the log history, which has a copy of it already."""
        logs = kwargs["logs"]
        if self.session is None or not any(name in logs for name in _TRAINING_LOSSES):
            return
        if masked_sites(self.session.program):
            logs["sparsity"] = round(self.session.sparsity, 6)
            state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the session's state into the checkpoint."""
        if self.session is not None and args.should_save:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_session(folder / SESSION_FILE, self.session)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off; the masks stay.

        Raises:
            SparsityError: ``load_best_model_at_end`` has put weights back from before the masks had reached their sparsity.
        """
        if self.session is None:
            return
        self.session.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and not self.session.done:
            raise SparsityError(
                f"load_best_model_at_end went back to {state.best_model_checkpoint}, from before the masks had reached their sparsity; "
                f"leave it off, or keep only checkpoints from after the last mask update"
            )


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Optimizer steps of an epoch, as the Trainer counts them: of this process's loader, which has its share of the batches."""
    try:
        batches = len(loader)
    except TypeError:  # a stream: the Trainer knows no epochs either
        return max(1, round(state.max_steps / max(1.0, float(state.num_train_epochs or 1))))
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
