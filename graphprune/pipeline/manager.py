"""Run passes in order: check the order first, verify after each, explain a failure."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import networkx as nx

from graphprune.errors import GraphPruneError, PassError, VerifyError
from graphprune.ir.printer import print_program
from graphprune.ir.program import META, Program, is_meta
from graphprune.ir.properties import Property
from graphprune.ir.verifier import verify
from graphprune.pipeline.base import NEEDS_DATA, Coverage, DataPass, Pass, PassResult
from graphprune.pipeline.registry import known_passes


class Instrument(Protocol):
    """Observes a pipeline without changing it."""

    def before_pass(self, index: int, step: Pass, program: Program) -> None:
        """Called before each pass."""

    def after_pass(self, index: int, step: Pass, result: PassResult) -> None:
        """Called after each pass, once the Program is verified."""


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline did: the Program and the result of each pass, in order."""

    program: Program
    results: tuple[PassResult, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class PassManager:
    """A pipeline: passes to run in this order.

    Attributes:
        passes: The passes; those of a ``Pipeline`` among them stand in its place.
        instruments: Observers.
        reproducer: Folder for the IR before a failing pass and the rest of the recipe; None writes nothing.
        data: Batches for the passes that need calibration data; each iterates it once.
    """

    passes: tuple[Pass, ...]
    instruments: tuple[Instrument, ...] = ()
    reproducer: Path | None = None
    data: Iterable[object] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(_flatten(self.passes)))

    def check_order(self, properties: Property, *, replay: bool = False) -> Property:
        """Fold what the passes require, establish and destroy over the pipeline.

        Args:
            properties: What holds at the start.
            replay: The tensors are on the meta device, so that passes need no data.

        Returns:
            What holds at the end.

        Raises:
            PassError: A pass comes where its requirement does not hold, or where something holds that it forbids; names it and
                the pass that would establish it, that destroyed it or that would destroy it. Or a pass needs data and there
                is none, or several do and it can be iterated once only.
        """
        if not replay:
            self._check_data()
        for index, step in enumerate(self.passes):
            if step.forbids & properties:  # first, since it says more: what is frozen has no observers either
                raise PassError(self._forbidden(index, step.forbids & properties))
            lacking = step.requires & ~properties
            if lacking:
                raise PassError(self._order_problem(index, lacking))
            properties = (properties & ~step.destroys) | step.establishes
        return properties

    def _check_data(self) -> None:
        needing = [
            f"pipeline[{index}].{step.name}" for index, step in enumerate(self.passes) if isinstance(step, DataPass)
        ]
        if needing and self.data is None:
            raise PassError(f"{needing[0]} {NEEDS_DATA}")
        if len(needing) > 1 and isinstance(self.data, Iterator):
            raise PassError(
                f"{' and '.join(needing)} each go through the data, and data is an iterator ({type(self.data).__name__}) that "
                f"is empty after the first; give a list or a DataLoader"
            )

    def _order_problem(self, index: int, lacking: Property) -> str:
        step = self.passes[index]
        edges = requirement_graph(self.passes)
        message = f"pipeline[{index}].{step.name} requires {lacking}, which does not hold there"
        for before in reversed(range(index)):
            if self.passes[before].destroys & lacking:
                return (
                    f"{message}: pipeline[{before}].{self.passes[before].name} destroys it; put {step.name} before it"
                )
        for after in edges.predecessors(index):
            if after > index:
                return (
                    f"{message}: pipeline[{after}].{self.passes[after].name} establishes it; put it before {step.name}"
                )
        return f"{message}; add the pass that establishes it before {step.name} (see graphprune passes)"

    def _forbidden(self, index: int, held: Property) -> str:
        step = self.passes[index]
        message = f"pipeline[{index}].{step.name} cannot run on a Program that is {held}"
        ending = [name for name, cls in known_passes().items() if cls.destroys & held]
        way_out = f"put {' or '.join(ending)} before {step.name}"
        for before in reversed(range(index)):
            if self.passes[before].establishes & held:
                name = f"pipeline[{before}].{self.passes[before].name}"
                return f"{message}, which {name} makes it: put {step.name} before {name}, or {way_out}"
        return f"{message}: {way_out}"

    def run(self, program: Program, *, in_place: bool = False) -> PipelineResult:
        """Run the passes.

        Args:
            program: Left as it is, unless ``in_place``.
            in_place: Rewrite ``program`` itself and share its parameters, which saves the memory of a copy.

        Raises:
            PassError: The order is wrong, data is missing, a pass failed, it left an invalid Program, or it changed the graph
                and said that it did not. Names the pass, its index and the passes that ran before it.
        """
        replay = is_meta(program)
        self.check_order(program.properties, replay=replay)
        if not in_place:
            program = copy.deepcopy(program)
        results: list[PassResult] = []
        for index, step in enumerate(self.passes):
            for instrument in self.instruments:
                instrument.before_pass(index, step, program)
            before = print_program(program) if self.reproducer else ""
            structure = _structure(program)
            with self._explained(index, step, before):
                if isinstance(step, DataPass):
                    result = step.run_on(program, () if replay or self.data is None else self.data)
                else:
                    result = step.run(program)
                program = result.program
                if not result.changed and _structure(program) != structure:
                    raise PassError(
                        "it changed the graph and returned changed=False; return changed=True, or stale code runs"
                    )
                program.properties = (program.properties & ~step.destroys) | step.establishes
                if result.changed:
                    program.recompile()
                verify(program)
            program.history = (*program.history, str(step.recorded()))
            results.append(result)
            for instrument in self.instruments:
                instrument.after_pass(index, step, result)
        return PipelineResult(program, tuple(results))

    @contextlib.contextmanager
    def _explained(self, index: int, step: Pass, before: str) -> Iterator[None]:
        try:
            yield
        except GraphPruneError as error:
            note = self._note(index, step, before)
            kind = PassError if isinstance(error, VerifyError) else type(error)
            left = "left an invalid Program: " if isinstance(error, VerifyError) else ""
            raise kind(f"pipeline[{index}].{step.name}: {left}{error}{note}") from error
        except Exception as error:
            note = self._note(index, step, before)
            raise PassError(
                f"pipeline[{index}].{step.name} failed with {type(error).__name__}: {error}{note}"
            ) from error

    def _note(self, index: int, step: Pass, before: str) -> str:
        ran = ", ".join(item.name for item in self.passes[:index])
        note = f" (after {ran})" if ran else ""
        if self.reproducer is None:
            return note
        self.reproducer.mkdir(parents=True, exist_ok=True)
        (self.reproducer / "before.ir").write_text(before)
        rest = ",".join(str(item) for item in self.passes[index:])
        (self.reproducer / "recipe.json").write_text(json.dumps({"pipeline": rest}, indent=2) + "\n")
        return f"{note}; reproducer in {self.reproducer}"


