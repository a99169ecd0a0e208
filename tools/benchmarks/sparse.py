"""``python tools/bench.py sparse``: what the sparse-cpu target gains, layer by layer and on whole models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.measuring import Measure, Unavailable
from benchmarks.sparse_artifacts import (
    DENSE_INT8,
    EAGER,
    LENGTH,
    ONNXRUNTIME,
    Contender,
    Model,
    Store,
    find_deepsparse,
    lower,
    missing_runtime,
    optional,
    required,
)
from benchmarks.sparse_layers import Layer, cases, measure_layer, random_weight
from benchmarks.sparse_models import Measured, Shape, measure_models
from benchmarks.sparse_roofline import Peaks, measure_peaks
from benchmarks.sparse_tables import fallback_goal, goals_table, layer_goals, layer_tables, model_goals, model_table
from graphprune.artifact.benchmark import machine
from graphprune.errors import GraphPruneError, LoweringError
from graphprune.targets.sparse_cpu.building import load_kernels
from graphprune.targets.sparse_cpu.cost import decide

PARTS = ("layers", "bert-base")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_BELOW = (0.3, 0.5, 0.6)
"""Sparsities at which sparse kernels hardly pay off, or do not: the cost model must fall back."""
_WIDTH = 160
"""Columns that tables take where the terminal has fewer, or there is none."""
_OFTEN = 3
"""A layer takes milliseconds, so that it has so many times the rounds of a model."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        batches: Sequences in a call.
        sequences: Tokens of each; layers are measured for so many.
        threads: Of every runtime.
        sparsities: Of the models.
        below: More sparsities of layers.
        repeats: Rounds that count.
        quick: Whether it has to be over in a minute.
    """

    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    threads: tuple[int, ...]
    sparsities: tuple[float, ...]
    below: tuple[float, ...]
    repeats: int
    quick: bool


class Bench:
    """One run of the command.

    Args:
        plan: What is measured.
        console: Where people read.
    """

    def __init__(self, plan: Plan, console: Console):
        self._plan, self._console = plan, console
        self._peaks: dict[int, Peaks | None] = {}
        self.goals: list[Measure] = []

    def layers(self, hidden: int) -> list[Layer]:
        """Measure linear layers, and print them."""
        plan, found = self._plan, []
        with self._console.status("loading kernels"):
            isa = load_kernels()
        for case in cases(hidden, (*plan.below, *plan.sparsities), plan.sequences, plan.threads):
            shape = f"{case.rows}x{case.features}, {case.number_format}, {case.sparsity:g}"
            with self._console.status(f"measuring {shape}, {case.tokens} tokens, {case.threads} threads"):
                found.append(measure_layer(case, _OFTEN * plan.repeats, self.peaks(case.threads)))
        for table in layer_tables(found, plan.sparsities):
            self._console.print(table)
        self._console.print(f"kernels: {isa}", highlight=False)
        if hidden == Model().hidden:
            self.goals += [*layer_goals(found), fallback_goal(found)]
        return found

    def models(self, store: Store, contenders: Sequence[Contender]) -> list[Measured]:
        """Measure artifacts, and print them."""
        plan, found = self._plan, []
        shapes = [Shape(b, s, t) for t in plan.threads for b in plan.batches for s in plan.sequences]
        for shape in shapes:
            for group in _groups(contenders, plan.quick):
                what = f"{store.model}, batch {shape.batch}, {shape.sequence} tokens, {shape.threads} threads"
                with self._console.status(f"measuring {what}"):
                    part = measure_models(store, group, shape, plan.repeats, self.peaks(shape.threads))
                found += part
                if not plan.quick:  # a long run that is stopped has said something
                    self._console.print(model_table(part))
        self._console.print(model_table(found))
        if store.model == Model():
            self.goals += model_goals(found)
        return found

    def peaks(self, threads: int) -> Peaks | None:
        """Of this machine, measured once; None where that cannot be done."""
        if threads not in self._peaks:
            try:
                self._peaks[threads] = measure_peaks(threads)
                self._console.print(f"peak with {threads} threads: {self._peaks[threads]}", highlight=False)
            except Unavailable as reason:
                self._peaks[threads] = None
                self._console.print(str(reason), soft_wrap=True, markup=False)
        return self._peaks[threads]


def _groups(contenders: Sequence[Contender], together: bool) -> Iterator[list[Contender]]:
    """Those that take turns: all, or each number format for itself, since all processes take memory at once."""
    if together:
        yield list(contenders)
        return
    for kind in ("fp32", "int8"):
        if any((item.runtime, item.number_format) == ("sparse-cpu", kind) for item in contenders):
            yield [item for item in contenders if item.number_format == kind or item in (ONNXRUNTIME, EAGER)]


def prepare(out: Path, model: Model | None, plan: Plan, fresh: bool, console: Console) -> tuple[Store, list[Contender]]:
    """Find artifacts, and make those that are missing.

    A quick run makes none of BERT-base, which take a minute each: where they are missing, it makes those of one layer in fp32. Nor does it
    start DeepSparse and NNCF, which take longer to start than its minute allows.

    Args:
        out: Folder of artifacts.
        model: Which model; None takes BERT-base.
        plan: What is measured.
        fresh: Make all of them anew.
        console: Where to say what is done.

    Returns:
        Where they are, and which there are.

    Raises:
        LoweringError: Something is missing without which nothing can be compared.
    """
    store = Store(out, model or Model())
    needed, others = list(required(plan.sparsities)), list(optional(plan.sparsities))
    if plan.quick and model is None and not fresh:
        known = _known_contenders(store, (*needed, DENSE_INT8[0]))
        if known:
            return store, known
        store = Store(out, Model(layers=1))
        needed, others = [item for item in needed if item.number_format == "fp32"], []
        console.print(
            f"the artifacts of bert-base are not in {out}, or do not fit any more; lowering them takes a minute each, so this is one of "
            f"12 layers in fp32. To have them: python tools/bench.py sparse --only bert-base --repeats 0",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    if others:
        find_deepsparse()
    left_out = {item: reason for item in (*needed, *others) if (reason := missing_runtime(item))}
    todo = [item for item in (*needed, *others) if item not in left_out and (fresh or not store.fits(item))]
    if todo:
        left_out |= _lower(store, todo, console)
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(item.name for item, why in left_out.items() if why == reason)
        console.print(f"{names}: left out. {reason}", soft_wrap=True, markup=False, highlight=False)
    lacking = [item for item in needed if item in left_out]
    if lacking:
        raise LoweringError(
            f"{lacking[0].name} is missing, and nothing can be compared without: {left_out[lacking[0]]}"
        )
    return store, [item for item in (*needed, *others) if item not in left_out]


def _known_contenders(store: Store, wanted: Sequence[Contender]) -> list[Contender]:
    """What is there already; nothing where there is no sparse artifact, or not both that it is compared with."""
    there = [item for item in wanted if store.fits(item) and missing_runtime(item) is None]
    return there if any(item.sparsity for item in there) and {ONNXRUNTIME, EAGER} <= set(there) else []


def _lower(store: Store, todo: Sequence[Contender], console: Console) -> dict[Contender, str]:
    sparse = [item for item in todo if item.runtime == "sparse-cpu"]
    if sparse:
        with console.status("measuring costs of layers"):  # two processes that lower at once would measure each other
            load_kernels()
            hidden = store.model.hidden
            for item in sparse:
                for shape in ((hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)):
                    decide(random_weight(*shape, item.sparsity), LENGTH, item.number_format == "int8")
    names = ", ".join(item.name for item in todo)
    with console.status(f"lowering {store.model}: {names}"):
        return lower(store, todo)


def bench_sparse(
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(PARTS)}; repeatable.", show_default="both")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="One shape, few runs, artifacts that are there, without DeepSparse and NNCF: a minute."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print rows of whole models as JSON on standard output.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of artifacts, which are kept.")] = Path("out/sparse-bench"),
    layers: Annotated[int | None, typer.Option(help="Layers of the BERT.", min=1, show_default="12, BERT-base")] = None,
    hidden: Annotated[int | None, typer.Option(help="Its width, a multiple of 64.", min=64, show_default="768")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences in a call; repeatable.", show_default="1, 8")
    ] = None,
    sequence: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.", show_default="128, 384")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeatable.", show_default="1, 2")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Rounds; 0 only lowers.", min=0, show_default="7; quick 3")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make all artifacts anew.")] = False,
) -> None:
    """Measure sparse-cpu against dense kernels and other runtimes; the exit code is 1 where a goal is missed, but not with --quick."""
    console = Console(stderr=as_json, log_path=False)
    console.width = max(console.width, _WIDTH)
    with _explained():
        parts = _known(only)
        plan = _plan(quick, batch, sequence, threads, repeats)
        model = None if layers is None and hidden is None else Model(layers or 12, hidden or 768)
        bench, rows = Bench(plan, console), []
        if "layers" in parts and plan.repeats:
            bench.layers(768 if model is None else model.hidden)
        if "bert-base" in parts:
            store, contenders = prepare(out, model, plan, fresh, console)
            if plan.repeats:
                rows = [asdict(item.row) for item in bench.models(store, contenders)]
    if bench.goals:
        console.print(goals_table(bench.goals))
    if as_json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
    else:
        console.print(machine(), highlight=False)
    raise typer.Exit(0 if quick or all(item.met for item in bench.goals) else 1)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _known(only: Sequence[str] | None) -> Sequence[str]:
    unknown = [name for name in only or () if name not in PARTS]
    if unknown:
        raise GraphPruneError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return only or PARTS


def _plan(
    quick: bool, batch: list[int] | None, sequence: list[int] | None, threads: list[int] | None, repeats: int | None
) -> Plan:
    default = (min(2, _CORES),) if quick else tuple(count for count in (1, 2) if count <= _CORES)
    for name, values, most in (("batch", batch, None), ("sequence", sequence, 512), ("threads", threads, _CORES)):
        for value in values or ():
            if value < 1 or (most is not None and value > most):
                raise GraphPruneError(f"{name}={value} is not from 1 to {most or 'what memory holds'}")
    return Plan(
        tuple(batch or ((1,) if quick else (1, 8))),
        tuple(sequence or ((128,) if quick else (128, 384))),
        tuple(threads or default),
        (0.8,) if quick else (0.8, 0.9),
        (0.5,) if quick else _BELOW,
        (3 if quick else 7) if repeats is None else repeats,
        quick,
    )
