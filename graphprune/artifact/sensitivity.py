"""Sensitivity: what pruning each layer alone does to a metric, as data that is saved, shown and turned into a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphprune.artifact.measurements import Measurements
from graphprune.errors import SparsityError
from graphprune.pipeline.recipe import Recipe
from graphprune.sparsity.distribution import from_sensitivity


@dataclass(frozen=True)
class SweepSettings:
    """What measurements must have in common to be put together.

    Attributes:
        model: What the user calls the model.
        weights: Fingerprint of all its parameters.
        metric: What the user calls the metric, such as ``package.module:function``.
        lower_is_better: Whether a smaller metric is better (a loss), or a larger one (an accuracy).
        pattern: Text of the sparsity pattern.
        criterion: Text of the criterion.
    """

    model: str
    weights: str
    metric: str
    lower_is_better: bool
    pattern: str
    criterion: str


@dataclass(frozen=True)
class MeasuredSite:
    """One layer, or one block whose layers lose their heads or neurons together.

    Attributes:
        name: The module's dotted name, the weight's where the module has several, or the block's.
        members: Names of its weights.
        weights: How many weights they have together.
        values: The metric with only this layer pruned, by sparsity.
    """

    name: str
    members: tuple[str, ...]
    weights: int
    values: Mapping[float, float]


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        site: Name of the layer.
        sparsity: Its sparsity, to the nearest unit of the pattern.
        value: The metric.
        drop: How much worse than dense; negative where it got better.
    """

    site: str
    sparsity: float
    value: float
    drop: float


