"""The tutorial, word for word, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from graphprune.artifact.manifest import Manifest
from graphprune.cli import app
from tests.task_data import tiny_tokenizer

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


def tiny_model(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model: Any = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tmp_path / "model")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    ran = 0
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "tutorial.md", "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith(("pip ", "MODEL=")):
                continue
            words = shlex.split(line.replace("$MODEL", str(model)))
            assert words[0] == "graphprune"
            if words[1] == "train":
                words += ["--use_cpu"]
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, (line, result.stderr[-3000:])
            ran += 1
    assert ran == 9
    manifest = Manifest.read(tmp_path / "out" / "sparse" / "onnx")
    assert {site.stored for site in manifest.sites} == {"int8"}
    pruned = [site for site in manifest.sites if site.pattern == "4x1"]
    assert all(site.pattern_holds and site.zeros_at_zero_point for site in pruned)
    zeros = sum(site.sparsity * site.weights for site in pruned) / sum(site.weights for site in pruned)
    assert zeros == pytest.approx(0.8, abs=0.02)
