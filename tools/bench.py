"""Measure graphprune's speed and memory goals as ratios of interleaved runs, with medians.

    python tools/bench.py                     # all, on BERT-base; about 20 minutes on 2 cores
    python tools/bench.py --only passes       # one of: passes, step, update, large, memory, int8, calibration, inc, ipex, openvino
    python tools/bench.py --layers 2          # a smaller BERT, to try it
    python tools/bench.py sparse              # the sparse-cpu target, with options of its own: see sparse --help

A ratio is the median of its numerator over the median of its denominator, both measured in turn. ``inc`` compares with Intel
Neural Compressor 2.6, which `make bench-inc` installs into an environment of its own; without it the rest is measured.
``openvino`` compares with NNCF, whose environment `python tools/environment.py --bare nncf` makes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from benchmarks.inc import bench_inc
from benchmarks.ipex import bench_ipex
from benchmarks.measuring import Measure, Setting, Unavailable
from benchmarks.memory import bench_memory
from benchmarks.openvino import bench_openvino
from benchmarks.passes import bench_passes
from benchmarks.quantization import bench_calibration, bench_int8
from benchmarks.sparse import bench_sparse
from benchmarks.training import bench_large, bench_step, bench_update
from rich.console import Console
from rich.table import Table

from graphprune.artifact.manifest import versions

BENCHES: Mapping[str, Callable[[Setting], Iterator[Measure]]] = {
    "passes": bench_passes,
    "step": bench_step,
    "update": bench_update,
    "large": bench_large,
    "memory": bench_memory,
    "int8": bench_int8,
    "calibration": bench_calibration,
    "inc": bench_inc,
    "ipex": bench_ipex,
    "openvino": bench_openvino,
}


def measure(names: list[str], setting: Setting, console: Console) -> tuple[list[Measure], dict[str, str]]:
    """Make measurements and show them as they come.

    Returns:
        The measures, and why each measurement that cannot be made here was left out.
    """
    measures: list[Measure] = []
    left_out: dict[str, str] = {}
    for name in names:
        with console.status(f"measuring {name}"):
            try:
                for item in BENCHES[name](setting):
                    measures.append(item)
                    console.log(f"{item.name}: {item.ratio:.4g} (goal {item.goal})")
            except Unavailable as reason:
                left_out[name] = str(reason)
                console.print(f"{name} is left out: {reason}", soft_wrap=True)
    return measures, left_out


app = typer.Typer(add_completion=False)
app.command("sparse")(bench_sparse)


@app.callback(invoke_without_command=True)
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of: {', '.join(BENCHES)}; repeatable.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the BERT; 12 is BERT-base.", min=1)] = 12,
    repeats: Annotated[int, typer.Option(help="Rounds of interleaved runs.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    context: typer.Context = None,  # type: ignore[assignment] - typer knows it by this very type
) -> None:
    """Measure and print the ratios; the exit code is 1 where a goal is missed."""
    if context is not None and context.invoked_subcommand is not None:
        return
    unknown = [name for name in only or () if name not in BENCHES]
    if unknown == ["sparse"]:
        print("error: sparse is a command: python tools/bench.py sparse", file=sys.stderr)
        raise typer.Exit(2)
    if unknown:
        print(f"error: unknown measure {unknown[0]!r}; known: {', '.join(BENCHES)}", file=sys.stderr)
        raise typer.Exit(2)
    console = Console(stderr=as_json, log_path=False)
    setting = Setting(layers=layers, repeats=repeats)
    measures, left_out = measure(list(only or BENCHES), setting, console)
    if as_json:
        result = {"versions": dict(versions()), "measures": [asdict(item) for item in measures], "left_out": left_out}
        print(json.dumps(result, indent=2))
    else:
        table = Table("ratio of medians", "measured", "goal", "met", "detail")
        for item in measures:
            table.add_row(item.name, f"{item.ratio:.4f}", item.goal, "yes" if item.met else "[red]NO", item.detail)
        console.print(table)
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.print(f"{torch.get_num_threads()} threads; {known}")
    raise typer.Exit(0 if all(item.met for item in measures) else 1)


if __name__ == "__main__":
    app()
