"""Runs that were interrupted go on to the same bits as unbroken ones, and no whole checkpoint is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from graphprune.errors import GraphPruneError, LoweringError
from graphprune.finetuning.run import finetune
from tests.task_data import tiny_tokenizer, write

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

CASES = {
    "pruning, quantizing and learning from a cached teacher": "--apply_pruning --pattern 2:4 --apply_quantization --apply_distillation "
    "--teacher_model_name_or_path self --generate_teacher_logits",
    "hidden states through a projection": "--apply_pruning --target_sparsity 0.5 --pruning_approach movement --apply_distillation "
    "--teacher_model_name_or_path {root}/wide --hidden_weight 1",
    "zeros locked": "--apply_pruning --pruning_approach pattern_lock",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("resume")
    tokenizer = tiny_tokenizer()
    for name, width in (("model", 32), ("wide", 48)):
        torch.manual_seed(width)
        model: Any = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                max_position_embeddings=32,
            )
        )  # fmt: skip
        for key, value in model.named_parameters():
            if name == "model" and "layer.0" in key and value.dim() == 2:
                value.data[torch.rand(value.shape) < 0.5] = 0
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        ("the red boat", "near"),
        ("a small city", "long"),
        ("she was born", "near"),
        ("he live in the river", "long"),
    ]
    write(
        folder,
        "train.csv",
        "text,label\n" + "".join(f"{text} {number},{label}\n" for number in range(6) for text, label in rows),
    )
    return folder


def run(root: Path, text: str, out: Path) -> dict[str, float]:
    words = (
        f"--model_name_or_path {root}/model --train_file {root}/train.csv --validation_file {root}/train.csv --do_train --do_eval "
        f"--max_steps 9 --per_device_train_batch_size 4 --save_steps 3 --learning_rate 1e-3 --use_cpu --max_seq_length 16 "
        f"--output_dir {out} {text}"
    )
    return finetune("glue", words.format(root=root).split())


def run_broken(root: Path, text: str, out: Path, step: int = 7) -> None:
    """A run that is interrupted in a step of training."""
    original, seen = Trainer.training_step, []

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) > step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(root, text, out)


@pytest.mark.parametrize(
    "case", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[:-1]), list(CASES)[-1]]
)
def test_the_same_bits(case: str, root: Path, tmp_path: Path) -> None:
    whole = run(root, CASES[case], tmp_path / "whole" / "out")
    broken = tmp_path / "broken" / "out"
    run_broken(root, CASES[case], broken)
    assert (broken / "checkpoint-6").is_dir()
    assert not (broken / "model.safetensors").exists()
    again = run(root, CASES[case], broken)
    assert again["eval_loss"] == whole["eval_loss"]
    for name in ("model.safetensors", "program/model.safetensors"):
        expected, actual = load_file(tmp_path / "whole" / "out" / name), load_file(broken / name)
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            assert torch.equal(value, actual[key]), key


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_broken(root, CASES["zeros locked"], tmp_path / "out")
    half = tmp_path / "out" / "checkpoint-6" / "optimizer.pt"
    half.write_bytes(half.read_bytes()[:1000])
    run(root, CASES["zeros locked"], tmp_path / "out")
    errors = capsys.readouterr().err
    assert "checkpoint-6 was not written to its end (optimizer.pt is cut off); it is passed over" in errors
    assert f"going on from {tmp_path}/out/checkpoint-3" in errors


def test_what_is_refused_before_anything_is_trained(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHPRUNE_IPEX_PYTHON", raising=False)
    for text, message in (
        ("--apply_pruning --end_step 100", "100"),
        ("--apply_pruning --warm_epochs 5", "5 epochs"),
        ("--apply_distillation --teacher_model_name_or_path nowhere", "nowhere"),
        ("--train_file nothing.csv", "nothing.csv"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            run(root, text, tmp_path / "out")
    with pytest.raises(LoweringError, match=r"tools/environment\.py ipex makes it .* set GRAPHPRUNE_IPEX_PYTHON"):
        run(root, "--use_ipex", tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_lowering_in_another_environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Program is lowered by the Python that the variable names; what it says is told."""
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    python.chmod(0o755)
    monkeypatch.setenv("GRAPHPRUNE_IPEX_PYTHON", str(python))
    out = tmp_path / "out"
    run(root, "--use_ipex", out)
    assert (
        f"-m graphprune export {out}/program --target ipex --out {out}/ipex --force --option precision=fp32"
        in log.read_text()
    )
    python.write_text("#!/bin/sh\necho 'error: torch is 2.13 here' >&2\nexit 2\n")
    with pytest.raises(LoweringError, match=r"could not lower .*error: torch is 2.13 here"):
        run(root, "--use_ipex", out)  # finished, so only lowered
