"""Distil into a Program on one process or several: ``python -m tests.distilled_run FOLDER`` or the same under ``torchrun``.

Every process writes ``<processes>-<rank>.pt``: the student's and the projections' weights, what was logged, and the rows of the
teacher's cache that it computed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import graphprune as gp
from graphprune.training import Distillation, TeacherCache
from tests.taught import bert, collate, examples
from tests.test_distillation_trainer import trainer, wide

ROWS = 48


def main(folder: Path) -> None:
    """Two steps of 16 rows, in parts of 4 on each process; then two on a cache that the processes make together."""
    torch.set_num_threads(1)
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found: dict[str, object] = {}
    for cached in (False, True):
        data = examples("token", ROWS)
        program = gp.transform(
            bert("token"), "insert-masks{pattern=4x1,sparsity=0.5,frequency=1,warm_up=0,cool_down=1}", labels=True,
            output_hidden_states=True,
        )  # fmt: skip
        teacher: object = wide("token")
        weights = {"logits": 1.0, "task": 0.5, "hidden": 0.0 if cached else 0.5}
        if cached:
            options = {"collate": collate, "shard_rows": 8, "show": False}
            teacher = TeacherCache.of(folder / f"cache-{processes}", wide("token"), data, **options)  # type: ignore[arg-type]
            data = teacher.add_rows(data)
            found["computed"] = teacher.computed
        distillation = Distillation(teacher, **weights)  # type: ignore[arg-type]
        made = trainer(
            program, folder / f"run-{processes}", distillation, data, callbacks=[gp.training.SessionCallback()], max_steps=2,
            gradient_accumulation_steps=4 // processes, optim="sgd", learning_rate=0.5, logging_steps=1, save_strategy="no",
            train_sampling_strategy="sequential", max_grad_norm=0.0,
        )  # fmt: skip
        made.train()
        name = "cached" if cached else "online"
        found[name] = {
            **program.state_dict(),
            **{f"p.{key}": value for key, value in distillation.state_dict().items()},
        }
        found[f"{name} logs"] = [entry for entry in made.state.log_history if "loss" in entry]
    torch.save(found, folder / f"{processes}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
