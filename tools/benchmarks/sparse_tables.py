"""What the comparison of sparse-cpu prints: tables of layers and of models, and its goals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from rich.table import Table

from benchmarks.measuring import Measure
from benchmarks.sparse_layers import Layer
from benchmarks.sparse_models import Measured, Row

LAYERS = {0.8: 4.0, 0.9: 6.5}
"""Of float32 layers over torch's dense ones at 128 tokens, mean over shapes, by sparsity."""
MODELS = {
    ("fp32", 0.8, 128): 3.5,
    ("fp32", 0.8, 384): 3.0,
    ("fp32", 0.9, 128): 4.5,
    ("int8", 0.8, 128): 5.0,
    ("int8", 0.8, 384): 5.0,
}
"""Of models over dense float32 on onnxruntime, by number format, sparsity and tokens."""
OVER_INT8 = 1.5
"""Of int8 models at a sparsity of 0.8 over the fastest dense int8."""
FALLBACK = 0.98
"""Of what the cost model takes over the dense kernel, on every layer."""


def at_least(name: str, ratio: float, goal: float, detail: str) -> Measure:
    """A measure that meets its goal where it is not smaller."""
    return Measure(name, ratio, f">= {goal:.4g}", ratio >= goal, detail)


def layer_tables(layers: Sequence[Layer], detailed: Sequence[float]) -> Iterator[Table]:
    """Each layer of some sparsities, then what the cost model does at all of them."""
    table = _table(
        "linear layers, times faster than torch's dense fp32; `of peak` is that of FMA or VNNI",
        "format", "sparsity", "tokens", "threads", "shape", "in panels", "rows to rows", "over dense int8", "cost model", "of peak",
        "of memory",
    )  # fmt: skip
    for item in layers:
        case = item.case
        if case.sparsity in detailed:
            table.add_row(
                case.number_format, f"{case.sparsity:g}", str(case.tokens), str(case.threads), f"{case.rows}x{case.features}",
                f"{item.kernel:.2f}", f"{item.layer:.2f}", f"{item.same_format:.2f}" if case.number_format == "int8" else "-",
                "sparse" if item.sparse else "dense", _share(item.of_peak), _share(item.of_memory),
            )  # fmt: skip
    yield table
    table = _table("with the cost model", "format", "sparsity", "layers", "of these sparse", "slowest over dense")
    for (kind, sparsity), group in _grouped(layers).items():
        worst = min(item.chosen for item in group)
        table.add_row(kind, f"{sparsity:g}", str(len(group)), str(sum(item.sparse for item in group)), f"{worst:.3f}")
    yield table


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold"
    )
    for name in columns:
        table.add_column(name, justify=justify)
    return table


def _grouped(layers: Sequence[Layer]) -> dict[tuple[str, float], list[Layer]]:
    found: dict[tuple[str, float], list[Layer]] = defaultdict(list)
    for item in layers:
        found[item.case.number_format, item.case.sparsity].append(item)
    return found


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def layer_goals(layers: Sequence[Layer]) -> Iterator[Measure]:
    """Means over shapes; both of layers between sparse ones and of layers by themselves."""
    means: dict[tuple[str, float, int, int], list[Layer]] = defaultdict(list)
    for item in layers:
        case = item.case
        if case.sparsity in LAYERS:
            means[case.number_format, case.sparsity, case.tokens, case.threads].append(item)
    for (kind, sparsity, tokens, threads), group in means.items():
        shares = [item.of_peak for item in group if item.of_peak is not None]
        peak = (
            f"; {_share(statistics.mean(shares))} of the {'FMA' if kind == 'fp32' else 'VNNI'} peak" if shares else ""
        )
        for form, values in (("in panels", [g.kernel for g in group]), ("from rows to rows", [g.layer for g in group])):
            name = f"{kind} layers {form} / torch's dense fp32, sparsity {sparsity:g}"
            detail = f"mean of {len(group)} shapes, {tokens} tokens, {threads} threads{peak}"
            mean = statistics.mean(values)
            if kind == "fp32" and tokens == 128:
                yield at_least(name, mean, LAYERS[sparsity], detail)
            else:
                yield Measure(name, mean, "no goal", True, detail)


def fallback_goal(layers: Sequence[Layer]) -> Measure:
    """Of the worst layer."""
    worst = min(layers, key=lambda item: item.chosen)
    case = worst.case
    detail = (
        f"{case.rows}x{case.features}, {case.number_format}, sparsity {case.sparsity:g}, {case.tokens} tokens, {case.threads} threads; "
        f"{sum(not item.sparse for item in layers)} of {len(layers)} layers fall back"
    )
    return at_least("slowest layer with the cost model / dense", worst.chosen, FALLBACK, detail)


def model_table(found: Sequence[Measured]) -> Table:
    """A row for each."""
    table = _table(
        "whole models, times faster than others; `of peak` is that of FMA or VNNI",
        "model", "format", "sparsity", "batch", "tokens", "threads", "onnxruntime fp32", "torch fp32", "DeepSparse", "OpenVINO int8", "ms",
        "of peak", "of memory",
    )  # fmt: skip
    for item in found:
        row = item.row
        ratios = (row.over_onnxruntime_fp32, row.over_torch_dense, row.over_deepsparse, row.over_openvino_int8)
        table.add_row(
            row.model, row.format, f"{row.sparsity:g}", str(row.batch), str(row.sequence), str(row.threads),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios), f"{1000 * item.seconds:.1f}",
            _share(item.of_peak), _share(item.of_memory),
        )  # fmt: skip
    return table


def model_goals(found: Sequence[Measured]) -> Iterator[Measure]:
    """Those of the ratios that have one; DeepSparse has one everywhere."""
    for row in (item.row for item in found):
        what = f"{row.format} {row.pattern} {row.sparsity:g}"
        goal = MODELS.get((row.format, row.sparsity, row.sequence))
        if goal is not None:
            yield at_least(f"{what} / onnxruntime fp32", row.over_onnxruntime_fp32, goal, _sizes(row))
        if row.over_openvino_int8 is not None and row.sparsity == 0.8:
            yield at_least(f"{what} / dense int8 on OpenVINO", row.over_openvino_int8, OVER_INT8, _sizes(row))
        if row.over_deepsparse is not None:
            ratio = row.over_deepsparse
            yield Measure(f"{what} / DeepSparse", ratio, "> 1", ratio > 1, _sizes(row))


def _sizes(row: Row) -> str:
    return f"{row.model}, batch {row.batch}, {row.sequence} tokens, {row.threads} threads"


def goals_table(goals: Sequence[Measure]) -> Table:
    """All goals."""
    table = _table("goals", "times faster", "measured", "goal", "met", "detail", justify="left")
    for item in goals:
        table.add_row(item.name, f"{item.ratio:.3f}", item.goal, "yes" if item.met else "[red]NO", item.detail)
    return table
