"""One stage of a run: transform a model, train the Program, score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.artifact.tune import tune
from graphprune.errors import GraphPruneError, VerifyError, suggest
from graphprune.finetuning.checkpoints import last_checkpoint
from graphprune.finetuning.plan import needs_data
from graphprune.finetuning.sharding import gathered, prepare_sharding
from graphprune.finetuning.stage_settings import total_steps
from graphprune.finetuning.teachers import make_distillation
from graphprune.ir.interface import is_label, source_signature
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.passes.keep_outputs import KeepOutputs
from graphprune.pipeline.durations import check_stage
from graphprune.pipeline.legalize import legalized
from graphprune.pipeline.stages import Stage
from graphprune.pipeline.transform import transform
from graphprune.tasks.collation import INDEX_COLUMNS
from graphprune.tasks.task import Task
from graphprune.training.distillation import Distillation
from graphprune.training.teacher_cache import TeacherCache

_TAUGHT = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}
"""Options of a model that distillation asks for, and what the outputs are called that they give."""
_HIDDEN = ["hidden_states", "attentions", "cross_attentions", "past_key_values", "encoder_last_hidden_state"]
"""Outputs that no score needs and no evaluation should gather."""


@dataclass
class StageRun:
    """What a stage works with.

    Attributes:
        stage: Of the recipe.
        task: With the stage's data settings.
        training: ``transformers.TrainingArguments`` of this stage; its output folder is the stage's.
        model: What it starts from: a model of its own class, or the Program of a stage that was not quantized.
        samples: Training examples for passes that calibrate.
        teacher_cache: Folder of teachers' outputs; None computes them while training.
        note: Told what a user should know.
        tolerance: Largest relative drop of the metric that quantizing without training may cost; None takes what comes.
        metric: Which metric, such as ``eval_f1``.
        metrics: Scores, once ``run`` is through.
    """

    stage: Stage
    task: Task
    training: Any
    model: nn.Module
    samples: int
    teacher_cache: Path | None
    note: Callable[[str], None]
    tolerance: float | None = None
    metric: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    _split: str = field(default="validation", init=False)
    _rows: TeacherCache | None = field(default=None, init=False)

    def run(self) -> Program:
        """Transform, train where it is asked for, and evaluate.

        Raises:
            GraphPruneError: Data, teacher and model do not fit together, or a checkpoint cannot be used.
        """
        if self._trains:
            steps, epoch = total_steps(self.training, len(self.features("train")))
            check_stage(self.stage, total_steps=steps, steps_per_epoch=epoch)
        program, distillation = self._traced()
        program = self._transformed(program)
        trainer = self._trainer(program, distillation)
        whole = prepare_sharding(trainer, program) if self._trains and self.training.fsdp else None
        if self._trains:
            self._train(trainer)
        if self.training.do_eval:
            for split, prefix in self._evaluated():
                self._evaluate(trainer, split, prefix)
        if self.training.do_predict:
            self._predict(trainer)
        # under --bf16 and --fp16 it would go on computing in that
        trainer.accelerator.unwrap_model(program, keep_fp32_wrapper=False)
        result = program if whole is None else gathered(program, whole)
        return result if distillation is None else _without_taught(result)

    def features(self, split: str) -> Any:
        """Features of a split, without columns that the model does not take, such as token types."""
        model = self.model
        taken = model.interface.names if isinstance(model, Program) else source_signature(model)
        found = self.task.features(split)
        keep = (*taken, *self.task.label_columns, *INDEX_COLUMNS)
        return found.select_columns([name for name in found.column_names if name in keep])

    def batches(self, count: int, size: int) -> list[dict[str, Tensor]]:
        """Some examples of the training split, else of the validation split, without labels."""
        splits = self.task.splits()
        features = self.features("train" if "train" in splits else splits[0])
        collate = self.task.collator()
        rows = [features[index] for index in range(min(count, len(features)))]
        made = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [{name: value for name, value in batch.items() if not is_label(name)} for batch in made]

    # -- steps --------------------------------------------------------------------------------------------------------

    @property
    def _trains(self) -> bool:
        return bool(self.stage.train and self.training.do_train)

    def _traced(self) -> tuple[Program, Distillation | None]:
        """The Program before the stage's pipeline, and what it learns from.

        The two meet before quantizers are there, which cannot answer until they have seen data.
        """
        if isinstance(self.model, Program):
            return legalized(self.model, ("fold-masks",)), None
        settings = self.stage.distillation if self._trains else None
        if settings is None:
            return transform(self.model, (), labels=True, in_place=True), None
        distillation = make_distillation(settings, self.model, self.task, self.training, self.teacher_cache, self.note)
        asked: dict[str, Any] = {
            option: True
            for option, weight in zip(_TAUGHT, (settings.hidden, settings.attentions), strict=True)
            if weight and not getattr(self.model.config, option, False)
        }
        program = transform(self.model, (), labels=True, in_place=True, **asked)
        self._rows = next((item for item in distillation.teachers if isinstance(item, TeacherCache)), None)
        example = self.task.collator()([self._train_set()[0]])
        device = self.training.device
        distillation.prepare(program.to(device), {name: value.to(device) for name, value in example.items()})
        return program, distillation

    def _train_set(self) -> Any:
        """Features to train on, numbered where a teacher's outputs are read from a cache."""
        found = self.features("train")
        return found if self._rows is None else self._rows.add_rows(found)

    def _transformed(self, program: Program) -> Program:
        """After the stage's pipeline; with a tolerance, quantized as far as the metric allows."""
        passes = self.stage.passes
        data = self.batches(self.samples, self.training.per_device_eval_batch_size) if needs_data(passes) else None
        if self.tolerance is None or self._trains:
            return transform(program, passes, in_place=True, data=data)
        found = tune(
            program,
            self._metric_of,
            data,
            pipeline=passes,
            relative=self.tolerance,
            path=Path(self.training.output_dir) / "tuning.json",
            metric_name=self.metric,
        )
        self.note(found.summary())
        if not found.met:
            raise VerifyError(
                f"no quantization of this pipeline keeps {self.metric} within --tolerance_criterion {self.tolerance:g}; the trials are in "
                f"{self.training.output_dir}/tuning.json. Allow more, or let more layers stay in float with graphprune tune"
            )
        return transform(program, found.recipe(), in_place=True, data=data)

    def _metric_of(self, program: nn.Module) -> float:
        """The metric of ``--tolerance_criterion`` on the validation split."""
        assert isinstance(program, Program)
        scores = self._trainer(program, None).evaluate(self.features("validation"), ignore_keys=_HIDDEN)
        if self.metric not in scores:
            known = [name for name in scores if name.startswith("eval_")]
            raise GraphPruneError(f"--metric {self.metric} is no score of this task{suggest(self.metric, known)}")
        return float(scores[self.metric])

    def _trainer(self, program: Program, distillation: Distillation | None) -> Any:
        from transformers.trainer_utils import set_seed

        from graphprune.finetuning.in_order import InOrderDistillationTrainer, InOrderTrainer
        from graphprune.training.callback import SessionCallback

        set_seed(self.training.seed)
        splits = self.task.splits()
        folder = Path(self.training.output_dir)
        options: dict[str, Any] = {
            "model": program,
            "args": self.training,
            "train_dataset": self._train_set() if self._trains else None,
            "eval_dataset": self.features("validation") if "validation" in splits else None,
            "data_collator": self.task.collator(),
            "compute_metrics": lambda given: self.task.score(self._split, given.predictions),
        }
        trainer = (
            InOrderTrainer(**options)
            if distillation is None
            else InOrderDistillationTrainer(distillation=distillation, **options)
        )
        if self._trains and (masked_sites(program) or program.properties & Property.FAKE_QUANT):
            SessionCallback(log=folder / "session.jsonl").attach(trainer)
        return trainer

    def _train(self, trainer: Any) -> None:
        from graphprune.training.callback import SessionCallback
        from graphprune.training.session_file import SESSION_FILE

        folder = Path(self.training.output_dir)
        asked = self.training.resume_from_checkpoint
        sessions = [item for item in trainer.callback_handler.callbacks if isinstance(item, SessionCallback)]
        needed = (SESSION_FILE,) if sessions else ()
        start = Path(asked) if asked and asked is not True else last_checkpoint(folder, needed, self.note)
        if start is not None:
            self.note(f"going on from {start}")
            for item in sessions:
                item.checkpoint = start
        result = trainer.train(resume_from_checkpoint=str(start) if start else None, ignore_keys_for_eval=_HIDDEN)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    def _evaluate(self, trainer: Any, split: str, prefix: str) -> list[Path]:
        """Score a split where it has labels, and write what was predicted for it.

        Returns:
            The files; none but in the first process.
        """
        self._split = split
        found = trainer.predict(self.features(split), ignore_keys=_HIDDEN, metric_key_prefix=prefix)
        trainer.log(dict(found.metrics))
        trainer.log_metrics(prefix, found.metrics)
        trainer.save_metrics(prefix, found.metrics)
        self.metrics |= {key: float(value) for key, value in found.metrics.items() if isinstance(value, (int, float))}
        if not trainer.is_world_process_zero():
            return []
        return self.task.write_predictions(split, found.predictions, Path(self.training.output_dir))

    def _evaluated(self) -> Sequence[tuple[str, str]]:
        splits = [name for name in self.task.splits() if name.startswith("validation")]
        if not splits:
            raise GraphPruneError(
                "--do_eval needs validation data; give --validation_file, or --validation_split_percentage 10"
            )
        return [(name, "eval" if name == "validation" else name.replace("validation", "eval")) for name in splits]

    def _predict(self, trainer: Any) -> None:
        splits = [name for name in self.task.splits() if name.startswith("test")]
        if not splits:
            raise GraphPruneError("--do_predict needs test data; give --test_file")
        for split in splits:
            for path in self._evaluate(trainer, split, split.replace("test", "predict")):
                self.note(f"written to {path}")


def _without_taught(program: Program) -> Program:
    """Without the outputs that only distillation asked for; a file would compute them each time it runs."""
    asked = [kind for option, kind in _TAUGHT.items() if program.interface.constants.get(option)]
    names = program.interface.output_names
    kept = tuple(name for name in names if not any(kind in name for kind in asked))
    return program if kept == names else transform(program, (KeepOutputs(kept),), in_place=True)
