"""The demo's training loop: pruning, then quantization-aware training, with checkpoints that resume bit-identically."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from graphprune.artifact.files import written
from graphprune.demo.corpus import batches, pad
from graphprune.demo.settings import Settings
from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.training import Distillation, Session

CHECKPOINT = "checkpoint.pt"


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after a step, and its checkpoint is written."""


@dataclass
class TeacherCache:
    """Hidden states of the teacher for every training sentence, float16 ``[layers + 1, tokens, features]`` each.

    They are computed once, so that no step has to run the teacher.
    """

    states: list[Tensor] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def build(cls, teacher: nn.Module, items: Sequence[Sequence[int]], progress: Progress) -> TeacherCache:
        """Run the teacher over all sentences."""
        states: list[Tensor] = [torch.empty(0)] * len(items)
        epoch = batches(items, 1024, seed=0, jitter=0)
        for batch in progress.track(epoch, description="teacher's hidden states"):
            ids, mask = pad([items[index] for index in batch])
            hidden = torch.stack(
                teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states, 1
            )
            for row, index in enumerate(batch):
                states[index] = hidden[row, :, : len(items[index])].half()
        return cls(states)

    def output(self, batch: Sequence[int], shape: torch.Size) -> dict[str, Any]:
        """The teacher's output for a batch, as its model would return it."""
        layers, _, features = self.states[batch[0]].shape
        padded = torch.zeros(len(batch), layers, shape[1], features)
        for row, index in enumerate(batch):
            padded[row, :, : self.states[index].shape[1]] = self.states[index]
        hidden = padded.unbind(1)
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}


@dataclass
class Stage:
    """One stretch of training.

    Attributes:
        name: ``prune`` or ``quantize``.
        steps: Optimizer steps.
        rate: Peak learning rate.
    """

    name: str
    steps: int
    rate: float

    def learning_rate(self, step: int, warm_up: float) -> float:
        """Linear warm-up, then a cosine to zero."""
        rising = max(1, int(warm_up * self.steps))
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


@dataclass
class Trainer:
    """Trains a Program against the cached teacher, stage by stage.

    Attributes:
        out: Folder of the checkpoint and the log.
        settings: Numbers of the run.
        items: Token ids of the training sentences.
        cache: What the teacher said about them.
        distillation: The loss.
    """

    out: Path
    settings: Settings
    items: Sequence[Sequence[int]]
    cache: TeacherCache
    distillation: Distillation

    def train(self, program: Program, stage: Stage, progress: Progress, saved: dict[str, Any] | None) -> None:
        """Train one stage, from its beginning or from a checkpoint.

        Args:
            program: Trained in place.
            stage: Which.
            progress: Shows steps, loss and remaining time.
            saved: A checkpoint of this stage to go on from.

        Raises:
            Interrupted: Ctrl-C; the step was finished and a checkpoint written.
        """
        program.train()
        parameters = [item for item in program.parameters() if item.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        session = Session(program, optimizer, total_steps=stage.steps, log=self.out / f"{stage.name}.jsonl")
        if saved is not None:
            program.load_state_dict(saved["program"], strict=False)
            optimizer.load_state_dict(saved["optimizer"])
            session.load_state_dict(saved["session"])
        task = progress.add_task(f"{stage.name}", total=stage.steps, completed=session.step)
        with session, _interrupt_flag() as interrupted:
            for batch in self._stream(session.step, stage):
                for group in optimizer.param_groups:
                    group["lr"] = stage.learning_rate(session.step, self.settings.warm_up)
                loss = self._loss(program, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                session.record(loss=loss)
                optimizer.step()
                optimizer.zero_grad()
                description = f"{stage.name}  sparsity {session.sparsity:.3f}  loss {float(loss.detach()):.3f}"
                progress.update(task, completed=session.step, description=description)
                due = session.step % self.settings.checkpoint_every == 0
                if (due and session.step < stage.steps) or interrupted:
                    self.save(program, stage, optimizer, session)
                if interrupted:
                    raise Interrupted

    def _stream(self, done: int, stage: Stage) -> Iterator[list[int]]:
        """Batches from step ``done`` on; which batch a step gets depends on seed and step alone."""
        step, epoch = 0, 0
        while step < stage.steps:
            for batch in batches(self.items, self.settings.tokens, seed=self.settings.seed * 1_000 + epoch):
                if step >= stage.steps:
                    return
                if step >= done:
                    yield batch
                step += 1
            epoch += 1

    def _loss(self, program: Program, batch: list[int]) -> Tensor:
        ids, mask = pad([self.items[index] for index in batch])
        output = program(input_ids=ids, attention_mask=mask)
        return self.distillation(output, self.cache.output(batch, ids.shape), {"attention_mask": mask}).total

    def save(
        self, program: Program, stage: Stage, optimizer: torch.optim.Optimizer | None, session: Session | None
    ) -> None:
        """Write the checkpoint; without an optimizer it marks the stage as finished."""
        frozen = {name for name, item in program.named_parameters() if not item.requires_grad}
        state = {name: value for name, value in program.state_dict().items() if name not in frozen}
        content = {
            "settings": asdict(self.settings),
            "stage": stage.name,
            "step": stage.steps if session is None else session.step,
            "program": state,
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "session": None if session is None else session.state_dict(),
        }
        with written(self.out / CHECKPOINT) as path:
            torch.save(content, path)


def read_checkpoint(out: Path, settings: Settings) -> dict[str, Any]:
    """Read the checkpoint of an earlier run.

    Raises:
        GraphPruneError: There is none, it is damaged, or it is of a run with other settings.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise GraphPruneError(f"{path} does not exist, so there is nothing to resume; start without --resume")
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises anything for a damaged file
        raise GraphPruneError(f"{path} cannot be read: {error}; start without --resume") from error
    if content["settings"] != asdict(settings):
        differ = [key for key, value in asdict(settings).items() if content["settings"].get(key) != value]
        raise GraphPruneError(
            f"{path} is of a run with other settings ({', '.join(differ)}); resume with the same options, or start anew"
        )
    return content


@contextmanager
def _interrupt_flag() -> Iterator[list[bool]]:
    """Collect Ctrl-C in a list instead of breaking a step in the middle; a second one breaks it all the same."""
    hits: list[bool] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if hits:
            raise KeyboardInterrupt
        hits.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield hits
    finally:
        signal.signal(signal.SIGINT, before)
