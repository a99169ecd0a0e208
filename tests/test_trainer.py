"""Hugging Face's Trainer trains and evaluates a Program, drives its masks through the callback, and resumes it."""

from __future__ import annotations

from pathlib import Path

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


def make_trainer(program: gp.Program, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=4, learning_rate=1e-3,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_steps=4, seed=0, **options,
    )  # fmt: skip
    callback = gp.training.SessionCallback(log=folder / "session.jsonl")
    return Trainer(program, arguments, train_dataset=examples(32), eval_dataset=examples(8), callbacks=[callback])


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
