"""Hugging Face's Trainer with a teacher: accumulation, checkpoints, the cache, evaluation, logs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainingArguments

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.training import Distillation, DistillationTrainer, TeacherCache
from tests.taught import bert, collate, examples

PIPELINE = "insert-masks{pattern=4x1,sparsity=0.75,frequency=1,warm_up=0,cool_down=2}"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def wide(kind: str = "sequence") -> Any:
    return bert(kind, seed=1, hidden_size=24, intermediate_size=48, num_hidden_layers=4)


def trainer(model: Any, folder: Path, distillation: Distillation, data: Any = None, **options: Any) -> Any:
    callbacks = options.pop("callbacks", [])
    evaluated = options.pop("eval_dataset", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 4, "learning_rate": 1e-3,
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0, **options,
        },
    )  # fmt: skip
    data = examples(count=32) if data is None else data
    return DistillationTrainer(
        model, arguments, data_collator=collate, train_dataset=data, eval_dataset=evaluated, callbacks=callbacks,
        distillation=distillation,
    )  # fmt: skip


def stepped(
    model: Any, folder: Path, distillation: Distillation, data: Any, size: int, parts: int
) -> dict[str, torch.Tensor]:
    """Weights after one step of plain gradient descent with rate 1: the gradient."""
    made = trainer(
        model, folder, distillation, data, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
    )  # fmt: skip
    made.train()
    return {**model.state_dict(), **{f"projections.{name}": value for name, value in distillation.state_dict().items()}}


@pytest.mark.parametrize(
    ("kind", "program"),
    [
        pytest.param("sequence", False, id="sequence"),
        pytest.param("token", False, id="token", marks=pytest.mark.slow),
        pytest.param("qa", False, id="qa", marks=pytest.mark.slow),
        pytest.param("token", True, id="program"),
    ],
)
def test_accumulating_2_by_4_gives_the_gradient_of_one_batch_of_8(kind: str, program: bool, tmp_path: Path) -> None:
    results = []
    data = examples(kind, 8, length=12 if kind == "qa" else 0)  # padding takes part in BERT's own loss of questions
    for size, parts in ((8, 1), (4, 2)):
        model = bert(kind)
        if program:
            model = gp.trace(model, labels=True, output_hidden_states=True)
        distillation = Distillation(wide(kind), logits=1.0, task=0.5, hidden=0.5, temperature=2.0)
        results.append(stepped(model, tmp_path, distillation, data, size, parts))
    start = bert(kind).state_dict()
    assert any(name.startswith("projections") for name in results[0])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=2e-6, msg=name)
    weight = next(name for name in start if name.endswith("layer.0.output.dense.weight"))
    assert not torch.equal(start[weight], results[0][weight])


@functools.cache
def traced() -> gp.Program:
    return gp.trace(bert(dropout=0.1), labels=True, output_hidden_states=True)


def program_run(
    folder: Path, *, resume: str | None = None, data: Any = None, teacher: Any = None, **weights: Any
) -> Any:
    program = gp.transform(traced(), PIPELINE)
    distillation = Distillation(teacher or wide(), **{"logits": 1.0, "task": 0.5, **weights})
    callback = gp.training.SessionCallback(log=folder / "session.jsonl")
    made = trainer(program, folder, distillation, data, callbacks=[callback], eval_dataset=examples(count=8, seed=5))
    made.train(resume_from_checkpoint=resume)
    return made


class TestProgram:
    @pytest.fixture(scope="class")
    def unbroken(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return program_run(tmp_path_factory.mktemp("run"), hidden=0.5)

    def test_masks_reach_their_sparsity_and_projections_move(self, unbroken: Any) -> None:
        sites = masked_sites(unbroken.model)
        assert all((site.weight[~site.mask] == 0).all() for site in sites)
        kept = sum(int(site.mask.sum()) for site in sites) / sum(site.mask.numel() for site in sites)
        assert kept == pytest.approx(0.25, abs=0.01)
        fresh = Distillation(wide(), hidden=1.0)
        fresh.prepare(unbroken.model, collate(examples(count=1)))
        moved = unbroken.distillation.state_dict()
        assert all(not torch.equal(value, moved[name]) for name, value in fresh.state_dict().items())
        assert not any("projection" in name for name in unbroken.model.state_dict())

    def test_a_resumed_run_has_the_same_bits(self, unbroken: Any) -> None:
        folder = Path(unbroken.args.output_dir)
        resumed = program_run(folder, resume=str(folder / "checkpoint-4"), hidden=0.5)
        for one, two in ((unbroken.model, resumed.model), (unbroken.distillation, resumed.distillation)):
            for name, value in one.state_dict().items():
                assert torch.equal(value, two.state_dict()[name]), name

    def test_a_checkpoint_without_its_projections_is_refused(self, unbroken: Any, tmp_path: Path) -> None:
        folder = Path(unbroken.args.output_dir) / "checkpoint-8"
        (folder / "graphprune_projections.safetensors").unlink()
        with pytest.raises(gp.GraphPruneError, match="was not written to its end, resume from an earlier one"):
            program_run(tmp_path, resume=str(folder), hidden=0.5)

    def test_logs_have_both_losses_and_evaluation_the_students_own(self, unbroken: Any) -> None:
        entries = [entry for entry in unbroken.state.log_history if "loss" in entry]
        assert len(entries) == 2
        for entry in entries:
            assert entry["loss"] == pytest.approx(0.5 * entry["task_loss"] + entry["distillation_loss"], rel=1e-3)
        steps = [line for line in (Path(unbroken.args.output_dir) / "session.jsonl").read_text().splitlines() if line]
        assert len(steps) == 8
        metrics = unbroken.evaluate()
        inputs = collate(examples(count=8, seed=5))
        assert metrics["eval_loss"] == pytest.approx(float(unbroken.model(**inputs).loss.detach()), rel=1e-5)
        assert unbroken.predict(examples(count=8)).predictions.shape == (8, 2)  # and no hidden states


@pytest.mark.parametrize("length", [12, 0], ids=["padded", "dynamic"])
def test_with_and_without_the_cache_are_the_same(length: int, tmp_path: Path) -> None:
    """To the bit where all batches have one shape; else the teacher's own kernels round otherwise for other shapes."""
    rows = examples(count=32, length=length)
    cache = TeacherCache.of(tmp_path / "cache", wide(), rows, collate=collate, batch_size=4, show=False)
    data = datasets.Dataset.from_list(rows) if length else rows
    online = program_run(tmp_path / "online", data=data)
    cached = program_run(tmp_path / "cached", data=cache.add_rows(data), teacher=cache)
    for name, value in online.model.state_dict().items():
        assert not length or torch.equal(value, cached.model.state_dict()[name]), name
    losses = [
        [entry["distillation_loss"] for entry in made.state.log_history if "loss" in entry] for made in (online, cached)
    ]
    assert losses[0] == (losses[1] if length else pytest.approx(losses[1], rel=1e-4))


