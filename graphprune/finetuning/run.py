"""A fine-tuning command from its flags to its files: stage after stage, then a checkpoint, a Program, and an artifact."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from torch import nn

from graphprune.artifact.checkpoint import load_program
from graphprune.artifact.files import MANIFEST, written
from graphprune.errors import GraphPruneError
from graphprune.finetuning.arguments import Arguments, parse_arguments
from graphprune.finetuning.checkpoints import finish_stage, finished_stage
from graphprune.finetuning.configurations import left_out
from graphprune.finetuning.lowering import check_target, lower
from graphprune.finetuning.output import PROGRAM, save_outputs, sparsity_of_weights, verify_loading
from graphprune.finetuning.plan import plan
from graphprune.finetuning.processes import check_processes, is_distributed, leave_group, wait_for_all
from graphprune.finetuning.stage import StageRun
from graphprune.finetuning.stage_settings import data_settings, stage_training
from graphprune.finetuning.starting import load_start
from graphprune.importing import write_inc_config
from graphprune.ir.program import Program
from graphprune.ir.sharding import first_process
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.stages import Stage

RECIPE = "recipe.yaml"
_DECIDE = (
    "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
"""Training arguments by which a finished stage is told from another one."""
_BATCHES = 4
"""Batches of eight examples whose outputs ``--verify_loading`` compares."""


def finetune(name: str, argv: Sequence[str], prog: str = "graphprune train") -> dict[str, float]:
    """Run a fine-tuning command.

    Args:
        name: The task: ``qa``, ``glue`` or ``ner``.
        argv: Its flags; ``--help`` lists them.
        prog: What to call the command in messages.

    Returns:
        Metrics of the last stage, with the ``sparsity`` of its weights. Of several processes, as torchrun starts them, only the
        first one returns them, and writes files; the others return nothing.

    Raises:
        GraphPruneError: Flags, data or files do not fit; says which and what to do.
        VerifyError: ``--verify_loading`` found that files do not give the outputs that were trained.
    """
    joined = is_distributed()
    arguments = parse_arguments(argv, prog)
    metrics = Run(name, arguments).go()
    first = first_process() if joined else leave_group()
    return metrics if first else {}


def note(text: str) -> None:
    """Tell the user something, on standard error; of several processes only the first one speaks."""
    if first_process():
        print(f"note: {text}", file=sys.stderr, flush=True)


class Run:
    """A command at work.

    Args:
        name: The task.
        arguments: What it was told.
    """

    def __init__(self, name: str, arguments: Arguments):
        self.name = name
        self.arguments = arguments
        self.training = arguments.training
        self.folder = Path(self.training.output_dir)
        self.recipe = plan(arguments)
        self._refuse_nothing()
        if self.recipe.target is not None:
            check_target(self.recipe.target)
        for text in left_out(arguments.compression):
            note(text)

    def go(self) -> dict[str, float]:
        """All stages, one after the other; finished ones are not repeated."""
        told = self.arguments.compression
        if told.overwrite_output_dir and self.training.should_save and self.folder.is_dir():
            shutil.rmtree(self.folder)
        wait_for_all()
        model: nn.Module | None = None
        start = self.arguments.model.model_name_or_path
        metrics: dict[str, float] = {}
        for number, stage in enumerate(self.recipe.stages):
            following = self.recipe.stages[number + 1 :]
            folder = self.folder / stage.name if following else self.folder
            metrics, program, run = self._stage(stage, folder, start, model)
            untrained = bool(following) and not following[0].train
            model = program or load_program(folder / PROGRAM) if untrained else None
            start = str(folder)
        if self.training.should_save:
            self._deliver(program, run, metrics)
        return metrics

    def _stage(
        self, stage: Stage, folder: Path, start: str, model: nn.Module | None
    ) -> tuple[dict[str, float], Program | None, StageRun | None]:
        """Run a stage and write what it leaves; where it is finished, its metrics alone."""
        asked = self._asked(stage, start)
        done = finished_stage(folder, asked) if self.training.do_train else None
        wait_for_all()  # before one of them finishes it, all have looked
        if done is not None:
            note(f"stage {stage.name} is finished in {folder}")
            return {key: float(value) for key, value in dict(done["metrics"]).items()}, None, None  # type: ignore[call-overload]
        run = self._stage_run(stage, folder, start, model)
        program = run.run()
        metrics = {**run.metrics, "sparsity": sparsity_of_weights(program)}
        if self.training.should_save:
            save_outputs(program, run.task.tokenizer, folder)
            self._write_recipe(folder)
            if self.arguments.compression.keep_conf and (stage.passes or stage.distillation):
                write_inc_config(
                    self.recipe, folder / "inc_config.json", stage=stage.name, sparsity=metrics["sparsity"]
                )
            finish_stage(folder, {**asked, "metrics": metrics})
        wait_for_all()  # the next stage starts from these files
        return metrics, program, run

    def _deliver(self, program: Program | None, run: StageRun | None, metrics: dict[str, float]) -> None:
        """Lower the result where a target is named, and load what was written; what an earlier run has delivered is left."""
        artifact = None
        if self.recipe.target is not None:
            artifact = self.folder / self.recipe.target.name
            if run is not None or not (artifact / MANIFEST).is_file():
                scores = {
                    key: value for key, value in metrics.items() if key.startswith("eval_") and not _is_speed(key)
                }
                lower(self.folder / PROGRAM, program, self.recipe.target, artifact, scores)
                note(f"{artifact}: lowered to {self.recipe.target.name} and verified")
        if self.arguments.compression.verify_loading and program is not None and run is not None:
            import transformers

            loader = getattr(transformers, run.task.auto_class)
            for line in verify_loading(program, loader, self.folder, run.batches(8 * _BATCHES, 8), artifact):
                note(line)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _refuse_nothing(self) -> None:
        training = self.training
        if not (
            training.do_train
            or training.do_eval
            or training.do_predict
            or any(stage.passes for stage in self.recipe.stages)
        ):
            raise GraphPruneError(
                "nothing to do: give --do_train, --do_eval, --do_predict, --apply_quantization or a recipe"
            )
        check_processes(self.arguments, self.recipe)

    def _stage_run(self, stage: Stage, folder: Path, start: str, model: nn.Module | None) -> StageRun:
        from transformers import set_seed

        arguments, said = self.arguments, self.arguments.said
        settings = data_settings(arguments.data, stage.training, said)
        training = stage_training(self.training, stage.training, said, folder)
        set_seed(training.seed)  # a new head is the same in every process, and in every run
        attention = "eager" if stage.distillation is not None and stage.distillation.attentions else None
        task, loaded = load_start(self.name, arguments.model, start, settings, attention)
        training = dataclasses.replace(training, label_names=list(task.label_columns))
        told = arguments.compression
        cache = (
            Path(told.teacher_cache_dir or self.folder.parent / "teacher-cache")
            if told.generate_teacher_logits
            else None
        )
        metric = told.metric or f"eval_{task.main_metric}"
        samples = told.num_calibration_samples
        return StageRun(stage, task, training, model or loaded, samples, cache, note, told.tolerance_criterion, metric)

    def _asked(self, stage: Stage, start: str) -> dict[str, object]:
        """What a finished stage must have been asked to be taken over."""
        alone = Recipe((dataclasses.replace(stage, name="main"),))
        training = self.training
        numbers = {name: getattr(training, name) for name in _DECIDE}
        return {"stage": alone.to_yaml(), "start": start, "task": self.name, "training": numbers}

    def _write_recipe(self, folder: Path) -> None:
        with written(folder / RECIPE) as path:
            path.write_text(
                f"# graphprune {version('graphprune')}, task {self.name}\n{self.recipe.to_yaml()}", encoding="utf-8"
            )


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_time"))
