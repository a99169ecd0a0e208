"""Sites: which weights can be pruned, and why the others cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from tests.traced import traced


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.body(x)))


def test_a_weight_used_twice_is_one_site() -> None:
    (site,), _ = find_sites(trace(Twice(), torch.randn(2, 8)))
    assert site.name == "body.weight"
    assert len(site.uses) == 2
    assert site.macs == 2 * 8 * 8


def test_tied_modules_are_one_site_under_their_first_name() -> None:
    program = traced("shared_weight")
    sites, _ = find_sites(program)
    assert [site.name for site in sites] == ["body.weight", "head.weight"]
    assert len(sites[0].uses) == 3
    assert program.attribute("body.weight") is not None
    assert program.attribute("again.weight") is None


def test_weights_that_are_no_sites_come_with_a_reason() -> None:
    def reasons(name: str) -> dict[str, str]:
        return {item.name: item.reason for item in find_sites(traced(name))[1]}

    assert reasons("tied_embedding") == {"embedding.weight": "also used by embedding: pruning it would change that too"}
    assert reasons("conv_transpose")["up.weight"].startswith("transposed convolution")
    assert reasons("gpt2")["transformer.wpe.weight"].startswith("embedding")


def test_gpt2_weights_are_stored_in_out() -> None:
    sites = {site.name: site for site in find_sites(traced("gpt2_conv1d"))[0]}
    assert sites["up.weight"].layout.value == "in_out"
    assert sites["up.weight"].stored_shape == (16, 32)
    assert sites["up.weight"].shape == (32, 16)
    assert sites["head.weight"].layout.value == "out_in"


def test_grouped_convolutions() -> None:
    sites = {site.module: site for site in find_sites(traced("grouped_conv"))[0]}
    assert (sites["grouped"].groups, sites["depthwise"].groups, sites["dilated"].groups) == (4, 16, 1)
    assert sites["grouped"].shape == (16, 2 * 3)
    assert sites["depthwise"].shape == (16, 3)
    assert sites["grouped"].macs == 16 * 16 * 2 * 3  # positions * out * in/groups * kernel


def test_multiply_accumulates_by_hand() -> None:
    sites = {site.module: site for site in find_sites(traced("conv_bn"))[0]}
    assert sites["conv1"].macs == 8 * 8 * 8 * 3 * 9
    assert sites["conv2"].macs == 4 * 4 * 16 * 8 * 9
    assert sites["head"].macs == 16 * 4
    assert sites["conv1"].parameters == 8 * 3 * 9
    tokens = 6
    attention = {site.name: site for site in find_sites(traced("attention"))[0]}
    assert attention["feed.weight"].macs == tokens * 16 * 32
