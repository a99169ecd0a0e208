"""Every architecture the whole way: traced, in parity, trained a step, masked, exported, in parity on onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.artifact.samples import make_inputs
from graphprune.ir.masking import masked_sites
from tests.models import MODELS, example

MASKS = "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,ragged=pad}"
ARCHITECTURES = [name for name in MODELS if name != "conv_transpose"]


def first_loss(program: gp.Program, inputs: dict[str, Tensor]) -> Tensor:
    output = program(**inputs)
    loss = getattr(output, "loss", None)
    return loss if loss is not None else output.square().mean()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("t5", "llama") else ()) for name in ARCHITECTURES]
)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")
    model = MODELS[name]()
    inputs = example(name)
    traced = gp.trace(model, inputs, labels=inputs is None)  # raises where eval or train mode differs from the model
    program = gp.transform(traced, MASKS).train()
    sites = masked_sites(program)
    assert sites
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-3)
    session = gp.training.Session(program, optimizer, total_steps=100)
    before = [site.weight.detach().clone() for site in sites]
    sample = make_inputs(program)[0]
    first_loss(program, sample).backward()
    optimizer.step()
    assert session.step == 1
    assert all(not torch.equal(site.weight, old) for site, old in zip(sites, before, strict=True))
    artifact = gp.export(program.eval(), "onnx", tmp_path / "out")
    manifest = artifact.manifest
    assert manifest.parity.max_abs <= manifest.parity.tolerance
    pruned = {site.name: site for site in manifest.sites if site.pattern}
    assert set(pruned) == {site.name for site in sites}
    assert all(entry.pattern_holds and entry.zeros_at_zero_point for entry in pruned.values())
    assert manifest.sparsity() == pytest.approx(0.5, abs=0.02)
    assert gp.verify(tmp_path / "out").passed


def test_transposed_convolutions_are_left_out_with_a_reason() -> None:
    inspection = gp.inspect(MODELS["conv_transpose"](), example("conv_transpose"), include_last=True)
    reasons = {item.name: item.reason for item in inspection.excluded}
    assert any("transposed convolution" in reason for reason in reasons.values())
