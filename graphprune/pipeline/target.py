"""What a target is: where a Program is lowered to."""

from __future__ import annotations

import abc
import enum
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.properties import Property

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A loaded model: inputs by name to outputs by name."""


PATTERNS = ("unstructured", "NxM", "N:M", "channel")
"""Rows of a capability table for sparsity patterns: single weights, blocks, N of M consecutive inputs, whole channels."""
FORMATS = (
    "fp32", "fp16", "bf16", "int8", "uint8", "int4", "uint4", "int8 per group", "int4 per group", "dynamic uint8",
)  # fmt: skip
"""Rows for number formats, of weights and of activations; ``dynamic uint8`` is an activation whose range is found at run time."""


class Support(enum.Enum):
    """What a target does with a sparsity pattern or number format.

    ``EXPLOITED``: the runtime does less work for it, or smaller work: zeros are skipped, integers are multiplied as integers; float32
    is computed by kernels made for speed. ``STORED``: it is in the file as the Program has it and computed right, and nothing is faster
    for it. ``IGNORED``: the model is lowered without it and computes something else there. ``REFUSED``: ``export`` raises an error.
    """

    EXPLOITED = "exploited"
    STORED = "stored only"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote.

    Attributes:
        files: Names of the files, relative to the artifact folder, the model first.
        inputs: Names of the model's inputs.
        outputs: Names of the model's outputs.
        coverage: Names of weights by what became of them, such as ``{"int8": [...], "float": [...]}``.
        passes: At how many places each pass of the target changed the model, by name, in their order.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    coverage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    passes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeight:
    """A site's weight as it lies in a lowered file.

    Attributes:
        values: Logical ``[out, in * kernel]``, float or integer.
        zero_point: The integer that stands for zero, ``[out]``, ``[]``, or ``[out, groups]`` where equal parts of each row have
            their own; None for float weights.
        scale: Scale of each row, of all, or of each group, None for float weights.
    """

    values: np.ndarray
    zero_point: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def zeros(self) -> np.ndarray:
        """Bool ``[out, in * kernel]``: where the stored weight is exactly zero."""
        if self.zero_point is None:
            return np.asarray(self.values == 0)
        zero_point = np.asarray(self.zero_point).astype(np.int32)
        if zero_point.ndim < 2:
            zero_point = zero_point.reshape(-1, 1)
        else:
            zero_point = np.repeat(zero_point, -(-self.values.shape[1] // zero_point.shape[1]), axis=1)
        return np.asarray(self.values.astype(np.int32) == zero_point[:, : self.values.shape[1]])


@dataclass(frozen=True)
class NodeValue:
    """What a lowered model computes inside, at the place of a value of the Program.

    Attributes:
        values: Integers for a quantized value, else floats.
        scale: Scale by which the file quantizes it, None where it does not, or where that cannot be told.
        zero_point: Its zero-point, likewise.
    """

    values: np.ndarray
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Choice:
    """How a target is going to compute one layer.

    Attributes:
        text: In words, short: ``sparse, 3.1x``.
        measures: What stands behind it, as plain data by name, for JSON.
    """

    text: str
    measures: Mapping[str, str | float | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """How a target is going to compute the layers of a Program.

    Attributes:
        layers: By name of the layer's weight; empty where the target has one way only.
        remark: What must be known to read them, such as what was measured; "" for nothing.
    """

    layers: Mapping[str, Choice] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Target(abc.ABC):
    """A runtime that Programs are lowered to. Its fields are its options; importing it needs none of its libraries.

    Attributes:
        name: How recipes and the command line call it.
        requires: Properties that the Program must have.
        legalize: Pipeline text of the passes that run on a copy of the Program before lowering.
        extra: The extra of the package that installs its libraries, "" for none.
        fresh: Whether what it writes must be seen to run in a process that has not lowered it: true where loading could lean on
            what Python has in memory (operators that were registered, classes, a compiler's cache).
        any_graph: Whether it lowers any graph, and so the beginning of one, in search of an operator that differs; not where it goes
            back to the source model's class.
        elsewhere: Library that lowering itself needs and that has an environment of its own; "" where programs are lowered here.
        remarks: What must be added to a row of ``capabilities()``, by its name: a condition, or a part that it does not hold for.
    """

    name: ClassVar[str]
    requires: ClassVar[Property] = Property.FUNCTIONAL
    legalize: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    fresh: ClassVar[bool] = False
    any_graph: ClassVar[bool] = True
    elsewhere: ClassVar[str] = ""
    remarks: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abc.abstractmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """What becomes of each sparsity pattern and number format: a value for each of ``PATTERNS`` and ``FORMATS``."""

    def tolerance(self) -> float | None:
        """What ``export`` allows where it is not told and its own default is less, as a fraction of the outputs' largest value.

        For targets whose options make the runtime compute in fewer bits than the Program.
        """
        return None

    def choices(self, program: Program) -> Choices:
        """How the layers of a Program are going to be computed, where a target chooses by what is in their weights.

        Args:
            program: As it may come to ``export``, not legalized; weights may be on the meta device. Not to be mutated.

        Returns:
            Nothing, for targets that compute all layers alike.

        Raises:
            GraphPruneError: The target would choose, and cannot here: there are no weights, or no way to measure.
        """
        return Choices()

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

    def library(self, name: str) -> Any:
        """Import a library of this target.

        Raises:
            LoweringError: It is not installed; says the line that installs it.
        """
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise LoweringError(
                f"target {self.name} needs {name.partition('.')[0]}, which cannot be imported ({error}); run: "
                f'pip install "graphprune[{self.extra}]"'
            ) from error

    def nodes(self, folder: Path) -> frozenset[str]:
        """Keys of the Program's values that the lowered file says where they are; none where a target cannot say.

        Keys are ``integers:<prefix>`` of a static quantizer's scale buffer ``<prefix>_scale``, ``range:<weight>`` of the float
        that is quantized at run time for a weight's operator, and ``linear:``, ``conv:`` or ``embedding:<weight>`` of results.
        """
        return frozenset()

    def run_nodes(
        self, folder: Path, inputs: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, NodeValue], dict[str, np.ndarray]]:
        """Compute values inside the lowered model, each from the recorded values before it.

        Args:
            folder: An artifact.
            inputs: Inputs of the model by name.
            recorded: Values of the Program by key; whatever uses one of them gets it, and not what the model computed for it.

        Returns:
            What the model computed for each key, and its outputs by name. Keys that the file does not have are absent.

        Raises:
            LoweringError: The target cannot do this, or the model does not run.
        """
        raise LoweringError(f"target {self.name} cannot be compared node by node; verify without per_node")
