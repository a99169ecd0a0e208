"""Capability tables: every target states every row, and the command line shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.artifact.inspection import inspect
from graphprune.errors import RecipeError
from graphprune.pipeline.registry import find_target, known_targets
from graphprune.pipeline.target import FORMATS, PATTERNS, Support
from tests.models import MODELS, example

_MLP = ("tests.models:mlp", "--input", "x=4x16")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments])


@pytest.mark.parametrize("name", sorted(known_targets()))
def test_every_target_states_every_row(name: str) -> None:
    cls = known_targets()[name]
    table = cls.capabilities()
    assert set(table) == {*PATTERNS, *FORMATS}
    assert all(isinstance(support, Support) for support in table.values())
    assert table["fp32"] is Support.EXPLOITED
    assert set(cls.remarks) <= set(table)
    doc = (cls.capabilities.__doc__ or "").strip()
    assert doc, f"{name}: the docstring of capabilities says why"


def test_targets_shows_a_column_a_target() -> None:
    shown = run("targets").stdout
    lines = shown.splitlines()
    head = next(line for line in lines if line.startswith("sparsity pattern"))
    assert head.split()[2:] == sorted(known_targets())
    rows = {line[:16].strip() for line in lines}
    assert {*PATTERNS, *FORMATS} <= rows
    assert "(1) " in shown
    about = next(line for line in lines if line.startswith("onnx "))
    assert "opset=18" in about
    assert "installed" in about or "pip install 'graphprune[onnx]'" in about


def test_targets_as_json() -> None:
    found = json.loads(run("targets", "--json").stdout)
    assert set(found) == set(known_targets())
    assert found["torch"]["capabilities"]["N:M"] == "exploited"
    assert "semi_structured" in found["torch"]["remarks"]["N:M"]
    assert found["torch"]["options"] == {"semi_structured": False}
    assert found["reference"]["libraries"] == "none needed"


def test_inspect_says_what_targets_make_of_each_weight() -> None:
    shown = run("inspect", *_MLP, "--target", "onnx", "--target", "torch").stdout
    head, first = shown.splitlines()[:2]
    assert head.split()[-2:] == ["onnx", "torch"]
    assert "stored only: unstructured 4x1 2:4 channelx1 1xchannel" in first
    assert first.endswith("exploited: 2:4")
    assert "torch, N:M: 2:4 only" in shown
    found = json.loads(run("inspect", *_MLP, "--target", "torch", "--json").stdout)
    assert found["sites"][0]["targets"] == {
        "torch": {
            "unstructured": "stored only",
            "4x1": "stored only",
            "2:4": "exploited",
            "channelx1": "stored only",
            "1xchannel": "stored only",
        }
    }
    assert len(found["remarks"]) == 1
    assert "targets" not in json.loads(run("inspect", *_MLP, "--json").stdout)["sites"][0]


def test_only_patterns_that_fit_are_said() -> None:
    found = inspect(MODELS["conv_bn"](), example("conv_bn"), targets=["torch"])
    assert "exploited" not in str(found).splitlines()[1]  # 27 columns are no multiple of 4
    assert "exploited: 2:4" in str(found).splitlines()[2]


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'onnx'"):
        find_target("onxn")
    result = run("inspect", *_MLP, "--target", "onxn")
    assert result.exit_code == 2
    assert "did you mean 'onnx'" in result.stderr


def test_a_missing_package_is_one_message_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    program = tmp_path / "again"
    gp.save(gp.trace(MODELS["mlp"](), example("mlp"), factory="tests.models:mlp"), program)
    result = run("export", program, "--target", "onnx", "--option", "opset=19", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert 'pip install "graphprune[onnx]"' in message
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
