"""Compare a lowered model with what its Program computed inside, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from graphprune.artifact.nodes import NODES, Node, Recording
from graphprune.errors import LoweringError, VerifyError
from graphprune.pipeline.target import NodeValue, Target

STEPS = 255
"""Quantization steps in the range of a value that has no scale of its own."""


@dataclass(frozen=True)
class NodeDifference:
    """How one node of the lowered model differs from the Program, computed from the Program's values.

    Attributes:
        node: The value.
        size: Entries compared; 0 where it was not compared.
        differing: Entries that differ: integers at all, floats by more than is allowed.
        steps: Largest difference in quantization steps: of the node's scale, or of its range / 255.
        max_abs: Largest difference in float.
        excess: Largest difference, as a multiple of what is allowed; more than 1 fails.
        problem: What else is wrong, such as another scale; "" for nothing.
        skipped: Why it was not compared; "" where it was.
        follows: Name of a node that fails and that this one reads, so that this one cannot be right; "" for none.
    """

    node: Node
    size: int = 0
    differing: int = 0
    steps: float = 0.0
    max_abs: float = 0.0
    excess: float = 0.0
    problem: str = ""
    skipped: str = ""
    follows: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was found against the node."""
        return self.excess <= 1 and not self.problem

    @property
    def faulty(self) -> bool:
        """Whether it fails of itself, and not because of a node before it."""
        return not self.passed and not self.follows

    def to_dict(self) -> dict[str, object]:
        """What ``--json`` prints; null stands for a difference that is infinite."""
        return {
            "kind": self.node.kind,
            "name": self.node.name,
            "weights": list(self.node.weights),
            "passed": self.passed,
            "entries": self.size,
            "differing": self.differing,
            "steps": _finite(self.steps),
            "max_abs": _finite(self.max_abs),
            "of_allowed": _finite(self.excess),
            "problem": self.problem,
            "follows": self.follows,
        }

    def __str__(self) -> str:
        if self.problem:
            return f"{self.node.name}: {self.problem}"
        made = [name for name in self.node.weights if name != self.node.name]
        of = f" (computed with {', '.join(made)})" if made else ""
        how = f"{self.steps:.3g} steps" if self.node.tolerance is None else f"{self.max_abs:.3g}"
        return (
            f"{self.node.kind} {self.node.name}{of}: {how} off, {self.excess:.3g} x what is allowed, "
            f"in {self.differing} of {self.size} entries"
        )


@dataclass(frozen=True)
class NodeReport:
    """A comparison node by node; rich prints it as a table, worst nodes first.

    Attributes:
        nodes: Every node, in the order of the graph.
        not_compared: Reasons by key.
        bytes: Size of ``nodes.safetensors``.
        outputs: Largest float difference of the model's outputs, computed from the recorded values.
        rows: How many rows the table has.
    """

    nodes: tuple[NodeDifference, ...]
    not_compared: Mapping[str, str]
    bytes: int
    outputs: float
    rows: int = 20

    @property
    def worst(self) -> tuple[NodeDifference, ...]:
        """All nodes: those at fault first, then those that follow from them, by difference."""
        return tuple(sorted(self.nodes, key=lambda item: (item.faulty, not item.passed, item.excess), reverse=True))

    @property
    def faulty(self) -> tuple[NodeDifference, ...]:
        """The nodes that fail of themselves, worst first."""
        return tuple(item for item in self.worst if item.faulty)

    @property
    def summary(self) -> str:
        """One line: the worst node, its difference, and what was left out."""
        left = f"; {len(self.not_compared)} not compared" if self.not_compared else ""
        size = f"{NODES} has {self.bytes:,} bytes"
        if self.faulty:
            more = f"; {len(self.faulty) - 1} more" if self.faulty[1:] else ""
            following = sum(1 for item in self.nodes if not item.passed) - len(self.faulty)
            return f"{self.faulty[0]}{more}" + (f"; {following} that read it differ too" if following else "") + left
        steps = [item for item in self.nodes if item.node.tolerance is None]
        worst = max(steps, key=lambda item: item.steps, default=None)
        if worst is None:
            worst = self.worst[0]
            return f"{len(self.nodes)} nodes, worst {worst}{left}; {size}"
        integers = [item for item in steps if item.node.kind == "integers"]
        counted = (
            f"{sum(item.differing for item in integers)} of {sum(item.size for item in integers)} integers differ, "
        )
        return (
            f"{len(self.nodes)} nodes, at most {worst.steps:.3g} steps off ({worst.node.name}), {counted if integers else ''}"
            f"outputs differ by {self.outputs:.3g}{left}; {size}"
        )

    def to_dict(self) -> dict[str, object]:
        """What ``--json`` prints; worst nodes first, all of them."""
        return {
            "bytes": self.bytes,
            "outputs_max_abs": _finite(self.outputs),
            "nodes": [item.to_dict() for item in self.worst],
            "not_compared": dict(self.not_compared),
        }

    def __rich__(self) -> Table:
        shown = self.worst[: self.rows]
        more = f", the {len(shown)} worst" if len(shown) < len(self.nodes) else ""
        table = Table(title=f"{len(self.nodes)} nodes{more}", title_justify="left")
        for column in ("node", "kind", "result", "steps", "of allowed", "differing", "max abs", "computed with"):
            table.add_column(column, overflow="fold")
        for item in shown:
            state = "[green]passed" if item.passed else "[red]FAILED" if item.faulty else f"follows from {item.follows}"
            detail = item.problem or ", ".join(item.node.weights)
            numbers = (
                f"{item.steps:.3g}",
                f"{item.excess:.3g}",
                f"{item.differing}/{item.size}",
                f"{item.max_abs:.3g}",
            )
            table.add_row(item.node.name, item.node.kind, state, *numbers, detail)
        listed = list(self.not_compared.items())
        for key, reason in listed[: self.rows]:
            kind, _, name = key.partition(":")
            table.add_row(name, kind, "not compared", "", "", "", "", reason)
        if len(listed) > self.rows:
            table.add_row(f"and {len(listed) - self.rows} more", "", "not compared")
        return table


