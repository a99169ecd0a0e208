"""partition-blocks: repeated blocks become modules, and nothing is computed differently."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import PassError, RecipeError
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quantizing import quantizers
from graphprune.ir.trace import trace
from graphprune.ir.verifier import verify
from graphprune.passes import PartitionBlocks
from graphprune.pipeline.recipe import Recipe
from tests.blocked import BLOCKS, MASKS, Layer, assert_steps_equal, partitioned, stack
from tests.models import HUGGING_FACE, MODELS
from tests.traced import inputs_of, run_passes, traced

Golden = Callable[[str, str], None]
# -- golden, nothing to do -----------------------------------------------------------------------------------------------


def test_golden(golden: Golden) -> None:
    program = stack()
    golden("partition_blocks_before", str(program))
    golden("partition_blocks_after", str(run_passes(program, f"{MASKS},partition-blocks{{checkpoint=true}}")))


def test_golden_of_a_block_with_two_results(golden: Golden) -> None:
    text = str(partitioned("t5"))
    golden(
        "partition_blocks_t5", "\n".join(line for line in text.splitlines() if "block @" in line or "return" in line)
    )


def test_running_twice_is_running_once() -> None:
    program = partitioned("bert_qa")
    text = str(program)
    result = PartitionBlocks(checkpoint=True).run(program)
    assert not result.changed
    assert set(result.coverage.left_out.values()) == {"a block already"}
    assert str(program) == text


def test_two_passes_share_the_blocks() -> None:
    inputs = inputs_of("t5", MODELS["t5"]())
    program = run_passes(
        traced("t5"), "partition-blocks{select=[encoder.*],checkpoint=true},partition-blocks{select=[decoder.block.*]}"
    )
    assert [block.checkpoint for block in program.blocks.values()] == [True, True, False, False]
    assert_steps_equal(traced("t5"), program, inputs)


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["false", "true"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step_is_bitwise_equal(name: str, checkpoint: str) -> None:
    flat = traced(name)
    program = partitioned(name, f"{{checkpoint={checkpoint}}}")
    assert tuple(program.blocks) == BLOCKS[name]
    assert list(program.state_dict()) == list(flat.state_dict())
    assert_steps_equal(flat, program, inputs_of(name, MODELS[name]()))


@pytest.mark.parametrize("name", sorted(set(HUGGING_FACE) - set(BLOCKS)))
def test_other_architectures_compute_the_same(name: str) -> None:
    assert_steps_equal(traced(name), partitioned(name, "{checkpoint=true}"), inputs_of(name, MODELS[name]()))


@pytest.mark.parametrize("passes", ["insert-fake-quant", f"{MASKS},insert-fake-quant"])
@pytest.mark.parametrize("name", ["bert_sequence", "t5", "resnet"])
def test_observers_and_masks_see_the_same(name: str, passes: str) -> None:
    passes = passes.replace("4x1", "unstructured").replace("cool_down=0", "cool_down=0,ragged=pad")
    prefix = "fold-conv-bn," if name == "resnet" else ""
    flat = run_passes(traced(name), f"{prefix}{passes}")
    program = run_passes(copy.deepcopy(flat), "partition-blocks{checkpoint=true}")
    inputs = inputs_of(name, MODELS[name]())
    assert {item.prefix for _, item in quantizers(program)} == {item.prefix for _, item in quantizers(flat)}
    assert [item.name for item in masked_sites(program)] == [item.name for item in masked_sites(flat)]
    for _ in range(2):
        assert_steps_equal(flat, program, inputs)


@pytest.mark.parametrize("name", ["bert_sequence", "llama"])
def test_a_session_drives_the_same_masks(name: str) -> None:
    torch.manual_seed(1)
    steps = 4
    ids = torch.randint(0, 99, (steps, 4, 6))
    labels = torch.randint(0, 2, (steps, 4)) if name == "bert_sequence" else ids
    histories = []
    for last in ((), ("partition-blocks{checkpoint=true}",)):
        program = gp.transform(traced(name, labels=True), [MASKS, *last]).train()
        optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
        torch.manual_seed(2)
        losses = []
        with gp.training.Session(program, optimizer, total_steps=steps) as session:
            for step in range(steps):
                loss = program(input_ids=ids[step], labels=labels[step]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        assert session.sparsity == pytest.approx(0.5, abs=0.01)
        histories.append((losses, program.state_dict()))
    (flat, want), (blocks, have) = histories
    assert torch.equal(torch.stack(flat), torch.stack(blocks))
    assert want.keys() == have.keys()
    assert all(torch.equal(value, have[key]) for key, value in want.items())


def saved_bytes(program: Program, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters and buffers left out."""
    own = {item.untyped_storage().data_ptr() for item in (*program.parameters(), *program.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = program(**inputs).loss
    loss.backward()
    return sum(kept.values())


@functools.cache
def six_layers() -> Program:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return trace(BertForSequenceClassification(config), labels=True, check=False)


def test_checkpointing_keeps_less_than_a_tenth_of_the_activations() -> None:
    """Measured on six layers: kept bytes fall from 5.24 MB to 0.31 MB, one seventeenth."""
    inputs = {"input_ids": torch.arange(8 * 32).view(8, 32) % 99, "labels": torch.zeros(8, dtype=torch.int64)}
    flat = copy.deepcopy(six_layers()).train()
    plain = run_passes(copy.deepcopy(flat), "partition-blocks").train()
    recomputed = run_passes(copy.deepcopy(flat), "partition-blocks{checkpoint=true}").train()
    whole = saved_bytes(flat, inputs)
    assert saved_bytes(plain, inputs) == pytest.approx(whole, rel=0.02)
    assert saved_bytes(recomputed, inputs) < whole / 10
    with torch.no_grad():
        assert saved_bytes_without_gradients(recomputed, inputs) == 0


def saved_bytes_without_gradients(program: Program, inputs: dict[str, Tensor]) -> int:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        program(**inputs)
    return len(kept)


def test_statistics_are_counted_once_under_recomputation() -> None:
    flat, program = stack("batch-norm"), run_passes(stack("batch-norm"), "partition-blocks{checkpoint=true}")
    assert all(block.checkpoint for block in program.blocks.values())
    x = torch.randn(4, 8)
    for _ in range(3):
        assert_steps_equal(flat, program, {"x": x})
    assert int(program.tensor("layers.1.norm.num_batches_tracked")) == 3


# -- properties ---------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(depth=st.integers(2, 5), first=st.integers(0, 4), count=st.integers(1, 3), checkpoint=st.booleans())
def test_any_choice_of_blocks(depth: int, first: int, count: int, checkpoint: bool) -> None:
    program = stack(depth=depth)
    names = tuple(f"layers.{index}" for index in range(depth))[first % depth :][:count]
    flat = copy.deepcopy(program)
    result = PartitionBlocks(checkpoint, names).run(program)
    program.properties |= Property.PARTITIONED
    verify(program)
    assert result.coverage.matched == names
    assert set(result.coverage.left_out) == {f"layers.{index}" for index in range(depth)} - set(names)
    assert_steps_equal(flat, program, {"x": torch.randn(3, 8)})


@given(checkpoint=st.booleans(), select=st.lists(st.text(min_size=1), max_size=2).map(tuple))
def test_text_reads_back(checkpoint: bool, select: tuple[str, ...]) -> None:
    step = PartitionBlocks(checkpoint, select)
    assert Recipe.of(str(step)).passes == (step,)


def test_levels_below_the_outermost_can_be_selected() -> None:
    program = partitioned("resnet", "{select=[resnet.encoder.stages.*.layers.0]}")
    assert list(program.blocks) == ["resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0"]
    again = PartitionBlocks(select=("resnet.encoder.stages.?",)).run(program)
    assert (
        again.coverage.left_out["resnet.encoder.stages.0"]
        == "resnet.encoder.stages.0.layers.0 is a block already, and blocks do not nest"
    )
    outer = partitioned("resnet", "{select=[resnet.*]}")
    assert tuple(outer.blocks) == BLOCKS["resnet"]


# -- refusal ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "block", "reason"),
    [
        ("twice", "layers.0", "it is called 2 times"),
        ("weight", "layers.1", "its weight layers.1.down.weight is used outside of it too"),
        ("tied", "layers.0", "its weight layers.0.up.weight is tied to layers.1.up.weight, outside of it"),
    ],
)
def test_what_cannot_be_a_block_is_reported(case: str, block: str, reason: str) -> None:
    flat, program = stack(case, depth=3), stack(case, depth=3)
    result = PartitionBlocks().run(program)
    program.properties |= Property.PARTITIONED
    verify(program)
    assert result.coverage.left_out[block].startswith(reason)
    assert "layers.2" in program.blocks
    assert block not in program.blocks
    assert_steps_equal(flat, program, {"x": torch.randn(3, 8)})


def test_entangled_blocks_are_left_out() -> None:
    program = stack()
    flat = copy.deepcopy(program)
    (relu, *_) = program.calls(torch.ops.aten.relu.default)
    relu.meta["nn_module_stack"] = {"": ("", "Stack")}  # as if the layer's caller computed it
    result = PartitionBlocks().run(program)
    assert "entangled with relu" in result.coverage.left_out["layers.0"]
    assert tuple(program.blocks) == ("layers.1",)
    assert_steps_equal(flat, program, {"x": torch.randn(3, 8)})


def test_a_shared_layer_is_refused_with_its_reason() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=99,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
    )
    program = trace(AlbertForSequenceClassification(config), check=False)
    with pytest.raises(PassError, match=r"albert_layer_groups.0: it is called 3 times"):
        run_passes(program, "partition-blocks")


