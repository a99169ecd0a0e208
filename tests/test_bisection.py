"""Bisection: a target that computes one operator wrong is found out, and the operator named with its module and source line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.artifact.bisection import bisect
from graphprune.artifact.samples import make_inputs
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.pipeline.target import Lowered
from graphprune.targets.onnx import Onnx
from tests.models import MODELS, example

onnx = pytest.importorskip("onnx", reason="the ONNX target needs the extra onnx")
WRONG = "feed.weight"


@dataclass(frozen=True)
class Wrong(Onnx):
    """Writes one weight a fifth too large."""

    name = "wrong"
    site: str = WRONG

    def lower(self, program: Program, folder: Path) -> Lowered:
        lowered = super().lower(program, folder)
        model = onnx.load(folder / "model.onnx")
        for item in model.graph.initializer:
            if item.name == self.site:
                values = onnx.numpy_helper.to_array(item) * 1.2
                item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))
        onnx.save(model, folder / "model.onnx")
        return lowered


@pytest.fixture(scope="module")
def program() -> Program:
    return gp.transform(MODELS["attention"]().eval(), [], example("attention")).eval()


def test_the_operator_is_named_with_module_and_source_line(program: Program, tmp_path: Path) -> None:
    with pytest.raises(gp.VerifyError) as raised:
        gp.export(program, Wrong(), tmp_path / "out")
    message = str(raised.value)
    assert "the wrong export differs from the Program by" in message
    assert "aten.linear.default in feed (models.py, line " in message
    assert not (tmp_path / "out").exists()


def test_a_right_target_has_no_culprit() -> None:
    program = gp.transform(MODELS["mlp"]().eval(), [], (torch.randn(2, 16),)).eval()
    assert bisect(program, Onnx(), make_inputs(program), 1e-4) is None


def test_few_beginnings_are_lowered_and_the_program_is_left_as_it_is() -> None:
    program = gp.transform(MODELS["mlp"]().eval(), [], (torch.randn(2, 16),)).eval()
    name = next(name for name, value in program.named_parameters() if value.dim() == 2)
    before = str(program)
    culprit = bisect(program, Wrong(site=name), make_inputs(program)[:1], 1e-4)
    assert culprit is not None
    assert name.removesuffix(".weight") in culprit.node
    assert culprit.difference > 1e-4
    assert 0 < culprit.lowerings <= 3
    assert str(program) == before


def test_a_node_of_no_module_is_named_by_its_operator(program: Program) -> None:
    node = next(program.calls(torch.ops.aten.linear.default))
    bare = torch.fx.Graph().call_function(node.target, ())
    assert origin(bare) == str(node.target)
    assert origin(node).startswith(f"{node.target} in ")
