"""A session inside Hugging Face's Trainer: made when training begins, saved with every checkpoint, resumed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graphprune.artifact.files import written
from graphprune.training.sampler import GradientSampler
from graphprune.training.session import Session

_FILE = "graphprune_session.pt"


class SessionCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the masks of the Program that a Trainer trains.

    Pass it as ``Trainer(model=program, callbacks=[SessionCallback()])``.

    Args:
        log: As for ``Session``.
        sampler: As for ``Session``.

    Attributes:
        session: The session, once training has begun.
    """

    def __init__(self, log: Path | str | None = None, sampler: GradientSampler | None = None) -> None:
        self.log = log
        self.sampler = sampler
        self.session: Session | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the session; where training resumes, load its state from the checkpoint."""
        epochs = max(1.0, float(state.num_train_epochs or 1))
        self.session = Session(
            kwargs["model"],
            kwargs["optimizer"],
            total_steps=state.max_steps,
            steps_per_epoch=max(1, round(state.max_steps / epochs)),
            sampler=self.sampler,
            log=self.log,
        )
        if state.global_step > 0:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE
            self.session.load_state_dict(torch.load(path, weights_only=True), random=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the session's state into the checkpoint."""
        if self.session is None or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / _FILE) as path:
            torch.save(self.session.state_dict(), path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off; the masks stay."""
        if self.session is not None:
            self.session.close()