@dataclass(frozen=True)
class Sensitivity(Measurements):
    """What pruning each layer alone does to a metric. Prints as a table.

    Attributes:
        settings: What was measured.
        dense: The metric of the dense model.
        sites: Layers in the order of the graph, with what was measured so far.
    """

    kind = "sensitivity"

    settings: SweepSettings
    dense: float
    sites: tuple[MeasuredSite, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """All measurements, layer by layer, sparsities ascending."""
        return tuple(
            Point(site.name, sparsity, value, self._drop(value))
            for site in self.sites
            for sparsity, value in sorted(site.values.items())
        )

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Every sparsity at which some layer was measured, ascending."""
        return tuple(sorted({sparsity for site in self.sites for sparsity in site.values}))

    def drop(self, site: str, sparsity: float) -> float | None:
        """How much worse than dense the metric is with one layer pruned; None where that was not measured."""
        values = next((item.values for item in self.sites if item.name == site), {})
        return self._drop(values[sparsity]) if sparsity in values else None

    def with_value(self, site: str, sparsity: float, value: float) -> Sensitivity:
        """Return a copy with one more measurement."""
        sites = (
            replace(item, values={**item.values, sparsity: value}) if item.name == site else item for item in self.sites
        )
        return replace(self, sites=tuple(sites))

    def targets(self, sparsity: float) -> dict[str, float]:
        """Share a sparsity among the layers so that the sum of their drops is least.

        Drops below 0 count as 0; see ``graphprune.sparsity.distribution.from_sensitivity`` for the rest.

        Args:
            sparsity: Wanted fraction of zeros over all layers measured.

        Returns:
            Sparsity of each layer by its name.

        Raises:
            SparsityError: A layer has no measurement yet, or the largest sparsities measured do not reach ``sparsity``.
        """
        missing = [site.name for site in self.sites if not site.values]
        if missing:
            raise SparsityError(
                f"{len(missing)} of {len(self.sites)} layers are not measured yet, {missing[0]} among them; run the sweep "
                f"to its end first"
            )
        curves = [[(s, max(0.0, self._drop(value))) for s, value in site.values.items()] for site in self.sites]
        shares = from_sensitivity(curves, [site.weights for site in self.sites], sparsity)
        return {site.name: share for site, share in zip(self.sites, shares, strict=True)}

    def recipe(self, sparsity: float, *, schedule: str = "one-shot") -> Recipe:
        """Return the recipe that gives each layer its share.

        Args:
            sparsity: As for ``targets``.
            schedule: When the masks are set; ``one-shot`` is what was measured. Others need training.

        Returns:
            One ``insert-masks`` step with ``targets`` and ``select`` naming every layer.

        Raises:
            SparsityError: As ``targets``.
            RecipeError: ``schedule`` is unknown.
        """
        shares = self.targets(sparsity)
        rounded = {name: round(share, 6) for name, share in shares.items()}
        options: dict[str, object] = {
            "pattern": self.settings.pattern,
            "sparsity": sparsity,
            "criterion": self.settings.criterion,
            "schedule": schedule,
            "scope": "local",
            "targets": [f"{name}={rounded[site.name]}" for site in self.sites for name in _targeted(site)],
            "select": [name for site in self.sites for name in _targeted(site)],
        }
        if (most := max(rounded.values())) > 0.98:
            options["max_sparsity"] = most
        return Recipe.of([{"insert-masks": options}])

    def to_dict(self) -> dict[str, object]:
        """What ``save`` writes, as plain data for JSON."""
        return {
            "format": self.file_format,
            "settings": asdict(self.settings),
            "dense": self.dense,
            "sites": [
                {
                    "name": site.name,
                    "members": list(site.members),
                    "weights": site.weights,
                    "values": [list(item) for item in sorted(site.values.items())],
                }
                for site in self.sites
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Read ``to_dict`` back."""
        sites = tuple(
            MeasuredSite(
                str(item["name"]),
                tuple(map(str, item["members"])),
                int(item["weights"]),
                {float(sparsity): float(value) for sparsity, value in item["values"]},
            )
            for item in data["sites"]
        )
        dense = float(data["dense"])
        if not all(math.isfinite(value) for value in (dense, *(v for site in sites for v in site.values.values()))):
            raise ValueError("a value is not finite")
        return Sensitivity(SweepSettings(**data["settings"]), dense, sites)

    def plot(self, path: Path | str) -> Path:
        """Draw the drops as a heat map, layers by sparsities, to a ``.png``, ``.svg`` or ``.pdf`` file.

        Raises:
            GraphPruneError: matplotlib is missing, the suffix is unknown, nothing is measured, or the file cannot be written.
        """
        from graphprune.artifact.sensitivity_plot import plot

        return plot(self, path)

    def _drop(self, value: float) -> float:
        return value - self.dense if self.settings.lower_is_better else self.dense - value

    def table(self, shares: Mapping[str, float] | None = None) -> Group:
        """The drops as a table, with a column for ``targets`` where they are given."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        titles = ["layer", "weights", *(f"{sparsity:g}" for sparsity in self.sparsities)]
        for title in (*titles, *(["target"] if shares is not None else [])):
            table.add_column(title, overflow="fold", justify="left" if title == "layer" else "right")
        for site in self.sites:
            drops = [self.drop(site.name, sparsity) for sparsity in self.sparsities]
            cells = [site.name, f"{site.weights:,}", *("-" if drop is None else f"{drop:.5f}" for drop in drops)]
            if shares is not None:
                cells.append(f"{shares[site.name]:.4f}")
            table.add_row(*(Text(cell) for cell in cells))  # as text, since rich reads [..] as markup
        better = "lower" if self.settings.lower_is_better else "higher"
        summary = (
            f"how much worse than dense {self.settings.metric} is ({better} is better; dense {self.dense:.6g}) with one layer "
            f"pruned to {self.settings.pattern} by {self.settings.criterion}, by its sparsity"
        )
        return Group(table, "", Text(summary))


def _targeted(site: MeasuredSite) -> tuple[str, ...]:
    """The names to write into a recipe; the weights' own are longer, and needed for blocks only."""
    return site.members if len(site.members) > 1 else (site.name,)
