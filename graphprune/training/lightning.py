"""A session inside Lightning's Trainer: made when training begins, saved with every checkpoint, resumed with it."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.training.attaching import unwrap
from graphprune.training.randomness import set_random_state
from graphprune.training.sampler import GradientSampler
from graphprune.training.session import Session

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    """Lightning's ``Callback``: of the package that is imported already, else of the first that is installed, else ``object``."""
    for name in sorted(_PACKAGES, key=lambda item: item not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return object


_Callback: Any = _callback_class()


class LightningSession(_Callback):  # type: ignore[misc]
    """Drives the masks of the Program inside a LightningModule.

    Pass it as ``Trainer(callbacks=[LightningSession()])``. It logs ``sparsity`` at every optimizer step, and its state is saved in
    Lightning's checkpoints. A run in one process that is resumed from a checkpoint at the end of an epoch is bit-identical to one
    that was never broken off; within an epoch, Lightning itself does not find its place in the data again.

    Args:
        attribute: Name of the module's attribute that holds the Program, dotted where it is deeper inside; None finds the only one.
        total_steps: Steps of the optimizer in the whole run; None takes Lightning's estimate, which knows epochs and its own gradient
            accumulation. Say it where manual optimization does not step once a batch, or the data has no length.
        log: As for ``Session``.
        sampler: As for ``Session``.

    Attributes:
        session: The session, once training has begun.

    Raises:
        GraphPruneError: Lightning is not installed.
    """

    def __init__(
        self,
        attribute: str | None = None,
        *,
        total_steps: int | None = None,
        log: Path | str | None = None,
        sampler: GradientSampler | None = None,
    ) -> None:
        if _Callback is object:
            raise GraphPruneError(
                "LightningSession needs Lightning, which is not installed; run: pip install lightning"
            )
        self.attribute = attribute
        self.total_steps = total_steps
        self.log_file = log
        self.sampler = sampler
        self.session: Session | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._alone = True

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Note whether random generators may be restored: a checkpoint has those of the first process only."""
        self._alone = trainer.world_size == 1

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the session; where training resumes, load its state.

        Raises:
            GraphPruneError: There is no Program, or more than one, or the number of steps is not known; a checkpoint is resumed that
                was written without this callback.
            SparsityError: See ``Session`` and ``Session.load_state_dict``.
        """
        self._close()
        program = find_program(pl_module, self.attribute)
        total, each = self._steps(trainer)
        optimizer = _optimizer_of(program, trainer.optimizers)
        self.session = Session(
            program, optimizer, total_steps=total, steps_per_epoch=each, sampler=self.sampler, log=self.log_file
        )
        if self._resumed is not None:
            self.session.load_state_dict(self._resumed, random=False)  # as they were when the data was opened
            self._resumed = None
        elif trainer.global_step:
            raise GraphPruneError(
                "this checkpoint was written without a LightningSession, so masks and schedule cannot go on from it; resume from "
                "another one, or load its weights and start anew"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the sparsity."""
        if self.session is not None and masked_sites(self.session.program):
            pl_module.log("sparsity", self.session.sparsity)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take the hooks off; the masks stay."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Take the hooks off."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The session's state, for Lightning's checkpoint."""
        return self.session.state_dict() if self.session is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the session to come, and restore random generators before Lightning opens the data."""
        if state_dict:
            self._resumed = state_dict
            if self._alone:
                set_random_state(state_dict["random"])

    def _close(self) -> None:
        if self.session is not None:
            self.session.close()

    def _steps(self, trainer: Any) -> tuple[int, int | None]:
        """Optimizer steps of the run, and of an epoch where that is known."""
        batches = trainer.num_training_batches
        each = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
        if self.total_steps is not None:
            return self.total_steps, each
        estimate = trainer.estimated_stepping_batches
        if not math.isfinite(estimate) or estimate < 1:
            raise GraphPruneError(
                "Lightning does not know how many steps this run has, and a schedule needs them: give the Trainer max_epochs or "
                "max_steps, or LightningSession(total_steps=...)"
            )
        return int(estimate), each


def find_program(module: nn.Module, attribute: str | None = None) -> Program:
    """The Program inside a module.

    Args:
        module: Such as a LightningModule.
        attribute: Dotted name of the submodule that is or wraps the Program; None finds the only one.

    Raises:
        GraphPruneError: There is none under this name, none at all, or more than one.
    """
    if attribute is not None:
        try:
            return unwrap(module.get_submodule(attribute))
        except AttributeError as error:
            raise GraphPruneError(f"{type(module).__name__} has no module {attribute!r}: {error}") from error
    found = {name: item for name, item in module.named_modules() if isinstance(item, Program)}
    if not found:
        raise GraphPruneError(
            f"{type(module).__name__} holds no Program; assign one to an attribute in __init__: self.model = "
            f"graphprune.transform(...)"
        )
    if len(found) > 1:
        raise GraphPruneError(
            f"{type(module).__name__} holds several Programs ({', '.join(found)}); name the one to train, such as "
            f"LightningSession({next(iter(found))!r})"
        )
    return next(iter(found.values()))


def _optimizer_of(program: Program, optimizers: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer that holds the Program's masked weights, or most of its parameters."""
    wanted = {id(site.weight) for site in masked_sites(program)} or {id(item) for item in program.parameters()}
    if not optimizers:
        raise GraphPruneError("configure_optimizers returned no optimizer, so nothing trains the Program")
    return max(
        optimizers,
        key=lambda item: sum(id(value) in wanted for group in item.param_groups for value in group["params"]),
    )
