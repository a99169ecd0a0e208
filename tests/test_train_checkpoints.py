"""Checkpoints of a run: half-written ones are passed over, finished stages are known, other questions refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphprune.errors import GraphPruneError
from graphprune.finetuning.checkpoints import damage, finish_stage, finished_stage, last_checkpoint

SESSION = "graphprune_session.pt"


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    save_file({"weight": torch.ones(64)}, made / "model.safetensors")
    torch.save({"step": step}, made / "optimizer.pt")
    torch.save({"step": step}, made / SESSION)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


def test_the_newest_whole_one(tmp_path: Path) -> None:
    notes: list[str] = []
    assert last_checkpoint(tmp_path / "none", note=notes.append) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path, (SESSION,), notes.append) == ten
    assert notes == []
    (ten / "trainer_state.json").write_text('{"global_')
    assert last_checkpoint(tmp_path, (SESSION,), notes.append) == nine
    assert notes == [f"{ten} was not written to its end (trainer_state.json is missing or cut off); it is passed over"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", SESSION])
def test_every_file_that_is_cut_off_is_found(name: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 1)
    assert damage(made, (SESSION,)) is None
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[: len(content) // 2])
    assert damage(made, (SESSION,)) == f"{name} is cut off"


def test_a_session_is_only_needed_where_there_is_one(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 1)
    (made / SESSION).unlink()
    assert damage(made) is None
    assert damage(made, (SESSION,)) == f"{SESSION} is missing"


def test_a_finished_stage_is_taken_over_for_the_same_question_only(tmp_path: Path) -> None:
    asked: dict[str, object] = {"stage": "pipeline: []", "start": "m"}
    assert finished_stage(tmp_path, asked) is None
    finish_stage(tmp_path, {**asked, "metrics": {"eval_f1": 1.0}})
    record = finished_stage(tmp_path, asked)
    assert record is not None
    assert record["metrics"] == {"eval_f1": 1.0}
    with pytest.raises(GraphPruneError, match=r"asked something else \(start: m, now n\).*--overwrite_output_dir"):
        finished_stage(tmp_path, {**asked, "start": "n"})
    (tmp_path / "stage.json").write_text("{")
    assert finished_stage(tmp_path, asked) is None
