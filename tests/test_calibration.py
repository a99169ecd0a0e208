"""Calibration: observers see data in eval mode, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.ir.quantizing import quantizers
from tests.models import MODELS, example


@pytest.fixture(scope="module")
def program() -> gp.Program:
    return gp.transform(MODELS["mlp"]().eval(), "insert-fake-quant", example("mlp"))


def test_ranges_follow_the_data_and_the_mode_is_kept(program: gp.Program) -> None:
    copied = gp.transform(program)
    x = torch.randn(8, 16)
    assert gp.training.calibrate(copied, [x] * 3) == 3
    assert not copied.training
    assert not copied.observing
    activations = [decision.prefix for _, decision in quantizers(copied) if not decision.weight]
    assert activations
    assert all(copied.tensor(f"{name}_low") < copied.tensor(f"{name}_high") for name in activations)
    with torch.no_grad():
        plain = MODELS["mlp"]().eval()(x)
    assert torch.allclose(copied(x), plain, atol=0.1 * float(plain.abs().max()))


def test_accepts_mappings_tuples_and_tensors(program: gp.Program) -> None:
    name = program.interface.names[0]
    x = torch.randn(8, 16)
    outputs = []
    for batch in (x, (x,), {name: x}):
        copied = gp.transform(program)
        gp.training.calibrate(copied, [batch], progress=True)
        outputs.append(copied(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_refusals(program: gp.Program) -> None:
    with pytest.raises(gp.PassError, match="got no batches"):
        gp.training.calibrate(gp.transform(program), [])
    with pytest.raises(gp.PassError, match="batch 0: input 'x' has NaN"):
        gp.training.calibrate(gp.transform(program), [torch.full((2, 16), float("nan"))])
    with pytest.raises(gp.PassError, match="no observers to calibrate"):
        gp.training.calibrate(gp.trace(MODELS["mlp"](), example("mlp")), [torch.zeros(2, 16)])
    with pytest.raises(gp.PassError, match=r"first\.input has seen no data; train a step or calibrate first"):
        gp.transform(program)(torch.zeros(2, 16))
