"""What a target is: where a Program is lowered to."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from graphprune.ir.program import Program
from graphprune.ir.properties import Property

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A loaded model: inputs by name to outputs by name."""


class Support(enum.Enum):
    """What a target does with a sparsity pattern or number format."""

    EXPLOITED = "exploited"
    STORED = "stored only"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote.

    Attributes:
        files: Names of the files, relative to the artifact folder, the model first.
        inputs: Names of the model's inputs.
        outputs: Names of the model's outputs.
        coverage: Names of sites by what became of them, such as ``{"int8": [...], "float": [...]}``.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    coverage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeight:
    """A site's weight as it lies in a lowered file.

    Attributes:
        values: Logical ``[out, in * kernel]``, float or integer.
        zero_point: The integer that stands for zero, ``[out]`` or ``[]``; None for float weights.
        scale: Scale of each row or of all, None for float weights.
    """

    values: np.ndarray
    zero_point: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def zeros(self) -> np.ndarray:
        """Bool ``[out, in * kernel]``: where the stored weight is exactly zero."""
        if self.zero_point is None:
            return np.asarray(self.values == 0)
        return np.asarray(self.values == np.reshape(self.zero_point, (-1, 1)))


@dataclass(frozen=True)
class Target(abc.ABC):
    """A runtime that Programs are lowered to. Its fields are its options; importing it needs none of its libraries.

    Attributes:
        name: How recipes and the command line call it.
        requires: Properties that the Program must have.
        legalize: Pipeline text of the passes that run on a copy of the Program before lowering.
        extra: The extra of the package that installs its libraries, "" for none.
    """

    name: ClassVar[str]
    requires: ClassVar[Property] = Property.FUNCTIONAL
    legalize: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """What becomes of each sparsity pattern and number format, by their names."""

    @abc.abstractmethod
    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write the model into ``folder``.

        Args:
            program: Legalized, in eval mode; not to be mutated.
            folder: An empty folder.

        Raises:
            LoweringError: Something in the Program has no form in this target.
        """

    @abc.abstractmethod
    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load the lowered model of an artifact, to run it any number of times.

        Args:
            folder: An artifact.
            threads: Threads of the runtime; None leaves its default.

        Returns:
            A function from inputs by name to outputs by name.

        Raises:
            LoweringError: The runtime is not installed, or the folder holds no model.
        """

    @abc.abstractmethod
    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read the weights of sites out of the lowered file.

        Args:
            folder: An artifact.
            layouts: Sites to read, each with its layout (``out_in``, ``in_out`` or ``conv``).

        Returns:
            Weights by site. A site that the file does not have is absent.
        """
