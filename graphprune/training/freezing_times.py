"""When observers and batch normalization of a Program stop following the data, as ``insert-fake-quant`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphprune.errors import SparsityError
from graphprune.ir.program import Program
from graphprune.ir.quantizing import FreezeTimes
from graphprune.sparsity.windows import steps


class FreezingTimes:
    """Freezes parts of a Program when their time comes.

    Args:
        program: Its output may be annotated with ``FreezeTimes``.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, where that is known.

    Attributes:
        at: Optimizer steps after which each part is frozen: ``observers``, ``batch-norm``.

    Raises:
        SparsityError: A time lies behind the end of training or is in epochs of unknown length, or observers would be frozen
            before batch normalization, whose statistics decide on what they see.
    """

    def __init__(self, program: Program, total_steps: int, steps_per_epoch: int | None) -> None:
        times: FreezeTimes = program.annotation(program.output, FreezeTimes) or FreezeTimes()
        self.program = program
        self.at: dict[str, int] = {}
        for part, option in (("observers", "freeze_observers"), ("batch-norm", "freeze_batch_norm")):
            time = getattr(times, option)
            if time is None:
                continue
            self.at[part] = steps(option, time, total_steps, steps_per_epoch)
            if self.at[part] > total_steps:
                raise SparsityError(
                    f"{option}={time!r} is after {self.at[part]} steps, and training has {total_steps}; make it earlier, or "
                    f"leave it out to freeze nothing"
                )
        if self.at.get("observers", total_steps) < self.at.get("batch-norm", 0):
            raise SparsityError(
                f"freeze_observers ({self.at['observers']} steps) comes before freeze_batch_norm ({self.at['batch-norm']} "
                f"steps), which changes what the observers see; freeze batch normalization first, or both at once"
            )

    def act(self, step: int) -> None:
        """Freeze what is due after ``step`` optimizer steps."""
        due = {part for part, when in self.at.items() if when <= step} - self.program.frozen
        if due:
            self.program.freeze(*due)

    def state_dict(self) -> dict[str, Any]:
        """What is frozen and when the rest will be; numbers and text only."""
        return {"at": dict(self.at), "frozen": sorted(self.program.frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze what was frozen where ``state_dict`` was taken, and nothing else.

        Raises:
            SparsityError: The state has other times.
        """
        if dict(state["at"]) != self.at:
            raise SparsityError(
                f"the state freezes at steps {dict(state['at'])}, this Program at {self.at}; load it into the same recipe"
            )
        self.program.frozen = frozenset(state["frozen"])
        self.program.train(self.program.training)

    def __str__(self) -> str:
        return ", ".join(
            f"{part} {'frozen' if part in self.program.frozen else f'to be frozen after step {self.at[part]}'}"
            for part in sorted(self.program.frozen | self.at.keys())
        )