def compare_nodes(target: Target, folder: Path, rows: int = 20) -> NodeReport:
    """Compare every recorded value with what the lowered model makes of the recorded values before it.

    Args:
        target: What the artifact was lowered to.
        folder: An artifact.
        rows: How many rows the report's table has.

    Returns:
        The report.

    Raises:
        VerifyError: Nothing is recorded, the record is damaged, or the model cannot be run so.
    """
    recording = Recording.read(folder)
    try:
        computed, outputs = target.run_nodes(folder, recording.inputs, recording.inner)
    except LoweringError as error:
        raise VerifyError(str(error)) from None
    everything = dict(computed) | {f"output:{name}": NodeValue(value) for name, value in outputs.items()}
    found: list[NodeDifference] = []
    missing = dict(recording.left_out)
    for node in recording.nodes:
        item = difference(node, recording.values[node.key], everything.get(node.key))
        if item.skipped:
            missing[node.key] = item.skipped
        else:
            found.append(item)
    largest = max((item.max_abs for item in found if item.node.kind == "output"), default=0.0)
    return NodeReport(_followed(found), missing, (folder / NODES).stat().st_size, largest, rows)


def difference(node: Node, expected: np.ndarray, actual: NodeValue | None) -> NodeDifference:
    """Compare one value."""
    if actual is None:
        return NodeDifference(node, problem="the file does not say any more where it is")
    if actual.values.shape != expected.shape:
        shapes = f"{list(actual.values.shape)} in the file and {list(expected.shape)} in the Program"
        return NodeDifference(node, skipped=f"it has another shape: {shapes}")
    have, want = actual.values.astype(np.float64), expected.astype(np.float64)
    apart = absolute_difference(have, want)
    largest = float(apart.max(initial=0.0))
    if node.kind == "integers":
        scale = node.scale or 1.0
        differing = int(np.count_nonzero(apart))
        return NodeDifference(
            node, want.size, differing, largest, largest * scale, largest, problem=_other_qparams(node, actual)
        )
    steps = largest / step_of(want) if largest else 0.0
    if node.tolerance is None:
        allowed = step_of(want)
    else:
        allowed = node.tolerance * max(float(np.abs(want[np.isfinite(want)]).max(initial=0.0)), 1e-6)
    differing = int(np.count_nonzero(apart > allowed))
    return NodeDifference(node, want.size, differing, steps, largest, largest / allowed if largest else 0.0)


def absolute_difference(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """``|have - want|`` in float64; 0 where both are NaN or the same infinity, infinite where only one side is finite."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(have.astype(np.float64) - want.astype(np.float64))
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    return np.asarray(np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart)))


def step_of(values: np.ndarray) -> float:
    """The quantization step of a value by its own range, extended to 0: range / 255; at least 1e-12."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    return max((high - low) / STEPS, 1e-12)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _other_qparams(node: Node, actual: NodeValue) -> str:
    if actual.scale is not None and np.float32(actual.scale) != np.float32(node.scale):
        return f"its scale is {actual.scale:.7g} in the file and {node.scale:.7g} in the Program"
    if actual.zero_point is not None and actual.zero_point != node.zero_point:
        return f"its zero-point is {actual.zero_point} in the file and {node.zero_point} in the Program"
    return ""


def _followed(found: Sequence[NodeDifference]) -> tuple[NodeDifference, ...]:
    """Mark nodes that fail because the file reads a value by another scale than it was recorded by."""
    wrong = {item.node.key: item.node.name for item in found if item.problem}
    return tuple(
        replace(item, follows=next((wrong[key] for key in item.node.reads if key in wrong), ""))
        if not item.problem
        else item
        for item in found
    )
