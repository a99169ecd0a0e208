"""What a pass is, and what it returns."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.ir.properties import Property

NEEDS_DATA = (
    "needs calibration data: give it with gp.transform(..., data=batches) or PassManager(..., data=batches), on the command "
    "line with graphprune transform --data FILE"
)
"""What to do about a missing ``data``; follows the name of a pass."""


@dataclass(frozen=True)
class Coverage:
    """What a pass matched, and what it left out and why, by name."""

    matched: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: The Program it was given, rewritten.
        changed: Whether anything in it differs now.
        stats: Counts and measures by name, for people.
        coverage: What matched and what did not.
    """

    program: Program
    changed: bool
    stats: Mapping[str, int | float] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A named step from Program to Program. Its fields are its options.

    Attributes:
        name: Verb-noun, with hyphens; how recipes call it.
        requires: Properties that must hold before it runs.
        establishes: Properties that hold after it.
        destroys: Properties that no longer hold after it.
        forbids: Properties that must not hold when it runs. By default a pass sees flat graphs only; one that can cope with
            blocks says ``forbids = Property.NONE``.
    """

    name: ClassVar[str]
    requires: ClassVar[Property] = Property.NONE
    establishes: ClassVar[Property] = Property.NONE
    destroys: ClassVar[Property] = Property.NONE
    forbids: ClassVar[Property] = Property.PARTITIONED

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite ``program`` in place and say what was done.

        Raises:
            GraphPruneError: The pass cannot do what its options ask for.
        """

    def recorded(self) -> Pass:
        """The pass as a Program's history keeps it, to be replayed anywhere: with what it takes from this machine written out."""
        return self

    def options(self) -> dict[str, object]:
        """Options that differ from their defaults, by name."""
        return {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }

    def __str__(self) -> str:
        from graphprune.pipeline.text import format_pass

        return format_pass(self.name, self.options())


@dataclass(frozen=True)
class DataPass(Pass):
    """A pass that looks at calibration data: inputs of the kind that the model will get, without labels."""

    @abc.abstractmethod
    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        """Rewrite ``program`` in place by what the data shows, and say what was done.

        Args:
            program: The Program. Where all its tensors are on the meta device a saved one is being rebuilt: the graph must
                then change exactly as it would with any data, and values are left to who loads them.
            batches: Mappings of inputs by name, tuples of positional inputs, or single tensors; iterated once. Empty where
                the tensors are on the meta device.

        Raises:
            GraphPruneError: The pass cannot do what its options ask for, or the data is empty or does not fit the Program.
        """

    def run(self, program: Program) -> PassResult:
        """Refuse: there is no data here.

        Raises:
            PassError: Always; says how to give data.
        """
        raise PassError(f"{self.name} {NEEDS_DATA}")
