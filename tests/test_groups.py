"""Heads and neurons of real models: found from the graph alone, and independent of each other in fact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.ir.groups import find_heads, find_neurons
from graphprune.ir.sites import find_sites
from tests.traced import assert_same, inputs_of, pair, run_passes, traced
from tests.units import check, check_cover, groups_of, outline, without

TRANSFORMERS = ("bert_qa", "bert_sequence", "distilbert_qa", "roberta", "gpt2", "llama", "t5", "vit")


@pytest.mark.parametrize("name", [*TRANSFORMERS, "attention", "mlp", "residual", "gpt2_conv1d"])
def test_units_are_independent_in_fact(name: str) -> None:
    model, program = pair(name)
    groups = groups_of(program)
    assert groups
    check(program, inputs_of(name, model), groups)
    check_cover(program, groups)


@pytest.mark.parametrize(("name", "heads", "neurons"), [
    ("bert_qa", 2, 2), ("distilbert_qa", 2, 2), ("roberta", 2, 3), ("gpt2", 2, 2), ("llama", 2, 2), ("t5", 6, 4), ("vit", 2, 2),
    ("bert_sequence", 2, 3), ("attention", 1, 1), ("mlp", 0, 2), ("residual", 0, 1), ("conv_bn", 0, 0), ("shared_weight", 0, 0),
    ("tied_embedding", 0, 0), ("grouped_conv", 0, 0), ("resnet", 0, 0),
])  # fmt: skip
def test_how_many(name: str, heads: int, neurons: int) -> None:
    program = traced(name)
    for find, number in ((find_heads, heads), (find_neurons, neurons)):
        groups, left_out = find(program)
        assert len(groups) == number
        assert len({group.name for group in groups}) == number
        inside = {member.site for group in groups for member in group.members}
        assert inside.isdisjoint(left_out)
        assert inside | set(left_out) == {site.name for site in find_sites(program)[0]}
        for axis in (0, 1):
            owners = [(m.site, group.name) for group in groups for m in group.members if m.axis == axis]
            assert len({site for site, _ in owners}) == len(set(owners))


def test_heads_of_bert() -> None:
    found = outline(find_heads(traced("bert_qa"))[0])[0]
    path = "bert.encoder.layer.0.attention"
    assert found == (
        path,
        4,
        [
            (f"{path}.self.query", 0, 0, 8),
            (f"{path}.self.key", 0, 0, 8),
            (f"{path}.self.value", 0, 0, 8),
            (f"{path}.output.dense", 1, 0, 8),
        ],
    )


def test_a_fused_projection_has_a_part_for_each() -> None:
    found = outline(find_heads(traced("gpt2"))[0])[0]
    path = "transformer.h.0.attn"
    assert found[2] == [*((f"{path}.c_attn", 0, start, 8) for start in (0, 32, 64)), (f"{path}.c_proj", 1, 0, 8)]
    found = outline(find_heads(traced("attention"))[0])[0]
    weight = "attention.in_proj_weight"
    assert found == ("attention", 2, [*((weight, 0, at, 8) for at in (0, 16, 32)), ("attention.out_proj", 1, 0, 8)])


def test_grouped_queries_go_with_their_key_and_value() -> None:
    found = outline(find_heads(traced("llama"))[0])[0]
    path = "model.layers.0.self_attn"
    assert found == (
        path,
        2,
        [
            (f"{path}.{name}_proj", axis, 0, width)
            for name, axis, width in zip("qkvo", (0, 0, 0, 1), (16, 8, 8, 16), strict=True)
        ],
    )


def test_a_gated_block_has_three_members() -> None:
    found = outline(find_neurons(traced("llama"))[0])[0]
    path = "model.layers.0.mlp"
    assert found == (
        path,
        64,
        [(f"{path}.gate_proj", 0, 0, 1), (f"{path}.up_proj", 0, 0, 1), (f"{path}.down_proj", 1, 0, 1)],
    )


def test_cross_attention_takes_keys_from_elsewhere() -> None:
    names = [group.name for group in find_heads(traced("t5"))[0]]
    assert "decoder.block.0.layer.1.EncDecAttention" in names
    assert "decoder.block.0.layer.0.SelfAttention" in names


def test_masks_and_quantizers_change_no_answer() -> None:
    for name in ("bert_qa", "llama", "mlp"):
        before = traced(name)
        after = run_passes(traced(name), "insert-masks{sparsity=0.5},insert-fake-quant")
        assert find_heads(after)[0] == find_heads(before)[0]
        assert find_neurons(after)[0] == find_neurons(before)[0]


def test_reasons_of_the_rest() -> None:
    _, left_out = find_neurons(traced("conv_bn"))
    assert left_out["conv1.weight"].startswith("convolution: ")
    assert left_out["head.weight"].startswith("no linear layer feeds it")
    assert find_heads(traced("mlp"))[1]["first.weight"] == "it is part of no attention between prunable layers"


@torch.no_grad()
def test_neurons_can_be_cut_out() -> None:
    """Taking the rows and columns away gives what zeroing them gives."""
    model, program = pair("mlp")
    (group, _), _ = find_neurons(program)
    units = [1, 5, 31]
    x = torch.randn(5, 16)
    pruned = without(program, group, units, {"x": x}, "zero")
    kept = [unit for unit in range(group.count) if unit not in units]
    up, down = model.get_submodule("first"), model.get_submodule("second")
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    up.weight, up.bias = nn.Parameter(up.weight[kept]), nn.Parameter(up.bias[kept])
    down.weight = nn.Parameter(down.weight[:, kept])
    assert_same(pruned, model(x))
