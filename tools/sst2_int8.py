"""Accuracy and size of int8 models on SST-2, of the dense and the pruned models that ``sst2.py`` made; measured on ONNX files.

    python tools/sst2.py --row dense --row "80 % 4x1"     # trains what is quantized here; keeps it in out/sst2
    python tools/sst2_int8.py                              # quantizes, exports, measures; minutes
    python tools/sst2_int8.py --recipe tuned.yaml          # with a recipe of your own, such as one that graphprune tune wrote

Each row is the mean over the seeds. Accuracy is that of the exported file on onnxruntime, over all dev sentences.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sst2 import Experiment, accuracy, program_folder
from sst2_task import DENSE, ROWS, Settings, Task, data_folder, made_up_task, read_task
from torch import Tensor

import graphprune as gp
from graphprune.demo.corpus import batches
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.registry import make_target

STATIC = "annotate-quant{observer=percentile},insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
RECIPES = {"fp32": "", "int8 static": STATIC, "int8 dynamic": "dynamic-quant"}
"""What is done to a model, by the name of its column."""


def calibration_data(task: Task, samples: int) -> list[dict[str, Tensor]]:
    """Batches of training phrases without labels, phrases of one length together."""
    chosen = batches(task.train.items, 512, seed=0)
    taken: list[dict[str, Tensor]] = []
    for indices in chosen:
        if sum(len(item["input_ids"]) for item in taken) >= samples:
            break
        inputs = task.train.inputs(indices)
        inputs.pop("labels")
        taken.append(inputs)
    return taken


def on_onnxruntime(folder: Path, threads: int | None) -> Callable[..., Any]:
    """The model of an artifact, called like the source."""
    run = make_target("onnx").open(folder, threads)

    def call(**inputs: Tensor) -> Any:
        result = run({name: value.numpy() for name, value in inputs.items()})
        return SimpleNamespace(logits=torch.from_numpy(result["logits"]))

    return call


def measure(
    program: gp.Program, recipe: Recipe, task: Task, data: list[dict[str, Tensor]], folder: Path, threads: int | None
) -> tuple[float, float]:
    """Quantize and export one model.

    Returns:
        Accuracy of the exported file, and the size of its model in megabytes.
    """
    quantized = gp.transform(program, recipe, data=data)
    artifact = gp.export(quantized.eval(), "onnx", folder, overwrite=True)
    size = sum(item.bytes for item in artifact.manifest.files if item.name.startswith("model."))
    return accuracy(on_onnxruntime(folder, threads), task.dev), size / 1e6


def programs(task: Task, settings: Settings, out: Path, seed: int, rows: list[str]) -> dict[str, gp.Program]:
    """The trained models of a seed, with logits as their one output.

    Raises:
        GraphPruneError: ``sst2.py`` has not trained one of them.
    """
    found = {}
    for name in rows:
        if name == DENSE:
            model = Experiment(task, settings, out, Progress(disable=True)).dense(seed)
            inputs = task.train.inputs([0, 1])
            inputs.pop("labels")
            found[name] = gp.trace(model, inputs)
        else:
            folder = program_folder(out, ROWS[name], seed)
            if not folder.is_dir():
                raise gp.GraphPruneError(
                    f'{folder} does not exist; run: python tools/sst2.py --row "{name}" --seed {seed}'
                )
            found[name] = gp.transform(gp.load(folder).eval(), "keep-outputs{names=[logits]}")
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder that sst2.py wrote; artifacts go there too.")] = Path("out/sst2"),
    seed: Annotated[list[int], typer.Option(help="A seed; may be given more than once.")] = [0, 1, 2],  # noqa: B006
    row: Annotated[list[str], typer.Option(help="A row of sst2.py.")] = [DENSE, "80 % 4x1"],  # noqa: B006
    recipe: Annotated[Path | None, typer.Option(help="A recipe file to use for another column.")] = None,
    samples: Annotated[int, typer.Option(help="Phrases to calibrate with.", min=1)] = 512,
    quick: Annotated[bool, typer.Option(help="The models of sst2.py --quick.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
) -> None:
    """Print accuracy and size of fp32 and int8 files."""
    console = Console(stderr=True)
    settings = Settings.quick() if quick else Settings()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        task = made_up_task(settings) if quick else read_task(data_folder(), settings)
        recipes: Mapping[str, Recipe] = {name: Recipe.of(text) for name, text in RECIPES.items()}
        if recipe is not None:
            recipes = {**recipes, recipe.stem: Recipe.load(recipe)}
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in seed:
            for name, program in programs(task, settings, out, number, row).items():
                for column, steps in recipes.items():
                    folder = (
                        out / "artifacts" / f"{program_folder(out, ROWS[name], number).name}-{column.replace(' ', '-')}"
                    )
                    result = measure(program, steps, task, calibration_data(task, samples), folder, threads)
                    found.setdefault((name, column), []).append(result)
                    console.print(f"seed {number}: {name}, {column}: {result[0]:.4f}, {result[1]:.1f} MB")
    except (gp.GraphPruneError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    Console(width=max(console.width, 120)).print(table(found, seed))


def table(found: Mapping[tuple[str, str], list[tuple[float, float]]], seeds: list[int]) -> Table:
    """Accuracy of each seed, mean, change of the mean relative to dense fp32 and to the same model in fp32, size."""
    shown = Table(title="SST-2 dev accuracy on onnxruntime", title_justify="left")
    for heading in (
        "model",
        "file",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "against dense fp32",
        "against its fp32",
        "MB",
    ):
        shown.add_column(heading, justify="left" if heading in ("model", "file") else "right", no_wrap=True)
    means = {key: statistics.mean(item[0] for item in runs) for key, runs in found.items()}
    for (name, column), runs in found.items():
        changes = [
            f"{means[name, column] / means[other] - 1:+.2%}" if other in means and other != (name, column) else "-"
            for other in ((DENSE, "fp32"), (name, "fp32"))
        ]
        shown.add_row(
            name,
            column,
            *(f"{item[0]:.4f}" for item in runs),
            f"{means[name, column]:.4f}",
            *changes,
            f"{runs[0][1]:.1f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
