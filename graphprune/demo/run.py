"""The demo from start to end: trace, prune, train, quantize, lower, verify, measure."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from graphprune.artifact.checkpoint import save_program
from graphprune.artifact.export import Artifact, export
from graphprune.artifact.files import written
from graphprune.demo.corpus import batches, pad, split, tokenize
from graphprune.demo.measure import Row, agreement, embed, latency_ratios, model_file, zipped_size
from graphprune.demo.settings import PRUNING, QUANTIZING, Settings, model_folder
from graphprune.demo.trainer import CHECKPOINT, Interrupted, Stage, TeacherCache, Trainer, read_checkpoint
from graphprune.errors import LoweringError
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.target import Target
from graphprune.pipeline.transform import transform
from graphprune.targets.inductor_model.compiling import check_compiler
from graphprune.targets.sparse_cpu.building import load_kernels
from graphprune.training import Distillation, calibrate

_FINISHED = "finished"
_BATCH, _LENGTH = 8, 128
"""Of the inputs that latency is measured with."""


@dataclass(frozen=True)
class _Data:
    tokenizer: Any
    train: list[list[int]]
    held_out: list[list[int]]


def run_demo(
    out: Path, *, resume: bool = False, quick: bool = False, seed: int = 0, threads: int | None = None
) -> list[Row]:
    """Run the demo and print its table.

    Args:
        out: Folder for checkpoints, artifacts and ``table.json``.
        resume: Go on from the checkpoint in ``out``.
        quick: A short run that shows the machinery; its accuracy says nothing.
        seed: Of the order of the data.
        threads: Threads for torch and onnxruntime; None leaves torch's default.

    Returns:
        The table's rows: dense fp32, dense int8, sparse fp32, sparse int8, and where there is a C++ compiler sparse-cpu int8.

    Raises:
        GraphPruneError: A library or the model is missing, or ``resume`` finds no fitting checkpoint.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings = Settings.quick(seed) if quick else Settings(seed=seed)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with _progress(console) as progress:
        try:
            student = train_student(out, settings, progress, resume=resume)
        except Interrupted:
            progress.stop()
            console.print(
                f"interrupted; {out / CHECKPOINT} is written. Go on with: graphprune demo --out {out} --resume"
            )
            raise
        missing = _build_kernels(progress)
        artifacts = _export_all(out, student, progress, missing)
    rows = _measure(artifacts, student, settings, threads)
    _report(console, rows, out, artifacts, missing)
    return rows


@dataclass(frozen=True)
class Student:
    """The trained student with what it was trained from.

    Attributes:
        teacher: The dense model.
        data: Tokenized sentences.
        sparse: The Program after pruning.
        quantized: The Program after quantization-aware training.
    """

    teacher: nn.Module
    data: _Data
    sparse: Program
    quantized: Program