def _flatten(passes: Iterable[Pass]) -> Iterator[Pass]:
    for step in passes:
        if isinstance(step, Pipeline):
            yield from _flatten(step.passes)
        else:
            yield step


def _structure(program: Program) -> int:
    """A hash of everything in the graph that its text shows, but for the values of buffers."""
    return hash(
        tuple(
            (node.name, node.op, node.target, str(node.args), str(node.kwargs), str(node.meta.get(META) or ""))
            for node in program.nodes()
        )
    )


def requirement_graph(passes: Sequence[Pass]) -> nx.DiGraph[int]:
    """Which pass could serve which: an edge from each pass to every pass that requires what it establishes."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for giver, step in enumerate(passes):
        for taker, other in enumerate(passes):
            if giver != taker and step.establishes & other.requires:
                graph.add_edge(giver, taker)
    return graph


@dataclass(frozen=True)
class Pipeline(Pass):
    """Several passes as one."""

    name = "pipeline"
    passes: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def run(self, program: Program) -> PassResult:
        """Run the passes in order, in place."""
        outcome = PassManager(self.passes).run(program, in_place=True)
        stats: dict[str, int | float] = {}
        for result in outcome.results:
            for key, value in result.stats.items():
                stats[key] = stats.get(key, 0) + value
        matched = tuple(name for result in outcome.results for name in result.coverage.matched)
        left_out = {key: why for result in outcome.results for key, why in result.coverage.left_out.items()}
        changed = any(result.changed for result in outcome.results)
        return PassResult(outcome.program, changed, stats, Coverage(matched, left_out))
