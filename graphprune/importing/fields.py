"""Reading options one by one, so that whatever nobody read can be listed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from graphprune.errors import RecipeError, suggest
from graphprune.importing.document import Node, plain_scalar
from graphprune.importing.quantity import Quantity, allowed, evaluate, expression_of


@dataclass(frozen=True)
class NotCarried:
    """Something of the source that the recipe does not have.

    Attributes:
        line: Where it stands in the source, counted from 1.
        key: Its path, such as ``pruning_modifiers.GMPruningModifier.phased``.
        reason: Why, and what to do instead.
    """

    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.key}: {self.reason}"


@dataclass
class Ledger:
    """What could not be carried, and what is worth knowing about what was."""

    entries: list[NotCarried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, line: int, key: str, reason: str) -> None:
        """List something as not carried."""
        entry = NotCarried(line, key, reason)
        if entry not in self.entries:
            self.entries.append(entry)

    def note(self, text: str) -> None:
        """Remember something for the reader; once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Scope:
    """What ``eval(...)`` may refer to.

    Attributes:
        values: Values by name, in a recipe's spelling; lists too.
        inlined: Names whose value is put in, because the recipe has no variable for them.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    inlined: frozenset[str] = frozenset()


class Fields:
    """The options of one part of a file.

    Args:
        node: A mapping; anything else is listed and read as empty.
        path: Its path, for messages.
        ledger: Where to list what cannot be carried.
        scope: What ``eval(...)`` may refer to.
    """

    def __init__(self, node: Node, path: str, ledger: Ledger, scope: Scope | None = None) -> None:
        self.node, self.path, self.ledger = node, path, ledger
        self.scope = scope or Scope()
        self._read: set[str] = set()
        if not isinstance(node.value, Mapping) and node.value is not None:
            ledger.add(node.line, path, f"a mapping of options belongs here, not {node.plain()!r}")

    def __contains__(self, name: str) -> bool:
        return name in self.node.mapping

    def at(self, name: str) -> str:
        """The path of an option."""
        return f"{self.path}.{name}" if self.path else name

    def line(self, *names: str) -> int:
        """Where the first of these options stands; else where the part begins."""
        return next((self.node.mapping[name].line for name in names if name in self), self.node.line)

    def refuse(self, name: str, reason: str) -> None:
        """List an option as not carried."""
        self._read.add(name)
        self.ledger.add(self.line(name), self.at(name), reason)

    def unread(self, name: str) -> bool:
        """Whether an option is given and nobody read it so far."""
        return name in self and name not in self._read

    def take(self, *names: str) -> Node | None:
        """The first of these options that is given, not null; all count as read."""
        self._read.update(names)
        given = [self.node.mapping[name] for name in names if name in self]
        for name in [name for name in names if name in self][1:]:
            self.refuse(name, f"{names[0]} says the same and was taken")
        return given[0] if given and given[0].value is not None else None

    def name_of(self, *names: str) -> str:
        """The one of these names that is given; the first where none is."""
        return next((name for name in names if name in self), names[0])

    def _value(self, *names: str) -> object:
        """A scalar or list, ``eval(...)`` worked out; None where it is not given or cannot be worked out."""
        node = self.take(*names)
        if node is None:
            return None
        name = self.name_of(*names)
        if node.tag:
            self.refuse(name, f"{node.value} is worked out by a program, and a recipe is plain data; write the value")
            return None
        inside = expression_of(node.value)
        if inside is None:
            return node.plain()
        try:
            return evaluate(inside, self.scope.values)
        except RecipeError as error:
            self.refuse(name, f"cannot be evaluated: {error}")
            return None

    def number(self, *names: str) -> Quantity | None:
        """A number; as an expression where it was one."""
        value = self._value(*names)
        if value is None:
            return None
        name = self.name_of(*names)
        value = plain_scalar(value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.refuse(name, f"{value!r} is no finite number")
            return None
        return self.quantity(value, expression_of(self.node.mapping[name].value))

    def quantity(self, value: int | float, inside: str | None) -> Quantity:
        """A value with the expression that it came from, where the recipe can have that."""
        words = set() if inside is None else {*_words(inside)}
        symbolic = words & {*self.scope.values} and not words & self.scope.inlined
        return Quantity(value, allowed(inside) if symbolic and inside is not None else "")

    def text(self, *names: str) -> str | None:
        """A text, or a number as text."""
        value = self._value(*names)
        if value is None or isinstance(value, (str, int, float)):
            return None if value is None else str(value)
        self.refuse(self.name_of(*names), f"{value!r} is no text")
        return None

    def flag(self, *names: str) -> bool | None:
        """True or false; 1 and 0 count as such."""
        value = self._value(*names)
        if value is None or isinstance(value, (bool, int)):
            return None if value is None else bool(value)
        self.refuse(self.name_of(*names), f"{value!r} is neither true nor false")
        return None

    def texts(self, *names: str) -> tuple[str, ...] | None:
        """Texts; a single one counts as a list of one."""
        value = self._value(*names)
        if value is None:
            return None
        listed = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, (str, int, float)) for item in listed):
            return tuple(str(item) for item in listed)
        self.refuse(self.name_of(*names), f"{value!r} is no list of texts")
        return None

    def plain(self, *names: str) -> object:
        """Whatever is there, as plain data."""
        return self._value(*names)

    def drop(self, reason: str, *names: str, unless: tuple[object, ...] = (None,)) -> None:
        """List options that have no equivalent, where they are given and say anything but ``unless``."""
        for name in names:
            value = self._value(name)
            if name in self and not any(value is item or (value == item and item is not None) for item in unless):
                self.refuse(name, reason)

    def describe(self, what: str, *names: str) -> None:
        """Options that describe and change nothing: kept as a note."""
        said = {name: self.node.mapping[name].plain() for name in names if name in self}
        self._read.update(names)
        if said:
            self.ledger.note(f"{what}: {', '.join(f'{name} {value}' for name, value in said.items())}")

    def close(self, known: tuple[str, ...] = ()) -> None:
        """List every option that nobody read."""
        for name, node in self.node.mapping.items():
            if name not in self._read:
                hint = suggest(name, {*self._read, *known})
                close = hint if hint.startswith("; did you mean") else ""
                self.ledger.add(node.line, self.at(name), f"unknown option{close}; nothing was made of it")


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() or char == "_" else " " for char in text).split()
