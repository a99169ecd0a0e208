"""Accuracy of pruned models on SST-2, against the dense model that each of them was pruned from.

    python tools/sst2.py                      # the table of docs/results.md; about an hour on 2 cores
    python tools/sst2.py --seed 0 --row dense --row 2:4
    python tools/sst2.py --quick              # a tiny random model on made-up phrases; needs no data; seconds

For each seed all-MiniLM-L6-v2 is fine-tuned (row ``dense``) and then pruned while it is distilled from that dense model.
Every finished run is one JSON line in ``runs.jsonl`` of the output folder, and every model is saved in a folder there.
A table that was interrupted goes on behind its last finished run, and several processes may share the folder where each has
seeds of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors.torch
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sst2_task import DENSE, ROWS, Phrases, Row, Settings, Task, data_folder, made_up_task, read_task
from torch import Tensor, nn

import graphprune as gp
from graphprune.artifact.files import written
from graphprune.artifact.manifest import versions
from graphprune.demo.corpus import batches
from graphprune.demo.trainer import Stage, TeacherCache
from graphprune.ir.masking import masked_sites
from graphprune.sparsity.layout import to_logical

RUNS = "runs.jsonl"
_SETTINGS = "settings.json"


def accuracy(model: Callable[..., Any], phrases: Phrases) -> float:
    """Fraction of phrases that a model in eval mode labels right.

    Raises:
        GraphPruneError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.classification import MulticlassAccuracy
    except ImportError as error:
        raise gp.GraphPruneError('accuracy needs torchmetrics: pip install "graphprune[results]"') from error
    metric = MulticlassAccuracy(num_classes=2, average="micro")
    with torch.no_grad():
        for indices in batches(phrases.items, 2048, seed=0):
            inputs = phrases.inputs(indices)
            labels = inputs.pop("labels")
            metric.update(model(**inputs).logits, labels)
    return float(metric.compute())


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        row: Name of the row.
        seed: Of the classifier's start, dropout and the order of the data.
        accuracy: Fraction of dev phrases labeled right, after the last step.
        sparsity: Fraction of zeros among the pruned weights, counted in them after masks were folded; 0 where none is pruned.
        holds: Whether those zeros follow the pattern.
        seconds: Wall time, with what the run needed first (the dense model and its hidden states, where they were not there).
        threads: Threads of torch.
        settings: Numbers of the run.
        versions: Libraries.
    """

    row: str
    seed: int
    accuracy: float
    sparsity: float
    holds: bool
    seconds: float
    threads: int
    settings: Mapping[str, float]
    versions: Mapping[str, str]


class Experiment:
    """Trains rows of the table.

    Args:
        task: What on what.
        settings: Numbers of every run.
        out: Folder of dense models and finished runs.
        progress: Shows the steps.
        steps: Steps that will be taken in all, for the remaining time; 0 = not known.
    """

    def __init__(self, task: Task, settings: Settings, out: Path, progress: Progress, steps: int = 0) -> None:
        self.task, self.settings, self.out, self.progress = task, settings, out, progress
        self._whole = progress.add_task("all runs", total=steps or None)
        self._cache: tuple[int, TeacherCache] | None = None

    def run(self, row: Row, seed: int) -> Result:
        """Train one row and measure it.

        Raises:
            GraphPruneError: A file cannot be written, or torchmetrics is missing.
        """
        torch.manual_seed(seed)
        sparsity, holds = 0.0, True
        started = time.perf_counter()
        if row.name == DENSE:
            model = self._fine_tune(self.task.load(0.1), self.settings.dense_steps, seed, row.name)
            self._save_dense(model, seed)
        elif row.pattern is None:
            model = self._fine_tune(self.dense(seed, dropout=0.1), self.settings.prune_steps, seed, row.name)
        else:
            model, sparsity, holds = self._prune(row, seed)
            gp.save(model, program_folder(self.out, row, seed), overwrite=True)
        seconds = time.perf_counter() - started
        return Result(
            row.name, seed, accuracy(model.eval(), self.task.dev), sparsity, holds, round(seconds, 1),
            torch.get_num_threads(), asdict(self.settings), {**versions()},
        )  # fmt: skip

    def dense(self, seed: int, dropout: float = 0.0) -> Any:
        """The dense model of a seed, in eval mode; it is trained where its file is missing or of other settings."""
        folder = program_folder(self.out, ROWS[DENSE], seed)
        with contextlib.suppress(FileNotFoundError):
            if json.loads((folder / _SETTINGS).read_text(encoding="utf-8")) == self._dense_settings:
                model = self.task.load(dropout)
                model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
                return model.eval()
        self.run(ROWS[DENSE], seed)
        return self.dense(seed, dropout)

    def _save_dense(self, model: Any, seed: int) -> None:
        """Save a dense model and its tokenizer as Hugging Face's libraries load them."""
        folder = program_folder(self.out, ROWS[DENSE], seed)
        model.save_pretrained(folder)
        if self.task.tokenizer is not None:
            self.task.tokenizer.save_pretrained(folder)
        with written(folder / _SETTINGS) as path:
            path.write_text(json.dumps(self._dense_settings), encoding="utf-8")

    @property
    def _dense_settings(self) -> dict[str, float]:
        return self.settings.of_row(DENSE)

    def _fine_tune(self, model: Any, steps: int, seed: int, name: str) -> Any:
        def loss(batch: Sequence[int]) -> Tensor:
            return model(**self.task.train.inputs(batch)).loss

        self._fit(model, loss, Stage(f"seed {seed}: {name}", steps, self.settings.dense_rate), seed)
        return model

    def _prune(self, row: Row, seed: int) -> tuple[gp.Program, float, bool]:
        """Prune the dense model while it is distilled from itself; then fold the masks and measure the weights."""
        settings, teacher = self.settings, self.dense(seed)
        example = self.task.train.inputs([0, 1])
        program = gp.transform(teacher, row.passes(settings), example, labels=True, output_hidden_states=True)
        cache = self._hidden_states(teacher, seed)
        distillation = gp.training.Distillation(
            teacher, logits=settings.logits, hidden=settings.hidden, task=settings.labels,
            temperature=settings.temperature, hidden_loss="relative",
        )  # fmt: skip

        def loss(batch: Sequence[int]) -> Tensor:
            inputs = self.task.train.inputs(batch)
            output = program(**inputs)
            wanted = cache.output(batch, inputs["input_ids"].shape)
            with torch.no_grad():
                wanted["logits"] = teacher.classifier(teacher.bert.pooler(wanted["last_hidden_state"]))
            return distillation(output, wanted, inputs).total

        self._fit(program, loss, Stage(f"seed {seed}: {row.name}", settings.prune_steps, settings.prune_rate), seed)
        sites = masked_sites(program)
        folded = gp.transform(program.eval(), "fold-masks")
        kept = [to_logical(folded.tensor(site.name).detach(), site.decision.layout) != 0 for site in sites]
        zeros = sum(int((~item).sum()) for item in kept) / sum(item.numel() for item in kept)
        holds = all(site.pattern.holds(item) for site, item in zip(sites, kept, strict=True))
        return folded, zeros, holds

    def _hidden_states(self, teacher: nn.Module, seed: int) -> TeacherCache:
        """The dense model's hidden states on all training phrases; the rows of one seed share them."""
        if self._cache is None or self._cache[0] != seed:
            self._cache = None  # two of them need not be in memory
            self._cache = seed, TeacherCache.build(teacher, self.task.train.items, self.progress)
            for task in self.progress.tasks:
                if task.finished:
                    self.progress.remove_task(task.id)
        return self._cache[1]

    def _fit(self, model: nn.Module, loss: Callable[[Sequence[int]], Tensor], stage: Stage, seed: int) -> None:
        """Train the encoder and the classifier; embeddings stay as they are."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embeddings." not in name)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        masked = isinstance(model, gp.Program)
        session = gp.training.Session(model, optimizer, total_steps=stage.steps) if masked else contextlib.nullcontext()
        task = self.progress.add_task(stage.name, total=stage.steps)
        torch.manual_seed(seed)  # of dropout, whatever ran before
        model.train()
        with session:
            for step, batch in enumerate(self._stream(stage.steps, seed)):
                for group in optimizer.param_groups:
                    group["lr"] = stage.learning_rate(step, self.settings.rising)
                value = loss(batch)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                self.progress.advance(task)
                self.progress.advance(self._whole)
        self.progress.remove_task(task)

    def _stream(self, steps: int, seed: int) -> Iterator[list[int]]:
        """A batch a step; which one depends on seed and step alone."""
        step, epoch = 0, 0
        while step < steps:
            made = batches(self.task.train.items, self.settings.tokens, seed=seed * 1_000 + epoch)
            yield from made[: steps - step]
            step, epoch = step + len(made), epoch + 1


def program_folder(out: Path, row: Row, seed: int) -> Path:
    """Where the model of a run is saved: ``dense-0`` for Hugging Face, or a Program with its masks folded, such as ``4x1-0``."""
    return out / f"{(row.pattern or row.name).replace(':', '-')}-{seed}"


def finished(out: Path, settings: Settings) -> dict[tuple[str, int], Result]:
    """Finished runs of an output folder under these settings, by row and seed; a half-written last line is left out."""
    path = out / RUNS
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            result = Result(**json.loads(line))
            if Settings(**result.settings).of_row(result.row) == settings.of_row(result.row):
                found[result.row, result.seed] = result
    return found


def write_result(out: Path, result: Result) -> None:
    """Append a finished run in one write, so that processes may share the file; a line left half-written is ended first."""
    path = out / RUNS
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(asdict(result)) + "\n")


def table(results: Mapping[tuple[str, int], Result], seeds: Sequence[int]) -> Table:
    """Accuracy of each seed, mean, mean change relative to the dense model of the same seed, sparsity and pattern."""
    shown = Table(title="SST-2 dev accuracy", title_justify="left")
    for column in ("row", *(f"seed {seed}" for seed in seeds), "mean", "against dense", "sparsity", "pattern holds"):
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for row in ROWS.values():
        runs = {seed: results[row.name, seed] for seed in seeds if (row.name, seed) in results}
        if not runs:
            continue
        cells = [f"{runs[seed].accuracy:.4f}" if seed in runs else "-" for seed in seeds]
        mean = statistics.mean(run.accuracy for run in runs.values())
        base = [results[DENSE, seed].accuracy for seed in runs if (DENSE, seed) in results]
        change = mean / statistics.mean(base) - 1 if len(base) == len(runs) else math.nan
        sparsity = statistics.mean(run.sparsity for run in runs.values())
        holds = "yes" if all(run.holds for run in runs.values()) else "no"
        pruned = (f"{sparsity:.4f}", holds) if row.pattern else ("-", "-")
        shown.add_row(row.name, *cells, f"{mean:.4f}", "-" if row.name == DENSE else f"{change:+.2%}", *pruned)
    return shown


def make_table(task: Task, settings: Settings, out: Path, seeds: Sequence[int], rows: Sequence[str]) -> Table:
    """Train what is not finished yet, seed by seed, and return the table of all that is.

    Raises:
        GraphPruneError: A file cannot be written, or torchmetrics is missing.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    todo = [key for seed in seeds for row in rows if (key := (row, seed)) not in finished(out, settings)]
    steps = sum(settings.dense_steps if row == DENSE else settings.prune_steps for row, _ in todo)
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        experiment = Experiment(task, settings, out, progress, steps)
        for row, seed in todo:
            write_result(out, result := experiment.run(ROWS[row], seed))
            progress.console.print(f"seed {seed}: {row}: {result.accuracy:.4f} after {result.seconds:.0f} s")
    return table(finished(out, settings), seeds)


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished runs and dense models.")] = Path("out/sst2"),
    seed: Annotated[list[int], typer.Option(help="A seed; may be given more than once.")] = [0, 1, 2],  # noqa: B006
    row: Annotated[list[str], typer.Option(help="A row of the table; may be given more than once.")] = [*ROWS],  # noqa: B006
    quick: Annotated[bool, typer.Option(help="A tiny random model on made-up phrases; seconds.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; default: one a core.")] = None,
) -> None:
    """Print accuracy of pruned models on SST-2; finished runs are kept and not repeated."""
    console = Console(stderr=True)
    settings = Settings.quick() if quick else Settings()
    torch.set_flush_denormal(True)  # moments of pruned weights decay through denormals, which are slow
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if unknown := [name for name in row if name not in ROWS]:
            raise gp.GraphPruneError(f"there is no row {unknown[0]!r}; the rows are: {'; '.join(ROWS)}")
        task = made_up_task(settings) if quick else read_task(data_folder(), settings)
        shown = make_table(task, settings, out, seed, row)
    except (gp.GraphPruneError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print(f"interrupted; finished runs are in {out / RUNS}, and the same command goes on behind them")
        raise typer.Exit(130) from None
    Console(width=max(console.width, 120)).print(shown)


if __name__ == "__main__":
    typer.run(main)
