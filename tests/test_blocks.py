"""Blocks as modules of a Program: modes, copies, files, compilation, export, and what the verifier says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import PassError, VerifyError
from graphprune.ir.blocks import Block
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.sites import find_sites
from graphprune.ir.verifier import verify
from tests.blocked import BLOCKS, MASKS, assert_steps_equal, partitioned, stack
from tests.traced import run_passes, traced

# -- the modules --------------------------------------------------------------------------------------------------------


def test_blocks_are_modules_at_their_own_place() -> None:
    program = partitioned("bert_sequence", "{checkpoint=true}", labels=True)
    block = program.get_submodule("bert.encoder.layer.0")
    assert isinstance(block, Block)
    assert block.get_parameter("attention.self.query.weight") is program.tensor(
        "bert.encoder.layer.0.attention.self.query.weight"
    )
    seen: list[str] = []
    for path, item in program.blocks.items():
        item.register_forward_hook(lambda module, inputs, output, path=path: seen.append(path))
    ids = torch.arange(10).view(2, 5)
    program.train()
    assert block.training
    program(ids)
    assert seen == list(BLOCKS["bert_sequence"])
    block.eval()  # a part in eval mode draws no dropout
    seen.clear()
    torch.manual_seed(0)
    mixed = program(ids).logits
    torch.manual_seed(0)
    assert not torch.equal(mixed, program.train()(ids).logits)


def test_copies_are_independent_and_move() -> None:
    program = partitioned("gpt2", "{checkpoint=true}")
    clone = copy.deepcopy(program)
    assert str(clone) == str(program)
    assert all(block.checkpoint for block in clone.blocks.values())
    with torch.no_grad():
        clone.tensor("transformer.h.0.mlp.c_fc.weight").zero_()
    assert bool(program.tensor("transformer.h.0.mlp.c_fc.weight").any())
    clone = clone.to(torch.float64)
    assert clone(torch.arange(10).view(2, 5)).logits.dtype == torch.float64


def test_inputs_may_be_left_out() -> None:
    flat, program = traced("bert_sequence", labels=True), partitioned("bert_sequence", labels=True)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        output = program(ids)
        assert output.loss is None
        assert torch.equal(output.logits, flat(ids).logits)
        assert torch.equal(program(ids, labels=torch.tensor([0, 1])).loss, flat(ids, labels=torch.tensor([0, 1])).loss)
    program.drop_inputs(frozenset(["labels"]))
    verify(program)


def test_save_and_load(tmp_path: Path) -> None:
    program = run_passes(traced("bert_sequence", labels=True), f"{MASKS},partition-blocks{{checkpoint=true}}").train()
    program.tensor("bert.encoder.layer.0.output.dense.weight_mask")[:4] = False
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert str(loaded) == str(program)
    assert Property.PARTITIONED in loaded.properties
    assert_steps_equal(program, loaded, {"input_ids": torch.arange(10).view(2, 5)})


def test_torch_compile() -> None:
    program = partitioned("bert_sequence", "{checkpoint=true}").eval()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        want = program(ids).logits
        compiled = torch.compile(program, backend="eager")
        assert torch.equal(compiled(ids).logits, want)


def test_a_look_at_the_sites() -> None:
    flat, program = traced("bert_sequence"), partitioned("bert_sequence")
    assert str(gp.inspect(program)) == str(gp.inspect(flat))
    with pytest.raises(
        PassError, match="is partitioned and sites are found in flat graphs only; run inline-blocks first"
    ):
        find_sites(program)


def test_export_inlines_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")
    program = run_passes(
        traced("bert_sequence"), "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5},partition-blocks"
    )
    artifact = gp.export(program, "onnx", tmp_path / "out")
    assert artifact.manifest.recipe.endswith("partition-blocks,inline-blocks,fold-masks")
    assert artifact.manifest.sparsity() == pytest.approx(0.5, abs=0.02)
    assert program.blocks


# -- the verifier -------------------------------------------------------------------------------------------------------


def damaged(damage: Callable[[Program, Block], None]) -> Program:
    program = run_passes(stack(), f"{MASKS},partition-blocks")
    damage(program, program.blocks["layers.1"])
    return program


def drop_argument(program: Program, block: Block) -> None:
    (call,) = (node for node in program.graph.find_nodes(op="call_module") if node.target == block.path)
    call.args = ()


def foreign_attribute(program: Program, block: Block) -> None:
    next(iter(block.graph.find_nodes(op="get_attr"))).target = "layers.0.up.weight"


def plain_module(program: Program, block: Block) -> None:
    program.get_submodule("layers")._modules["1"] = nn.Identity()


def no_module(program: Program, block: Block) -> None:
    del program.get_submodule("layers")._modules["1"]


def forgotten_property(program: Program, block: Block) -> None:
    program.properties &= ~Property.PARTITIONED


def wrong_mask(program: Program, block: Block) -> None:
    block.get_submodule("up").weight_mask = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_argument, r"partitioned at layers_1: block layers.1 takes 1 values, each another one; 0 given"),
        (foreign_attribute, r"partitioned at layers.0.up.weight: layers.0.up.weight lies outside of block layers.1"),
        (plain_module, r"layers.1 is no block; partition-blocks makes blocks"),
        (no_module, r"no module has the name layers.1"),
        (forgotten_property, r"a Program with blocks has the property partitioned"),
        (
            wrong_mask,
            r"masked at mask_default_2: mask and weight differ in shape(.|\n)*> .*graphprune.mask\(%layers.1.up.weight",
        ),
    ],
)
def test_the_verifier_sees_into_blocks(damage: Callable[[Program, Block], None], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(damaged(damage))
