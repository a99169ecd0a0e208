"""Programs for trials of a tuning: each is what its recipe gives, bit by bit, but calibration data runs once for all of them.

Observers look at float values as long as nothing is quantized yet, so what they record does not depend on which sites will be.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.artifact.tuned_pipeline import OFF, TunedPipeline
from graphprune.artifact.tuning import TunedSite
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.ir.batches import run_batch
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import Plans, Request, decide
from graphprune.ir.quantizable import find_quantizable
from graphprune.ir.quantizing import Quantizer, observers
from graphprune.passes.annotate_quant import AnnotateQuant
from graphprune.passes.calibrate import Calibrate
from graphprune.passes.insert_observers import InsertObservers
from graphprune.pipeline.base import DataPass, Pass, PassResult
from graphprune.pipeline.manager import PassManager

GROUPS = ("none", "input", "module")
"""Which sites move together: none; those that read the same value; those in modules of one module."""

_RANKING_EXAMPLES = 32
_ENTRIES = 1 << 18
"""Most entries of an output that are compared; more are thinned out evenly."""

Records = dict[tuple[str, str, str], tuple[Tensor, ...]]
"""What observers hold, by the value's name, the scheme and the observer."""


@dataclass(frozen=True)
class Recall(DataPass):
    """Calibrate from memory: put back what observers recorded before, or calibrate where one is new.

    Attributes:
        step: The pass that it stands for.
        records: What was recorded; mutated.
    """

    name = "calibrate"
    requires = Property.OBSERVED
    forbids = Calibrate.forbids

    step: Calibrate = field(default_factory=Calibrate)
    records: Records = field(default_factory=dict)

    def recorded(self) -> Pass:
        """The pass that it stands for."""
        return self.step.recorded()

    def __str__(self) -> str:
        return str(self.step)

    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        """Fill the observers."""
        watching = [(_key(node, decision), _state(program, node)) for node, decision in observers(program)]
        if any(key not in self.records for key, _ in watching):
            result = self.step.run_on(program, batches)
            self.records.update({key: tuple(map(torch.clone, state)) for key, state in watching})
            return result
        for key, state in watching:
            for held, recorded in zip(state, self.records[key], strict=True):
                held.copy_(recorded)
        return PassResult(program, changed=True, stats={"recalled": len(watching)})


def _key(node: fx.Node, decision: Quantizer) -> tuple[str, str, str]:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value.name, decision.scheme, decision.observer


def _state(program: Program, node: fx.Node) -> tuple[Tensor, ...]:
    return tuple(program.tensor(str(item.target)) for item in node.args[1:6] if isinstance(item, fx.Node))


