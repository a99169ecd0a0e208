"""cast-mixed among other passes: masks before or after it, sessions, blocks, quantizers, saved Programs, export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.artifact.samples import make_inputs
from graphprune.ir import ops
from graphprune.ir.coupling import last_sites
from graphprune.ir.masking import masked_sites
from graphprune.ir.precision import dtypes_of
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.passes import CastMixed
from tests.models import example
from tests.traced import answer, run, run_passes, tensors, traced

aten = torch.ops.aten
PRUNE = "insert-masks{pattern=4x1,sparsity=0.5,schedule=one-shot,criterion=magnitude}"


def mixed(program: Program, text: str = "cast-mixed") -> Program:
    return run_passes(copy.deepcopy(program), text)


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "shared_weight", "bert_qa", "gpt2", "llama"])
def test_sites_are_found_through_casts(name: str) -> None:
    program = traced(name)
    sites, excluded = find_sites(program)
    for text in ("cast-mixed", "cast-mixed{store=true}"):
        after = mixed(program, text)
        again, left = find_sites(after)
        assert [(site.name, site.uses, site.macs) for site in again] == [
            (site.name, site.uses, site.macs) for site in sites
        ]
        assert {item.name for item in left} == {item.name for item in excluded}
        assert last_sites(after, again) == last_sites(program, sites)


@pytest.mark.parametrize("store", ["", "{store=true}"])
@pytest.mark.parametrize("name", ["mlp", "gpt2_conv1d", "grouped_conv"])
def test_masks_come_before_or_after(name: str, store: str) -> None:
    inputs = example(name) or ()
    first = mixed(traced(name), f"{PRUNE},cast-mixed")
    second = mixed(traced(name), f"cast-mixed,{PRUNE}")
    assert torch.equal(answer(first, *inputs), answer(second, *inputs))
    assert [site.name for site in masked_sites(first)] == [site.name for site in masked_sites(second)]
    for text in (f"{PRUNE},cast-mixed{store},fold-masks", f"{PRUNE},fold-masks,cast-mixed{store}"):
        folded = mixed(traced(name), text)
        assert torch.equal(answer(folded, *inputs), answer(first, *inputs))
        for site in masked_sites(first):
            assert torch.equal(folded.tensor(site.name) == 0, ~site.mask)


def test_a_session_prunes_and_trains() -> None:
    text = "insert-masks{pattern=4x1,sparsity=0.5,warm_up=0,cool_down=2,frequency=1}"
    for recipe in (f"{text},cast-mixed", f"cast-mixed,{text}"):
        program = mixed(traced("mlp"), recipe).train()
        optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
        session = gp.training.Session(program, optimizer, total_steps=8)
        for step in range(8):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            program(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.done
        for site in masked_sites(program):
            assert site.weight.dtype is torch.float32
            assert not bool(site.weight[~site.mask].any())
        mixed(program, "fold-masks")


def test_heads_are_found_through_casts() -> None:
    text = "insert-masks{pattern=head,sparsity=0.5,schedule=one-shot,criterion=magnitude}"
    names = [
        [site.name for site in masked_sites(mixed(traced("bert_qa"), item))] for item in (text, f"cast-mixed,{text}")
    ]
    assert names[0] == names[1] != []


def test_blocks_run_with_casts() -> None:
    program = traced("bert_qa", labels=True)
    inputs = make_inputs(program)[0]
    flat = mixed(program)
    parts = mixed(flat, "partition-blocks")
    for want, have in zip(tensors(run(flat, inputs)), tensors(run(parts, inputs)), strict=True):
        assert torch.equal(want, have)
    assert str(mixed(parts, "inline-blocks")) == str(flat)


def test_quantized_layers_stay_in_float32() -> None:
    program = run_passes(traced("mlp"), "insert-fake-quant{select=[second]}")
    result = CastMixed().run(program)
    assert result.coverage.matched == ("first.weight", "head.weight")
    assert "fake-quantized" in result.coverage.left_out["second.weight"]
    (quantized,) = [item for item in program.calls(aten.linear.default) if item.args[0].target is ops.fake_quantize]  # type: ignore[union-attr]
    assert dtypes_of(quantized) == (torch.float32,)


@pytest.mark.parametrize(
    "text", ["cast-mixed", "cast-mixed{store=true}", f"{PRUNE},cast-mixed{{dtype=float16,store=true}}"]
)
@pytest.mark.parametrize("name", ["bert_qa", "gpt2"])
def test_saved_and_loaded(name: str, text: str, tmp_path: Path) -> None:
    program = mixed(traced(name), text)
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert str(loaded) == str(program)
    inputs = make_inputs(program)[0]
    for want, have in zip(tensors(run(program, inputs)), tensors(run(loaded, inputs)), strict=True):
        assert torch.equal(want, have)


def test_stored_float16_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")
    program = mixed(traced("bert_qa"), f"{PRUNE},cast-mixed{{dtype=float16,store=true}}")
    manifest = gp.export(program, "onnx", tmp_path / "out", tolerance=4 * 2.0**-11).manifest
    assert manifest.sparsity() == pytest.approx(0.5, abs=0.02)
    assert all(entry.pattern_holds for entry in manifest.sites if entry.pattern)
