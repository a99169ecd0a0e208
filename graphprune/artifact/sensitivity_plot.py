"""The heat map of a sensitivity sweep. Needs matplotlib, which is asked for when something is drawn."""

from __future__ import annotations

import importlib
import io
import math
from pathlib import Path
from typing import Any

from graphprune.artifact.files import written
from graphprune.artifact.sensitivity import Sensitivity
from graphprune.errors import GraphPruneError

_SUFFIXES = (".png", ".svg", ".pdf")
_ROW, _COLUMN = 0.2, 0.75  # inches
_DPI = 110


def check_plot(path: Path | str) -> None:
    """Check before hours of measuring that a plot can be drawn.

    Raises:
        GraphPruneError: matplotlib is missing, or the suffix is unknown.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise GraphPruneError(f"{path}: a plot is written as {', '.join(_SUFFIXES)}; name the file so")
    _matplotlib("figure")


def plot(found: Sensitivity, path: Path | str) -> Path:
    """Draw the drops: a row a layer in the order of the graph, a column a sparsity, the number in each cell.

    Args:
        found: What was measured; what was not stays gray.
        path: File to write, ``.png``, ``.svg`` or ``.pdf``. Colors grow with the square root of the drop, so that small ones differ
            too; a drop below 0 has the color of 0.

    Returns:
        The path.

    Raises:
        GraphPruneError: matplotlib is missing, the suffix is unknown, nothing is measured, or the file cannot be written.
    """
    check_plot(path)
    if not found.points:
        raise GraphPruneError("nothing is measured yet, so there is nothing to draw")
    rows, columns = len(found.sites), len(found.sparsities)
    longest = max(len(site.name) for site in found.sites)
    size = (0.085 * longest + _COLUMN * columns + 1.6, _ROW * rows + 1.3)
    figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    drops = [[found.drop(site.name, sparsity) for sparsity in found.sparsities] for site in found.sites]
    clipped = [[math.nan if drop is None else max(0.0, drop) for drop in row] for row in drops]
    top = max(max(point.drop for point in found.points), 1e-12)
    norm = _matplotlib("colors").PowerNorm(0.5, vmin=0.0, vmax=top)
    image = axes.imshow(clipped, cmap="YlOrRd", norm=norm, aspect="auto")
    axes.set_facecolor("0.85")
    axes.set_xticks(range(columns), [f"{sparsity:g}" for sparsity in found.sparsities])
    axes.set_yticks(range(rows), [site.name for site in found.sites], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_xlabel("sparsity of this layer alone")
    _write_numbers(axes, drops, norm)
    worse = "increase" if found.settings.lower_is_better else "drop"
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(worse)
    bar.ax.tick_params(labelsize=7.5)
    called = found.settings.metric.rpartition(":")[2]
    axes.set_title(f"{worse} of {called} (dense {found.dense:.4g}), {found.settings.pattern}", fontsize=9.5)
    with written(path) as temporary:
        _save(figure, temporary, Path(path).suffix[1:].lower())
    return Path(path)


def _save(figure: Any, path: Path, kind: str) -> None:
    """Write the figure; a PNG with a palette of 256 colors, which makes it four times smaller."""
    if kind != "png":
        figure.savefig(path, format=kind)
        return
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=_DPI)
    image = importlib.import_module("PIL.Image").open(pixels)  # Pillow comes with matplotlib
    image.convert("RGB").quantize(256).save(path, "PNG", optimize=True)


def _write_numbers(axes: Any, drops: list[list[float | None]], norm: Any) -> None:
    """Write each drop into its cell, white on dark cells."""
    for row, line in enumerate(drops):
        for column, drop in enumerate(line):
            if drop is not None:
                color = "white" if norm(max(0.0, drop)) > 0.6 else "black"
                axes.text(column, row, _short(drop), ha="center", va="center", fontsize=7, color=color)


def _short(drop: float) -> str:
    """Four decimals where they show the number, else two digits."""
    return f"{drop:.4f}" if drop == 0 or 1e-4 <= abs(drop) < 100 else f"{drop:.1e}"


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise GraphPruneError('a plot needs matplotlib: pip install "graphprune[plot]"') from error
