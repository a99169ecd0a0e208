"""Questions about dataflow: what reaches what, which sites come last, which hang together."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from graphprune.ir.coupling import coupled_sites, dataflow, last_sites
from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from tests.models import MODELS
from tests.traced import run_passes, traced


def last(name: str) -> set[str]:
    program = traced(name)
    return last_sites(program, find_sites(program)[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"head.weight"}),
        ("conv_bn", {"head.weight"}),
        ("residual", {"head.weight"}),
        ("attention", {"head.weight"}),
        ("shared_weight", {"head.weight"}),
        ("conv_transpose", {"out.weight"}),
        ("bert_qa", {"qa_outputs.weight"}),
        ("bert_sequence", {"classifier.weight"}),
        ("llama", {"lm_head.weight"}),
        ("vit", {"classifier.weight"}),
    ],
)
def test_last_sites(name: str, expected: set[str]) -> None:
    assert last(name) == expected


def test_a_single_site_is_not_the_last() -> None:
    assert last("tied_embedding") == set()


def test_masks_and_quantizers_change_no_answer() -> None:
    program = run_passes(traced("residual"), "insert-masks,insert-fake-quant")
    sites = find_sites(program)[0]
    assert last_sites(program, sites) == {"head.weight"}
    assert coupled_sites(program, sites) == [frozenset({"stem.weight", "branch2.weight"})]


class TwoHeads(nn.Module):
    """A body and two heads, one of which feeds on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.left = nn.Linear(4, 2)
        self.right = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.left(y), self.right(y)


def test_every_head_is_last() -> None:
    program = trace(TwoHeads(), torch.randn(2, 4), check=False)
    assert last_sites(program, find_sites(program)[0]) == {"left.weight", "right.weight"}


def test_features_that_are_added_hang_together() -> None:
    program = traced("residual")
    assert coupled_sites(program, find_sites(program)[0]) == [frozenset({"stem.weight", "branch2.weight"})]
    program = traced("mlp")
    assert coupled_sites(program, find_sites(program)[0]) == []


def test_the_residual_stream_of_a_transformer() -> None:
    program = traced("llama")
    (group,) = [
        item for item in coupled_sites(program, find_sites(program)[0]) if any("o_proj" in name for name in item)
    ]
    assert group == {
        f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    gates = [
        item for item in coupled_sites(program, find_sites(program)[0]) if any("gate_proj" in name for name in item)
    ]
    assert gates == [
        frozenset({f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight"})
        for layer in range(2)
    ]


def test_dataflow() -> None:
    program = traced("residual")
    graph = dataflow(program)
    sites = {site.module: site.uses[0] for site in find_sites(program)[0]}
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, sites["stem"], sites["head"])
    assert nx.has_path(graph, sites["branch1"], sites["branch2"])
    assert not nx.has_path(graph, sites["head"], sites["stem"])
    assert nx.descendants(graph, "x") >= set(sites.values())
    assert graph.nodes["x"]["op"] == "placeholder"
    assert len(graph) == len(program.graph.nodes)


@pytest.mark.parametrize("name", MODELS)
def test_dataflow_is_acyclic_and_ends_in_the_output(name: str) -> None:
    graph = dataflow(traced(name))
    assert nx.is_directed_acyclic_graph(graph)
    assert "output" in graph