def train_student(out: Path, settings: Settings, progress: Progress, *, resume: bool = False) -> Student:
    """Prune the model by distillation from itself, then train it quantization-aware.

    Args:
        out: Folder for the checkpoint and the logs.
        settings: Numbers of the run.
        progress: Shows the steps.
        resume: Go on from the checkpoint in ``out``; the result is bit-identical to that of an unbroken run.

    Raises:
        GraphPruneError: The model is missing, or there is no fitting checkpoint to resume.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    saved = read_checkpoint(out, settings) if resume else None
    torch.set_flush_denormal(True)  # moments of pruned weights decay through denormals, which are slow
    torch.manual_seed(settings.seed)
    teacher = _load_model()
    data = _load_data(settings)
    progress.console.print(
        f"all-MiniLM-L6-v2, {len(data.train)} training and {len(data.held_out)} held-out sentences, "
        f"{torch.get_num_threads()} threads"
    )
    example = _inputs(data.train[:2])
    program = transform(copy.deepcopy(teacher), PRUNING, example, in_place=True, output_hidden_states=True)
    freeze_embeddings(program)
    cache = TeacherCache.build(teacher, data.train, progress)
    distillation = Distillation(teacher, hidden=settings.hidden, embedding=settings.embedding, hidden_loss="relative")
    trainer = Trainer(out, settings, data.train, cache, distillation)
    sparse, quantized = _train(program, trainer, progress, saved)
    return Student(teacher, data, sparse, quantized)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console)


def _load_model() -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    model: Any = BertModel.from_pretrained(
        model_folder(),
        add_pooling_layer=False,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,  # the student is to copy its teacher, noise would only blur it
        attention_probs_dropout_prob=0.0,
    )
    return model.eval()  # type: ignore[no-any-return]


def _load_data(settings: Settings) -> _Data:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    train, held_out = split()
    if settings.sentences:
        train, held_out = train[: settings.sentences], held_out[: settings.sentences]
    return _Data(
        tokenizer,
        tokenize(tokenizer, train, settings.length),
        tokenize(tokenizer, held_out, settings.length),
    )


def _inputs(items: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    return dict(zip(("input_ids", "attention_mask"), pad(items), strict=True))


def freeze_embeddings(program: Program) -> None:
    """Leave the embeddings as they are; only the encoder is trained."""
    for name, parameter in program.named_parameters():
        parameter.requires_grad_(not name.startswith("embeddings."))


def _train(
    program: Program, trainer: Trainer, progress: Progress, saved: dict[str, Any] | None
) -> tuple[Program, Program]:
    """Prune, then train quantization-aware; skips what a checkpoint has behind it.

    Returns:
        The Program after pruning and the one after quantization-aware training.
    """
    prune = Stage("prune", trainer.settings.prune_steps, trainer.settings.rate)
    quantize = Stage("quantize", trainer.settings.quantize_steps, trainer.settings.quantize_rate)
    sparse_file = trainer.out / "pruned.pt"
    if saved is None or saved["stage"] == "prune":
        trainer.train(program, prune, progress, saved)
        saved = None
        with written(sparse_file) as path:
            torch.save(program.state_dict(), path)
    else:
        program.load_state_dict(torch.load(sparse_file, weights_only=True))
    quantized = transform(program, QUANTIZING)
    freeze_embeddings(quantized)
    if saved is None or saved["stage"] == "quantize":
        if saved is None:
            trainer.save(quantized, Stage("quantize", 0, 0.0), None, None)
        elif saved["optimizer"] is None:
            saved = None
        trainer.train(quantized, quantize, progress, saved)
        trainer.save(quantized, Stage(_FINISHED, 0, 0.0), None, None)
    else:
        quantized.load_state_dict(saved["program"], strict=False)
    return program.eval(), quantized.eval()


def _build_kernels(progress: Progress) -> dict[str, str]:
    """Compile the kernels of target sparse-cpu, where that was not done before.

    Returns:
        Rows of the table that there cannot be, each with the reason.
    """
    try:
        for _ in progress.track([None], description="compile kernels"):
            load_kernels()
            check_compiler()
    except LoweringError as error:
        return {"sparse-cpu int8": str(error)}
    return {}


def _export_all(out: Path, student: Student, progress: Progress, missing: Mapping[str, str]) -> dict[str, Artifact]:
    data = student.data
    dense = trace(student.teacher, _inputs(data.train[:2]))
    calibrated = transform(dense, QUANTIZING)
    epoch = batches(data.train, 1024, seed=0)[:16]
    calibrate(calibrated, [_inputs([data.train[index] for index in batch]) for batch in epoch])
    keep = "keep-outputs{names=last_hidden_state}"
    sparse, quantized = (transform(program, keep) for program in (student.sparse, student.quantized))
    save_program(quantized, out / "program", overwrite=True)
    onnx, sparse_cpu = make_target("onnx"), make_target("sparse-cpu", {"tokens": _BATCH * _LENGTH})
    programs: dict[str, tuple[Program, Target]] = {
        "dense fp32": (dense, onnx),
        "dense int8": (calibrated, onnx),
        "sparse fp32": (sparse, onnx),
        "sparse int8": (quantized, onnx),
        "sparse-cpu int8": (quantized, sparse_cpu),
    }
    wanted = {name: made for name, made in programs.items() if name not in missing}
    artifacts = {}
    for name, (program, target) in progress.track(wanted.items(), description="export and verify"):
        program.eval()
        folder = out / name.replace(" ", "-")
        artifacts[name] = export(program, target, folder, processor=data.tokenizer, overwrite=True)
    return artifacts


def _measure(artifacts: dict[str, Artifact], student: Student, settings: Settings, threads: int | None) -> list[Row]:
    data, names = student.data, [site.name for site in masked_sites(student.sparse)]
    threads = threads or torch.get_num_threads()
    runs = {
        name: make_target(artifact.manifest.target).open(artifact.folder, threads)
        for name, artifact in artifacts.items()
    }

    def run_teacher(inputs: Any) -> dict[str, Any]:
        with torch.no_grad():
            output = student.teacher(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        return {"last_hidden_state": output.last_hidden_state.numpy()}

    wanted = embed(run_teacher, data.held_out)
    ids, mask = pad([[101, *[2000 + index for index in range(_LENGTH - 2)], 102]] * _BATCH)
    ratios = latency_ratios(runs, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}, settings.repeats)
    rows = []
    for name, artifact in artifacts.items():
        cosine, retrieval = agreement(embed(runs[name], data.held_out), wanted)
        artifact.with_metrics({"cosine": cosine, "top-1": retrieval})
        path = model_file(artifact)
        rows.append(
            Row(
                name,
                artifact.manifest.sparsity(names),
                cosine,
                retrieval,
                path.stat().st_size,
                zipped_size(path),
                ratios[name],
            )
        )
    return rows


def _report(
    console: Console, rows: Sequence[Row], out: Path, artifacts: dict[str, Artifact], missing: Mapping[str, str]
) -> None:
    table = Table(title="all-MiniLM-L6-v2, measured on the exported files", title_justify="left")
    for column in ("model", "4x1 sparsity", "cosine", "top-1", "MB", "gzip MB", "latency"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.sparsity:.4f}", f"{row.cosine:.4f}", f"{row.retrieval:.3f}",
            f"{row.size / 1e6:.1f}", f"{row.zipped / 1e6:.1f}", f"{row.latency:.2f}",
        )  # fmt: skip
    for name in missing:
        table.add_row(name, *["-"] * 6)
    console.print(table)
    for name, reason in missing.items():
        console.print(f"{name} is left out: {reason}", markup=False)
    parity = artifacts["sparse int8"].manifest.parity
    console.print(
        "cosine and top-1: held-out sentences against the dense teacher; "
        f"latency: batch {_BATCH}, {_LENGTH} tokens, over dense fp32"
    )
    console.print("sparse-cpu int8: the Program of sparse int8 in kernels that skip zeros; all others in onnxruntime")
    console.print(
        f"sparse int8 against its Program: largest difference {parity.max_abs:.3g}, tolerance {parity.tolerance:.3g}"
    )
    console.print(f"check any of them again: graphprune verify {out / 'sparse-int8'}")
    console.print(f"see it as a page: graphprune report {out / 'sparse-int8'} -o {out / 'report.html'}")
    with written(out / "table.json") as path:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
