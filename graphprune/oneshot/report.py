"""What pruning once did, by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class PrunedSite:
    """One pruned weight.

    Attributes:
        name: The parameter's dotted name.
        shape: Logical shape ``(out, in * kernel)``.
        pattern: Text of the sparsity pattern.
        criterion: Text of the criterion.
        sparsity: Fraction of zeros in [0, 1], measured on the weight.
        tokens: Rows of input that the criterion saw; 0 where it needs none.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    criterion: str
    sparsity: float
    tokens: int = 0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class PruneReport:
    """Result of pruning once. Prints as a table.

    Attributes:
        sites: Pruned weights in the order of the graph.
        batches: Batches of calibration data.
        peak_bytes: Most bytes that weights, statistics of inputs and the work space of a criterion took at a time, where
            weights are read as they are needed; 0 where the model was in memory.
    """

    sites: tuple[PrunedSite, ...]
    batches: int
    peak_bytes: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all sites."""
        total = sum(site.weights for site in self.sites)
        return sum(site.sparsity * site.weights for site in self.sites) / total if total else 0.0

    def to_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return {
            "sites": [{**asdict(site), "shape": list(site.shape)} for site in self.sites],
            "totals": {
                "sites": len(self.sites),
                "weights": sum(site.weights for site in self.sites),
                "sparsity": self.sparsity,
                "batches": self.batches,
                "peak_bytes": self.peak_bytes,
            },
        }

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("pruned weight", "out x in", "pattern", "criterion", "tokens", "sparsity"):
            table.add_column(title, overflow="fold", justify="right" if title in ("tokens", "sparsity") else "left")
        for site in self.sites:
            cells = (site.name, f"{site.shape[0]}x{site.shape[1]}", site.pattern, site.criterion)
            numbers = (f"{site.tokens:,}" if site.tokens else "-", f"{site.sparsity:.4f}")
            table.add_row(*(Text(cell) for cell in (*cells, *numbers)))
        total = sum(site.weights for site in self.sites)
        return Group(
            table, "", Text(f"{len(self.sites)} weights pruned, {total:,} entries: sparsity {self.sparsity:.4f}")
        )
