"""Lower BERT-base to every target in all four corners (dense and sparse, fp32 and int8), and compare them in one table.

    python tools/corners.py out/corners                       # every target that runs here; about half an hour on 2 cores
    python tools/corners.py out/corners --target onnx --layers 2 --rounds 5

Weights are random (seed 0). Sparse is 80 % of every prunable weight in blocks of 4x1, by magnitude; int8 is static, calibrated on random
tokens, by the preset of the target. Programs, artifacts and ``benchmark.json`` stay in the folder, and a second run keeps what is there.

Some runtimes need an environment of their own: `python tools/environment.py ipex` makes one. What it makes is found; any other Python is
named by ``GRAPHPRUNE_IPEX_PYTHON`` or ``GRAPHPRUNE_DEEPSPARSE_PYTHON``. IPEX models are lowered there too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import environment
import torch
import typer
from benchmarks.measuring import Setting, bert
from rich.console import Console
from torch import Tensor

import graphprune as gp
from graphprune.artifact.files import MANIFEST, PROGRAM, written
from graphprune.pipeline.registry import known_targets
from graphprune.pipeline.remote import interpreter

EXPANDED = ("openvino", "deepsparse")
"""Presets that quantize the products of attention too."""
PRESETS: Mapping[str, str] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "inductor": "ipex",
    "ipex": "ipex",
    "deepsparse": "deepsparse",
}
"""Targets of the table, each with the quantization preset of its int8 corners; the first is what ratios are over."""
LOWERED_THERE = ("ipex",)
"""Targets whose lowering needs the environment of their runtime."""
SPARSE = "insert-masks{pattern=4x1,sparsity=0.8,criterion=magnitude,schedule=one-shot,scope=local}"
_SAMPLES, _CALIBRATION_BATCH = 16, 8
_EXPORT = "from graphprune.cli import main; main()"


@dataclass(frozen=True)
class Model:
    """What is lowered; a folder holds one.

    Attributes:
        layers: Layers of the BERT; 12 is BERT-base.
        hidden: Its width, a multiple of 64.
        length: Tokens of the calibration samples.
    """

    layers: int = 12
    hidden: int = 768
    length: int = 128


class Programs:
    """The Programs of the corners, made where they are asked for and missing."""

    def __init__(self, out: Path, model: Model):
        self._folder, self._model = out / "programs", model
        self._dense: gp.Program | None = None

    def folder(self, sparse: bool, preset: str | None) -> Path:
        """The saved Program of a corner; ``preset`` is None for fp32."""
        path = self._folder / f"{'sparse' if sparse else 'dense'}-{preset or 'fp32'}"
        if not (path / PROGRAM).is_file():
            program = self._traced()
            if sparse:
                program = gp.transform(program, SPARSE)
            if preset is not None:
                expand = "expand-attention," if preset in EXPANDED else ""
                steps = f"{expand}annotate-quant{{preset={preset}}},insert-observers,calibrate{{progress=false}},insert-fake-quant"
                program = gp.transform(program, steps, data=self._batches())
            gp.save(program, path)
        return path

    def _traced(self) -> gp.Program:
        if self._dense is None:
            model = bert(Setting(layers=self._model.layers, hidden=self._model.hidden)).eval()
            example = torch.ones(2, 16, dtype=torch.int64)
            self._dense = gp.trace(model, {"input_ids": example, "attention_mask": example}, check=False)
        return self._dense

    def _batches(self) -> list[dict[str, Tensor]]:
        ids = torch.randint(0, 30000, (_SAMPLES, self._model.length), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(_CALIBRATION_BATCH)]


def lower(out: Path, model: Model, targets: Sequence[str], console: Console) -> tuple[list[Path], dict[str, str]]:
    """Lower every corner that is missing.

    Args:
        out: Where Programs and artifacts are.
        model: What is lowered.
        targets: Names of targets.
        console: Where to say what is done.

    Returns:
        The artifacts, and why others could not be made, by ``target/corner``.
    """
    programs = Programs(out, model)
    made: list[Path] = []
    left_out: dict[str, str] = {}
    for target in targets:
        for sparse in (False, True):
            for preset in (None, PRESETS[target]):
                corner = f"{target}/{'sparse' if sparse else 'dense'}-{'fp32' if preset is None else 'int8'}"
                if not (out / corner / MANIFEST).is_file():
                    with console.status(f"lowering {corner}"):
                        reason = export(programs.folder(sparse, preset), target, out / corner)
                    if reason:
                        left_out[corner] = reason
                        console.print(f"{corner} is left out: {reason}", soft_wrap=True, markup=False)
                        continue
                    console.print(f"{corner} is lowered", highlight=False)
                made.append(out / corner)
    return made, left_out


def export(program: Path, target: str, out: Path) -> str:
    """Lower a saved Program in a process of its own.

    Returns:
        Why it could not be lowered; empty where it was.
    """
    python = (interpreter(target) if target in LOWERED_THERE else None) or sys.executable
    command = [python, "-c", _EXPORT, "export", str(program.resolve()), "--target", target, "-o", str(out.resolve())]
    environment_ = {
        key: value for key, value in os.environ.items() if python == sys.executable or not _names(key, target)
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])


def _names(variable: str, target: str) -> bool:
    return variable == f"GRAPHPRUNE_{target.upper()}_PYTHON"


def find_environments(targets: Sequence[str]) -> None:
    """Name the Python of each environment that ``tools/environment.py`` made, where none is named."""
    for target in targets:
        if interpreter(target) is None and environment.pins(target).is_file():
            python = environment.interpreter(target)
            if python is not None:
                os.environ[f"GRAPHPRUNE_{target.upper()}_PYTHON"] = str(python)


def claim(out: Path, model: Model, force: bool) -> None:
    """Make the folder that of a model.

    Raises:
        GraphPruneError: It holds artifacts of another one, or other files.
    """
    path = out / "model.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == asdict(model) and not force:
        return
    if path.is_file() and not force:
        raise gp.GraphPruneError(
            f"{out} holds {path.read_text(encoding='utf-8').strip()}, not {json.dumps(asdict(model))}; choose another folder, or "
            f"replace it with --force"
        )
    if path.is_file():
        for name in ("programs", *PRESETS):
            _remove(out / name)
    elif out.exists() and any(out.iterdir()):
        raise gp.GraphPruneError(f"{out} holds files that this tool did not write; choose an empty folder")
    with written(path) as temporary:
        temporary.write_text(json.dumps(asdict(model)) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def corners(
    out: Annotated[Path, typer.Argument(help="Folder of Programs, artifacts and benchmark.json.")],
    target: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(PRESETS)}; repeatable.", show_default="all")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the BERT; 12 is BERT-base.", min=1)] = 12,
    hidden: Annotated[int, typer.Option(help="Its width, a multiple of 64.", min=64)] = 768,
    batch: Annotated[list[int] | None, typer.Option(help="Examples in a call; repeatable.", show_default="1")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.", show_default="128")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the benchmark; 0 only lowers.", min=0)] = 30,
    force: Annotated[bool, typer.Option("--force", help="Make everything anew.")] = False,
) -> None:
    """Lower what is missing, benchmark all of it, and print the table."""
    console = Console(stderr=True)
    try:
        unknown = [name for name in target or () if name not in PRESETS]
        if unknown:
            raise gp.GraphPruneError(f"unknown target {unknown[0]!r}; known: {', '.join(PRESETS)}")
        targets = [name for name in PRESETS if name in (target or known_targets())]
        model = Model(layers, hidden)
        claim(out, model, force)
        find_environments(targets)
        made, left_out = lower(out, model, targets, console)
        if rounds:
            compare(out, made, console, batch, length, threads, rounds)
    except gp.GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    for corner, reason in left_out.items():
        print(f"left out: {corner}: {reason}")


def compare(
    out: Path,
    made: Sequence[Path],
    console: Console,
    batch: list[int] | None,
    length: list[int] | None,
    threads: int | None,
    rounds: int,
) -> None:
    """Benchmark artifacts, write ``benchmark.json`` and print the tables."""
    with console.status("measuring") as status:
        found = gp.benchmark(
            made,
            batch=batch,
            length=length,
            threads=threads,
            rounds=rounds,
            watch=lambda done, total, what: status.update(f"{done} of {total}: {what}"),
        )
    found.save(out / "benchmark.json")
    print(found)


if __name__ == "__main__":
    typer.run(corners)
