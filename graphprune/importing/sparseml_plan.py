"""What the modifiers of a SparseML stage ask for, before it is cut into stages of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields
from graphprune.importing.quantity import Quantity

ZERO = Quantity(0)


@dataclass(frozen=True)
class Origin:
    """Where something stands in the source, for messages."""

    line: int
    key: str

    @classmethod
    def of(cls, fields: Fields, *names: str) -> Origin:
        """The first of these options that is given; else the modifier."""
        name = fields.name_of(*names) if names else ""
        return cls(fields.line(*names), fields.at(name) if name in fields else fields.path)


@dataclass(frozen=True)
class Pruning:
    """Masks that are driven from ``start`` to ``end``, in epochs; None = to the end of training.

    Attributes:
        origin: Where it stands.
        start: First update.
        end: Last update.
        step: The pass without its times.
        every: Between updates; None = each step.
        sites: What it selects, for masks that are locked in a later stage.
        stays: Whether the zeros hold after ``end``.
        timed: Whether it has updates at all; a one-shot stage has none.
    """

    origin: Origin
    start: Quantity
    end: Quantity | None
    step: Step
    every: Quantity | None = None
    sites: Options = field(default_factory=dict)
    stays: bool = True
    timed: bool = True


@dataclass(frozen=True)
class Lock:
    """Zeros that hold from ``start`` on."""

    origin: Origin
    start: Quantity
    sites: Options


@dataclass(frozen=True)
class Rate:
    """A learning rate from ``start`` to ``end``, in epochs; after a warm-up a function begins at ``falls_from``."""

    origin: Origin
    start: Quantity
    end: Quantity | None
    kind: str
    first: Quantity
    last: Quantity
    cycle: Quantity | None = None
    falls_from: Quantity | None = None


@dataclass(frozen=True)
class Quantizing:
    """Quantization from ``start`` on; observers and batch statistics stay as they are from these epochs on."""

    origin: Origin
    start: Quantity
    before: tuple[Step, ...]
    plan: Step
    observers: Quantity | None = None
    batch_norm: Quantity | None = None
    batches: Quantity | None = None


@dataclass(frozen=True)
class Teaching:
    """Distillation from ``start`` to ``end``; what it says of the loss."""

    origin: Origin
    start: Quantity
    end: Quantity | None
    settings: Options


@dataclass
class Plan:
    """All of it.

    Attributes:
        one_shot: Whether nothing is trained.
        epochs: Length of training, where it is said.
    """

    one_shot: bool = False
    epochs: Quantity | None = None
    prunings: list[Pruning] = field(default_factory=list)
    locks: list[Lock] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    quantizing: list[Quantizing] = field(default_factory=list)
    teaching: list[Teaching] = field(default_factory=list)
    smoothing: list[Step] = field(default_factory=list)
    training: Options = field(default_factory=dict)


def start_of(fields: Fields) -> Quantity:
    """The epoch from which a modifier works; -1 = the beginning."""
    found = fields.number("start_epoch", "start")
    return ZERO if found is None or found.value < 0 else found


def end_of(fields: Fields) -> Quantity | None:
    """The epoch at which a modifier ends; None = the end of training."""
    found = fields.number("end_epoch", "end")
    return None if found is None or found.value < 0 else found


def every_of(fields: Fields) -> Quantity | None:
    """The epochs between updates; None = every step."""
    found = fields.number("update_frequency", "update")
    return None if found is None or found.value <= 0 else found