class TrialPrograms:
    """Makes the Programs of trials.

    Args:
        program: The model as it was given; not mutated.
        pipeline: What quantizes it.
        batches: Calibration data; None where no pass needs any.

    Attributes:
        start: The Program behind the passes that run once.
        plans: What is quantized of it with every site fully quantized.
        names: Names of the operators in it, in the order of the graph.
    """

    def __init__(self, program: Program, pipeline: TunedPipeline, batches: Sequence[object] | None) -> None:
        self.pipeline, self.batches = pipeline, batches
        before = tuple(map(_silent, pipeline.before))
        self.start = PassManager(before, data=batches).run(program).program if before else program
        self.plans: Plans = decide(self.start, pipeline.request)
        self.names = tuple(dict.fromkeys(plan.name for plan in self.plans.plans.values()))
        self._records: Records = {}
        self._recorded: set[str] = set()

    def sites(self, group: str) -> tuple[TunedSite, ...]:
        """What is quantized, as sites in the order of the graph.

        Args:
            group: One of ``GROUPS``.
        """
        related: nx.Graph[object] = nx.Graph()
        for item in find_quantizable(self.start):
            if item.node not in self.plans.plans:
                continue
            shared: list[object] = []
            if group == "input":
                shared = [item.node.args[place] for place in item.inputs]
            elif group == "module":
                shared = [("module", item.module.rpartition(".")[0] if item.weight is not None else item.module)]
            related.add_node(item.name)
            related.add_edges_from((item.name, key) for key in shared)
        found = []
        for component in nx.connected_components(related):
            names = tuple(name for name in self.names if name in component)
            title = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            found.append(TunedSite(title, names))
        return tuple(sorted(found, key=lambda site: self.names.index(site.members[0])))

    def float_at(self, level: str) -> dict[str, str]:
        """Why operators that the pipeline quantizes are float at a level, by name; all where it is ``off``.

        Raises:
            RecipeError: The level fits no operator.
        """
        if level == OFF:
            return dict.fromkeys(self.names, "it is off")
        request: Request = self.pipeline.decider_with(dict.fromkeys(self.names, level)).request
        try:
            left = decide(self.start, request).left_out
        except GraphPruneError as error:
            raise RecipeError(f"fallback {level!r}: {error}; leave it out, or write 'off'") from error
        return {name: left[name] for name in self.names if name in left}

    def build(self, levels: Mapping[str, str]) -> Program:
        """The Program of a recipe, in eval mode; the caller's own.

        Args:
            levels: Levels by the names of operators, without those that are fully quantized.
        """
        for level in {"": None, **dict.fromkeys(levels.values())}:
            if self._remembers and level not in (
                *self._recorded,
                OFF,
            ):  # observe all sites, so that data runs once a level
                self._make(dict.fromkeys(self.names, level) if level else {})
                self._recorded.add(level)
        return self._make(levels)

    @property
    def _remembers(self) -> bool:
        """Whether data runs through observers before anything is quantized."""
        first = self.pipeline.after[:2]
        return (
            isinstance(self.pipeline.decider, AnnotateQuant)
            and len(first) == 2
            and isinstance(first[0], InsertObservers)
            and isinstance(first[1], Calibrate)
        )

    def _make(self, levels: Mapping[str, str]) -> Program:
        steps = [self.pipeline.decider_with(levels), *map(_silent, self.pipeline.after)]
        if self._remembers and isinstance(steps[2], Calibrate):
            steps[2] = Recall(steps[2], self._records)
        program = copy.deepcopy(self.start)
        return PassManager(tuple(steps), data=self.batches).run(program, in_place=True).program.eval()

    @torch.no_grad()
    def outputs(self, program: Program) -> list[Tensor]:
        """Float outputs for the first calibration batches that have 32 examples together, thinned out where they are large; float64."""
        found: list[Tensor] = []
        seen = 0
        for number, batch in enumerate(self.batches or ()):
            if seen >= _RANKING_EXAMPLES:
                break
            seen += next(
                (len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1
            )
            for leaf in pytree.tree_leaves(run_batch(program, batch, number)):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    flat = leaf.reshape(-1)
                    found.append(flat[:: math.ceil(flat.numel() / _ENTRIES) or 1].double().cpu())
        return found


def squared_error(want: Sequence[Tensor], have: Sequence[Tensor]) -> float:
    """The squared error of outputs, relative to their squares; entries that are not finite in ``want`` do not count.

    Returns:
        At least 0, and finite: NaN and overflow give the largest number.

    Raises:
        GraphPruneError: There are no float outputs.
    """
    if not want:
        raise GraphPruneError("the model has no float outputs to rank sites by; choose order one-off or one-on")
    error = total = 0.0
    for first, second in zip(want, have, strict=True):
        finite = first.isfinite()
        error += float((second - first)[finite].square().sum())
        total += float(first[finite].square().sum())
    relative = error / total if total else error
    return relative if math.isfinite(relative) else sys.float_info.max


def _silent(step: Pass) -> Pass:
    """The pass without a progress bar of its own, which would run through ours."""
    return replace(step, progress=False) if getattr(step, "progress", False) else step  # type: ignore[call-arg]
