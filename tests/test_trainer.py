"""Hugging Face's Trainer trains and evaluates a Program, drives its masks through the callback, and resumes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import graphprune as gp
from graphprune.ir.masking import masked_sites
from tests.models import MODELS

PIPELINE = "insert-masks{pattern=4x1,sparsity=0.75,frequency=1,warm_up=0,cool_down=2}"


@pytest.fixture(scope="module")
def traced() -> gp.Program:
    return gp.trace(MODELS["bert_sequence"]().train(), labels=True)


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def make_trainer(program: gp.Program, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 1e-3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 4, "seed": 0,
    }  # fmt: skip
    arguments = TrainingArguments(**settings | options)
    trainer = Trainer(program, arguments, train_dataset=examples(32), eval_dataset=examples(8))
    gp.training.SessionCallback(log=folder / "session.jsonl").attach(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
class TestTrainer:
    def test_trains_evaluates_and_resumes_to_the_same_bits(self, traced: gp.Program, tmp_path: Path) -> None:
        program = gp.transform(traced, PIPELINE)
        trainer = make_trainer(program, tmp_path / "run")
        trainer.train()
        sites = masked_sites(program)
        assert all((site.weight[~site.mask] == 0).all() for site in sites)
        assert sum(int(site.mask.sum()) for site in sites) == pytest.approx(
            0.25 * sum(site.mask.numel() for site in sites), abs=8
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] > 0
        predictions = trainer.predict(examples(8))
        assert predictions.predictions.shape == (8, 2)
        assert predictions.label_ids.shape == (8,)
        assert len((tmp_path / "run" / "session.jsonl").read_text().splitlines()) == 8

        resumed = gp.transform(traced, PIPELINE)
        make_trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        for name, value in program.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_gradient_accumulation_counts_optimizer_steps(self, traced: gp.Program, tmp_path: Path) -> None:
        program = gp.transform(traced, PIPELINE)
        trainer = make_trainer(program, tmp_path / "run", gradient_accumulation_steps=2)
        trainer.train()
        assert len((tmp_path / "run" / "session.jsonl").read_text().splitlines()) == 8

    def test_logs_carry_the_sparsity_to_tensorboard(self, traced: gp.Program, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="TensorBoard shows what the Trainer reports")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        options = {"report_to": ["tensorboard"], "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
        trainer = make_trainer(gp.transform(traced, PIPELINE), tmp_path / "run", **options)
        result = trainer.train()
        logged = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry}
        assert list(logged) == [2, 4, 6, 8]
        assert logged[8] == result.metrics["sparsity"] == pytest.approx(0.75, abs=0.01)
        assert logged[2] < logged[4] < logged[8]
        assert all("sparsity" not in entry for entry in trainer.state.log_history if "eval_loss" in entry)
        (folder,) = (tmp_path / "run" / "runs").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        shown = {event.step: event.value for event in events.Scalars("train/sparsity")}
        assert shown == pytest.approx(logged, abs=1e-6)

    def test_in_the_list_of_callbacks_it_writes_the_history(self, traced: gp.Program, tmp_path: Path) -> None:
        trainer = make_trainer(gp.transform(traced, PIPELINE), tmp_path / "run")
        (callback,) = (
            item for item in trainer.callback_handler.callbacks if isinstance(item, gp.training.SessionCallback)
        )
        assert trainer.callback_handler.callbacks[0] is callback
        trainer.remove_callback(callback)
        trainer.add_callback(callback)
        trainer.train()
        assert [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry][-1] == pytest.approx(
            0.75, abs=0.01
        )
        callback.attach(trainer)
        assert trainer.callback_handler.callbacks.count(callback) == 1

    def test_epochs_are_those_of_the_data(self, traced: gp.Program, tmp_path: Path) -> None:
        """5 steps in epochs of 4: the Trainer counts 2 epochs, of which the second is broken off."""
        pipeline = 'insert-masks{pattern=4x1,sparsity=0.75,frequency=1,warm_up=0,end="1 epochs"}'
        trainer = make_trainer(
            gp.transform(traced, pipeline), tmp_path / "run", max_steps=5, gradient_accumulation_steps=2
        )
        trainer.train()
        session = trainer.callback_handler.callbacks[0].session
        assert session.report().rules[0].last == 4

    @pytest.mark.slow
    def test_checkpoints_without_a_whole_session_are_refused(self, traced: gp.Program, tmp_path: Path) -> None:
        make_trainer(gp.transform(traced, PIPELINE), tmp_path / "run").train()
        checkpoint = tmp_path / "run" / "checkpoint-4"
        path = checkpoint / "graphprune_session.pt"
        whole = path.read_bytes()
        for content, message in (
            (whole[: len(whole) // 2], "graphprune_session.pt is damaged"),
            (b"", "is damaged"),
            (None, "checkpoint-4 has no graphprune_session.pt"),
        ):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            trainer = make_trainer(gp.transform(traced, PIPELINE), tmp_path / "run")
            with pytest.raises(gp.GraphPruneError, match=message):
                trainer.train(resume_from_checkpoint=str(checkpoint))
            path.touch()
        for value in ({"version": 3, "total_steps": 8}, ["state"]):
            torch.save(value, path)
            trainer = make_trainer(gp.transform(traced, PIPELINE), tmp_path / "run")
            with pytest.raises(gp.GraphPruneError, match="is damaged or no session's state"):
                trainer.train(resume_from_checkpoint=str(checkpoint))

    def test_a_checkpoint_elsewhere(self, traced: gp.Program, tmp_path: Path) -> None:
        program = gp.transform(traced, PIPELINE)
        make_trainer(program, tmp_path / "run").train()
        shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "kept")
        other = gp.transform(traced, PIPELINE)
        trainer = make_trainer(other, tmp_path / "other")
        trainer.callback_handler.callbacks[0].checkpoint = tmp_path / "kept"
        trainer.train(resume_from_checkpoint=str(tmp_path / "kept"))
        for name, value in program.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name

    def test_a_best_model_that_is_not_sparse_yet_is_refused(self, traced: gp.Program, tmp_path: Path) -> None:
        options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True}
        trainer = make_trainer(
            gp.transform(traced, PIPELINE.replace("cool_down=2", "cool_down=0")), tmp_path / "run", **options
        )
        with pytest.raises(gp.SparsityError, match=r"went back to .*checkpoint-4, from before the masks"):
            trainer.train()
