"""Files of measurements: JSON that is whole or not there, settings that must agree before they are continued, tables as text."""

from __future__ import annotations

import abc
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

from rich.console import Console, Group, RenderableType

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError

_WIDTH = 10_000  # plain text is never cut: columns are as wide as their widest entry


class Measurements(abc.ABC):
    """What a long search has measured, as a file that the next run goes on with.

    Attributes:
        kind: What its file is called in messages.
        file_format: The number under ``format`` in its file.
        settings: A dataclass of everything that must agree before a file is continued.
    """

    kind: ClassVar[str]
    file_format: ClassVar[int] = 1
    settings: Any

    @abc.abstractmethod
    def to_dict(self) -> dict[str, object]:
        """As plain data, with ``format``."""

    @classmethod
    @abc.abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read ``to_dict`` back; may raise KeyError, TypeError, ValueError or AttributeError."""

    @abc.abstractmethod
    def table(self) -> Group:
        """What was measured, for people."""

    def save(self, path: Path | str) -> Path:
        """Write a JSON file, whole or not at all.

        Raises:
            GraphPruneError: It cannot be written.
        """
        with written(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what ``save`` wrote.

        Raises:
            GraphPruneError: The file cannot be read, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GraphPruneError(f"{path} cannot be read: {error}") from error
        try:
            if data["format"] != cls.file_format:
                raise GraphPruneError(f"{path} has format {data['format']}; this graphprune reads {cls.file_format}")
            return cls.from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphPruneError(
                f"{path} is no {cls.kind} file ({type(error).__name__}: {error}); choose another file, or delete it"
            ) from error

    def continued(self, path: Path | str | None, verb: str, differs: Callable[[Self], str]) -> Self:
        """Return what an earlier run of the same settings left in a file, or this where there is none.

        Args:
            path: The file.
            verb: What was done, for messages, such as ``tuned``.
            differs: Says how what was measured differs from this; empty where it does not.

        Raises:
            GraphPruneError: The file is of other settings, or of something else.
        """
        if path is None or not Path(path).exists():
            return self
        found = type(self).load(path)
        hint = "choose another file, or delete it to start anew"
        pairs = [
            (item.name, getattr(found.settings, item.name), getattr(self.settings, item.name))
            for item in fields(self.settings)
        ]
        if different := ", ".join(f"{name} {mine!r} and not {other!r}" for name, mine, other in pairs if mine != other):
            raise GraphPruneError(f"{path} was {verb} with {different}; {hint}")
        if different := differs(found):
            raise GraphPruneError(f"{path} {different}; {hint}")
        return found

    def __rich__(self) -> Group:
        return self.table()

    def __str__(self) -> str:
        return plain_text(self.table())


def plain_text(renderable: RenderableType) -> str:
    """A table as text without colors, folds and trailing spaces."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
