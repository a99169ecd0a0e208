"""What a run delivers: without what only training needed, and what was loaded computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import graphprune as gp
from tests.task_data import tiny_classifier, write

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hidden_states_and_attentions_are_cut(asked: bool, tmp_path: Path) -> None:
    from graphprune.finetuning.run import finetune

    model = tiny_classifier(tmp_path)
    if asked:  # by the model itself: then they are its own outputs
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "output_hidden_states": True}))
    data = write(tmp_path, "rows.csv", "text,label\n" + "the red boat,near\na small city,long\n" * 4)
    out = tmp_path / "out"
    words = (
        f"--model_name_or_path {model} --teacher_model_name_or_path {model} --train_file {data} --validation_file {data} --do_train "
        f"--do_eval --use_cpu --max_steps 2 --per_device_train_batch_size 4 --hidden_weight 1 --attention_weight 1 --apply_distillation "
        f"--apply_pruning --target_sparsity 0.5 --pattern 4x1 --verify_loading --export_target onnx --output_dir {out}"
    )
    finetune("glue", words.split())
    names = ["logits", *(["hidden_states_0", "hidden_states_1"] if asked else [])]
    assert [item.name for item in onnx.load(out / "onnx" / "model.onnx").graph.output] == names
    program = gp.load(out / "program")
    kept = [
        name
        for name, leaf in zip(program.interface.output_names, program.output.args[0], strict=True)
        if leaf is not None
    ]
    assert kept == ["loss", *names]


@pytest.mark.parametrize("file", ["model.safetensors", "program/model.safetensors"])
def test_verify_loading_fails_the_run_where_outputs_differ(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphprune.finetuning import run

    save = run.save_outputs

    def save_and_damage(program: gp.Program, tokenizer: Any, folder: Path) -> None:
        save(program, tokenizer, folder)
        state = load_file(folder / file)
        state["classifier.bias"] += torch.tensor([0.0, 1e-3])
        save_file(state, folder / file, metadata={"format": "pt"})

    monkeypatch.setattr(run, "save_outputs", save_and_damage)
    data = write(tmp_path, "rows.csv", "text,label\n" + "the red boat,near\na small city,long\n" * 4)
    words = (
        f"--model_name_or_path {tiny_classifier(tmp_path)} --train_file {data} --validation_file {data} --do_eval --use_cpu "
        f"--verify_loading --output_dir {tmp_path / 'out'}"
    )
    with pytest.raises(
        gp.VerifyError, match=r"output logits of what was loaded differs by .* The files are not what was trained"
    ):
        run.finetune("glue", words.split())