def test_a_block_that_cannot_be_recomputed_keeps_its_activations() -> None:
    torch.manual_seed(0)

    class Writes(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x.relu_()))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Writes() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            for layer in self.layers:
                x = layer(x)
            return x

    program = trace(Model(), torch.randn(4, 8), check=False)
    flat = copy.deepcopy(program)
    result = PartitionBlocks(checkpoint=True).run(program)
    assert "activations are kept: relu_ changes its input mul in place" in result.coverage.left_out["layers.0"]
    assert not any(block.checkpoint for block in program.blocks.values())
    assert_steps_equal(flat, program, {"x": torch.randn(3, 8)})


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(
        PassError, match=r"no block can be made a module: the model has no numbered siblings of one class"
    ):
        run_passes(traced("mlp"), "partition-blocks")
    with pytest.raises(
        RecipeError, match=r"select: 'bert.encoder.layer.7' matches no block; did you mean 'bert.encoder.layer"
    ):
        partitioned("bert_qa", "{select=[bert.encoder.layer.7]}")


@pytest.mark.parametrize("step", [MASKS, "insert-fake-quant", "fold-conv-bn", "remove-dead", "find-prunable"])
def test_passes_that_need_a_flat_graph_refuse_a_partitioned_one(step: str) -> None:
    name = step.partition("{")[0]
    with pytest.raises(
        PassError, match=rf"pipeline\[0\].{name} cannot run on a Program that is partitioned: put inline-blocks before"
    ):
        run_passes(partitioned("bert_qa"), step)
    with pytest.raises(
        PassError, match=rf"which pipeline\[0\].partition-blocks makes it: put {name} before pipeline\[0\]"
    ):
        run_passes(traced("bert_qa"), f"partition-blocks,{step}")
    run_passes(partitioned("bert_qa"), f"inline-blocks,{step}")
