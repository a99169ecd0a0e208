"""Look at a model before pruning it: which weights can be pruned, which cannot and why, and what each costs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn

from graphprune.artifact.advice import remarks_of, support_of
from graphprune.errors import GraphPruneError
from graphprune.ir import ops as custom_ops
from graphprune.ir.examples import default_inputs
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.selection import Selection
from graphprune.ir.sites import Excluded, Site
from graphprune.ir.trace import trace
from graphprune.pipeline.registry import read_target
from graphprune.pipeline.target import Choice, Choices, Target
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern

PATTERNS = ("unstructured", "4x1", "2:4", "channelx1", "1xchannel")
"""Patterns that ``inspect`` tries unless it is told others."""

_BATCH = 2
_LENGTH = 128
_WIDTH = 10_000  # plain text is never cut: columns are as wide as their widest entry


@dataclass(frozen=True)
class InspectedSite:
    """One prunable weight.

    Attributes:
        name: The parameter's dotted name.
        op: Operator that uses it, such as ``linear``.
        shape: Logical shape ``(out, in * kernel)``.
        parameters: Number of weights.
        macs: Multiply-accumulates of one example of the traced size, over all uses.
        sparsity: Measured fraction of zeros in [0, 1], masked entries included; None without weights (meta device).
        patterns: Sparsity patterns that divide the weight exactly.
    """

    name: str
    op: str
    shape: tuple[int, int]
    parameters: int
    macs: int
    sparsity: float | None
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Sums over a model.

    Attributes:
        sites: Number of prunable weights.
        excluded: Number of weights left out.
        parameters: All parameters of the model, tied ones once.
        prunable_parameters: Parameters in sites.
        macs: Multiply-accumulates of one example, in sites.
        sparsity: Fraction of zeros over all sites in [0, 1]; None without weights.
    """

    sites: int
    excluded: int
    parameters: int
    prunable_parameters: int
    macs: int
    sparsity: float | None


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found. Prints as a table.

    Attributes:
        model: Name of the model's class, in snake case.
        inputs: Shape of each traced input; the first size is the batch, which ``macs`` are divided by.
        sites: Prunable weights in the order of the graph.
        excluded: Weights left out, each with the reason.
        totals: Sums.
        targets: For each target that was asked for, what it makes of each pattern, as in ``graphprune targets``.
        remarks: What must be added to that, such as a condition.
        choices: For each of them that chooses by what is in a weight, how it is going to compute each layer.
    """

    model: str
    inputs: Mapping[str, tuple[int, ...]]
    sites: tuple[InspectedSite, ...]
    excluded: tuple[Excluded, ...]
    totals: Totals
    targets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[str, Choice]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The inspection as plain data for JSON."""
        return {
            "sites": [
                {
                    **asdict(site),
                    "shape": list(site.shape),
                    "patterns": list(site.patterns),
                    **({"targets": self._made_of(site)} if self.targets else {}),
                    **({"choices": self._chosen_for(site)} if self.choices else {}),
                }
                for site in self.sites
            ],
            **({"remarks": list(self.remarks)} if self.targets else {}),
            "excluded": [asdict(item) for item in self.excluded],
            "totals": {
                **asdict(self.totals),
                "model": self.model,
                "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            },
        }

    def __rich__(self) -> Group:
        remarks: tuple[str | Text, ...] = ("", *(Text(text) for text in self.remarks)) if self.remarks else ()
        return Group(self._sites_table(), *remarks, "", self._excluded_table(), "", Text(self._summary()))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _sites_table(self) -> Table:
        titles = ("prunable weight", "op", "out x in", "parameters", "MACs", "sparsity", "patterns that fit")
        table = _table(*titles, *self.targets, *(f"on {name}" for name in self.choices))
        for column in table.columns[2:6]:
            column.justify = "right"
        for site in self.sites:
            _add(
                table,
                site.name,
                site.op,
                f"{site.shape[0]}x{site.shape[1]}",
                f"{site.parameters:,}",
                f"{site.macs:,}",
                _fraction(site.sparsity),
                " ".join(site.patterns),
                *(_grouped(made) for made in self._made_of(site).values()),
                *(layers[site.name].text if site.name in layers else "-" for layers in self.choices.values()),
            )
        return table

    def _made_of(self, site: InspectedSite) -> dict[str, dict[str, str]]:
        """What each target makes of each pattern that fits a weight."""
        return {name: {text: made[text] for text in site.patterns} for name, made in self.targets.items()}

    def _chosen_for(self, site: InspectedSite) -> dict[str, dict[str, object]]:
        """What each target that chooses does with a weight."""
        return {
            name: {"text": layers[site.name].text, **layers[site.name].measures}
            for name, layers in self.choices.items()
            if site.name in layers
        }

    def _excluded_table(self) -> Table:
        table = _table("left out", "reason")
        for item in self.excluded:
            _add(table, item.name, item.reason)
        return table

    def _summary(self) -> str:
        totals = self.totals
        share = totals.prunable_parameters / totals.parameters if totals.parameters else 0.0
        example = ", ".join(f"{name} {'x'.join(map(str, shape[1:]))}" for name, shape in self.inputs.items())
        return (
            f"{self.model}: {totals.sites} prunable weights with {totals.prunable_parameters:,} of "
            f"{totals.parameters:,} parameters ({share:.3f}), sparsity {_fraction(totals.sparsity)}, "
            f"{totals.macs:,} MACs for one example ({example}); {totals.excluded} left out"
        )


def inspect(
    model: nn.Module | Program,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    *,
    select: Iterable[str] = (),
    exclude: Iterable[str] = (),
    ops: Iterable[str] = (),
    include_last: bool = False,
    patterns: Iterable[str] = PATTERNS,
    targets: Iterable[str] = (),
    **constants: object,
) -> Inspection:
    """List the weights of a model that can be pruned, and those that cannot, with the reason.

    Nothing is changed and no forward pass is run, so a model on the meta device (no weights at all) will do. A target that chooses by what
    is in the weights says how it is going to compute each layer, and may measure for that; without weights a remark says that it cannot.

    Args:
        model: A module, which is traced with fixed sizes, or a Program.
        example_inputs: As for ``trace``. Default: a Hugging Face model's own, batch 2, up to 128 tokens.
        select: Names to take: globs or ``re:`` expressions over module or parameter names. Empty takes all.
        exclude: Names to leave out, in the same form.
        ops: Operators to take, such as ``linear``. Empty takes all.
        include_last: Take the last layer before the output too.
        patterns: Sparsity patterns to try on each weight.
        targets: Names of targets, with options as in pipelines (``NAME{option=value}``); the result says what each makes of every pattern.
        **constants: Arguments of ``forward`` that are no tensors.

    Returns:
        Sites, exclusions and totals.

    Raises:
        TraceError: The model cannot be traced.
        RecipeError: A name or operator matches nothing, or a target or its option is unknown.
        SparsityError: ``patterns`` names an unknown pattern.
    """
    tried = {text: parse_pattern(text) for text in patterns}
    goals = {text: read_target(text) for text in targets}
    made = {text: {row: support_of(goal.name, row).value for row in tried} for text, goal in goals.items()}
    remarks = tuple(
        text for name in dict.fromkeys(goal.name for goal in goals.values()) for text in remarks_of(name, tried)
    )
    selection = Selection(tuple(select), tuple(exclude), tuple(ops), include_last)
    program = model if isinstance(model, Program) else _trace_static(model, example_inputs, constants)
    program = _flat(program)
    chosen, excluded = selection.split(program)
    zeros = _count_zeros(program, chosen)
    sites = tuple(_inspected(site, zeros[site.name], tried) for site in chosen)
    prunable = sum(site.parameters for site in sites)
    known = [count for count in zeros.values() if count is not None]
    totals = Totals(
        sites=len(sites),
        excluded=len(excluded),
        parameters=sum(parameter.numel() for parameter in program.parameters()),
        prunable_parameters=prunable,
        macs=sum(site.macs for site in sites),
        sparsity=sum(known) / prunable if prunable and len(known) == len(sites) else None,
    )
    found = {text: _choices(goal, program) for text, goal in goals.items()}
    remarks += tuple(f"{text}: {choices.remark}" for text, choices in found.items() if choices.remark)
    chosen_by = {text: choices.layers for text, choices in found.items() if choices.layers}
    return Inspection(program.name, _input_shapes(program), sites, excluded, totals, made, remarks, chosen_by)


def _choices(goal: Target, program: Program) -> Choices:
    """What a target chooses; where it cannot, the reason as a remark, since the rest of the table holds all the same."""
    try:
        return goal.choices(program)
    except GraphPruneError as error:
        return Choices(remark=f"how it computes each layer is not known: {error}")


def _flat(program: Program) -> Program:
    """The Program itself, or where it is partitioned one that shares its parameters and has a flat graph, to look at only."""
    if Property.PARTITIONED not in program.properties:
        return program
    return Program(program, program.flat_graph(), name=program.name, interface=program.interface, source=program.source)


@torch.no_grad()
def _trace_static(
    model: nn.Module,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None,
    constants: Mapping[str, object],
) -> Program:
    """Trace with fixed sizes and without comparing outputs: nothing is computed, and it is several times faster."""
    inputs = example_inputs if example_inputs is not None else default_inputs(model, _BATCH, _length(model))
    return trace(model, inputs, {}, check=False, **constants)  # type: ignore[arg-type]


def _length(model: nn.Module) -> int:
    """Tokens in an example; some position tables start at an offset, so half of one is always inside it."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(1, min(_LENGTH, positions // 2)) if isinstance(positions, int) and positions > 0 else _LENGTH


def _inspected(site: Site, zeros: int | None, tried: Mapping[str, Pattern]) -> InspectedSite:
    return InspectedSite(
        name=site.name,
        op=site.op,
        shape=site.shape,
        parameters=site.parameters,
        macs=site.macs,
        sparsity=None if zeros is None else zeros / max(site.parameters, 1),
        patterns=tuple(
            text
            for text, pattern in tried.items()
            if pattern.bound(kernel=site.kernel, groups=site.groups).misfit(site.shape) is None
        ),
    )


@torch.no_grad()
def _count_zeros(program: Program, sites: Iterable[Site]) -> dict[str, int | None]:
    """Zeros of each weight, masked entries included; None on the meta device."""
    masks = {
        str(node.args[0].target): program.tensor(str(node.args[1].target))
        for node in program.calls(custom_ops.mask)
        if isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    }
    counts: dict[str, int | None] = {}
    for site in sites:
        weight, mask = program.tensor(site.name), masks.get(site.name)
        if weight.is_meta:
            counts[site.name] = None
        elif mask is None:
            counts[site.name] = weight.numel() - int(torch.count_nonzero(weight))
        else:
            counts[site.name] = weight.numel() - int(torch.count_nonzero((weight != 0) & mask))
    return counts


def _input_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes that the Program was traced with."""
    traced = program.source.trace.get("inputs", {})
    assert isinstance(traced, Mapping)
    return {name: tuple(traced[name]["shape"]) for name in program.interface.names if name in traced}


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # as text, since rich reads :name: as an emoji and [..] as markup


def _grouped(made: Mapping[str, str]) -> str:
    """Patterns by what a target makes of them: ``exploited: 2:4; stored only: unstructured 4x1``."""
    kinds = dict.fromkeys(made.values())
    return "; ".join(f"{kind}: {' '.join(text for text, own in made.items() if own == kind)}" for kind in kinds)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
