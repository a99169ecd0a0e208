"""inline-blocks: a partitioned Program becomes the flat one that it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphprune as gp
from graphprune.errors import PassError
from graphprune.ir.blocks import Block
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.verifier import verify
from graphprune.passes import InlineBlocks
from graphprune.pipeline.recipe import Recipe
from tests.blocked import MASKS, assert_steps_equal, stack
from tests.models import HUGGING_FACE, MODELS
from tests.traced import inputs_of, run_passes, traced

Golden = Callable[[str, str], None]


def there_and_back(program: Program, options: str = "") -> Program:
    return run_passes(copy.deepcopy(program), f"partition-blocks{options},inline-blocks")


def test_golden(golden: Golden) -> None:
    program = run_passes(stack(), f"{MASKS},partition-blocks")
    golden("inline_blocks_before", str(program))
    golden("inline_blocks_after", str(run_passes(program, "inline-blocks")))


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_text_is_what_it_was(name: str) -> None:
    program = run_passes(
        traced(name), "insert-masks{ragged=pad},insert-fake-quant" if name != "resnet" else "insert-masks"
    )
    back = there_and_back(program)
    assert str(back) == str(program)
    assert [node.name for node in back.graph.nodes] == [node.name for node in program.graph.nodes]
    assert [node.meta for node in back.graph.nodes] == [node.meta for node in program.graph.nodes]
    assert list(back.state_dict()) == list(program.state_dict())
    assert not any(isinstance(module, Block) for module in back.modules())


@pytest.mark.parametrize("name", ["bert_sequence", "gpt2", "llama", "resnet", "t5"])
def test_numbers_are_bitwise_equal(name: str) -> None:
    assert_steps_equal(traced(name), there_and_back(traced(name), "{checkpoint=true}"), inputs_of(name, MODELS[name]()))


def test_masks_are_kept_and_can_be_folded() -> None:
    program = run_passes(traced("bert_sequence"), f"{MASKS},partition-blocks")
    for site in masked_sites(program):
        site.mask[:4] = False
    flat = run_passes(program, "inline-blocks,fold-masks{allow_unfinished=true}")
    assert not bool(flat.tensor("bert.encoder.layer.1.output.dense.weight")[:4].any())


def test_nothing_to_inline() -> None:
    program = traced("mlp")
    text = str(program)
    assert not InlineBlocks().run(program).changed
    assert str(program) == text
    program = there_and_back(traced("bert_qa"))
    text = str(program)
    assert not InlineBlocks().run(program).changed
    assert str(program) == text


def test_modes_of_parts_stay_and_training_goes_on() -> None:
    program = run_passes(traced("bert_sequence", labels=True), f"{MASKS},partition-blocks").train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    ids, labels = torch.arange(10).view(2, 5), torch.tensor([0, 1])
    with gp.training.Session(program, optimizer, total_steps=1):
        program(ids, labels=labels).loss.backward()
        optimizer.step()
    flat = gp.transform(program, "inline-blocks,fold-masks")
    assert flat.training
    assert flat.history[-2:] == ("inline-blocks", "fold-masks")
    assert Property.PARTITIONED not in flat.properties


def test_nodes_that_were_added_since_find_their_place() -> None:
    program = run_passes(stack(), "partition-blocks")
    block = program.blocks["layers.0"]
    (relu,) = block.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with block.graph.inserting_after(relu):
        twice = block.graph.call_function(torch.ops.aten.mul.Tensor, (relu, 2.0))
    twice.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    program.recompile()
    verify(program)
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = program(x)
        run_passes(program, "inline-blocks")
        assert torch.equal(program(x), before)


def test_a_flat_program_is_refused_by_the_manager() -> None:
    with pytest.raises(PassError, match=r"pipeline\[0\].inline-blocks requires partitioned"):
        run_passes(traced("mlp"), "inline-blocks")


@settings(max_examples=6)
@given(depth=st.integers(2, 5), count=st.integers(1, 5))
def test_any_number_of_blocks(depth: int, count: int) -> None:
    program = stack(depth=depth)
    select = ",".join(f"layers.{index}" for index in range(min(count, depth)))
    assert str(there_and_back(program, f"{{select=[{select}]}}")) == str(program)


def test_text_reads_back() -> None:
    assert Recipe.of(str(InlineBlocks())).passes == (InlineBlocks(),)
