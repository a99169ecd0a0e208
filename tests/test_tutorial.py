"""The tutorial, word for word, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphprune.artifact.manifest import Manifest
from graphprune.cli import app
from tests.task_data import tiny_bert

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_bert(tmp_path / "model", "BertModel")
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