def test_questions_are_evaluated_though_a_program_has_no_task_in_its_name(tmp_path: Path) -> None:
    program = gp.trace(bert("qa"), labels=True)
    made = trainer(program, tmp_path, Distillation(bert("qa", seed=1), logits=1.0), examples("qa", length=12))
    assert made.label_names == ["start_positions", "end_positions"]
    result = made.predict(examples("qa", 8, length=12))
    assert [item.shape for item in result.predictions] == [(8, 12), (8, 12)]
    assert result.metrics["test_loss"] > 0


def test_unlabeled_data_and_label_smoothing(tmp_path: Path) -> None:
    unlabeled = [{name: value for name, value in row.items() if name != "labels"} for row in examples()]
    made = trainer(bert(), tmp_path, Distillation(wide(), logits=1.0), unlabeled, max_steps=2)
    made.train()
    (entry,) = [entry for entry in made.state.log_history if "train_loss" in entry]
    assert entry["train_loss"] > 0
    smoothed = trainer(
        bert(),
        tmp_path,
        Distillation(wide(), logits=1e-9, task=1.0),
        label_smoothing_factor=0.2,
        max_steps=1,
        logging_steps=1,
    )
    smoothed.train()
    plain = trainer(bert(), tmp_path, Distillation(wide(), logits=1e-9, task=1.0), max_steps=1, logging_steps=1)
    plain.train()
    first = [item.state.log_history[0]["task_loss"] for item in (smoothed, plain)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    cache = TeacherCache.of(tmp_path / "cache", wide(), examples(), collate=collate, show=False)
    with pytest.raises(gp.GraphPruneError, match="the batch has no column 'teacher_row'"):
        trainer(bert(), tmp_path, Distillation(cache, logits=1.0), examples())
    with pytest.raises(gp.GraphPruneError, match=r"the student has 2 labels .* the teacher 3"):
        trainer(bert(), tmp_path, Distillation(bert(num_labels=3), logits=1.0))
    with pytest.raises(gp.GraphPruneError, match="the student returns no hidden_states"):
        trainer(gp.trace(bert(), labels=True), tmp_path, Distillation(wide(), hidden=1.0))
