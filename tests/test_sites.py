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


class Convolutions(nn.Module):
    """A 1-d, a grouped 2-d and a depthwise 3-d convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 5, padding="same")
        self.two = nn.Conv2d(4, 6, (3, 2), groups=2)
        self.three = nn.Conv3d(6, 12, (1, 2, 2), groups=6)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x)[:, :, None].expand(-1, -1, 4, -1))
        return self.head(self.three(x[:, :, None]).mean((2, 3, 4)))  # type: ignore[no-any-return]


def test_kernels_and_groups_of_every_convolution() -> None:
    sites = {site.module: site for site in find_sites(trace(Convolutions().eval(), torch.randn(2, 3, 7)))[0]}
    assert {name: (site.op, site.shape, site.kernel, site.groups) for name, site in sites.items()} == {
        "one": ("conv1d", (4, 15), 5, 1),
        "two": ("conv2d", (6, 12), 6, 2),
        "three": ("conv3d", (12, 4), 4, 6),
        "head": ("linear", (2, 12), 1, 1),
    }
    assert {site.kernel for site in find_sites(traced("gpt2_conv1d"))[0]} == {1}


class Functional(nn.Module):
    """Uses of weights that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.randn(8, 4))
        self.turned = nn.Parameter(torch.randn(4, 4))
        self.filters = nn.Parameter(torch.randn(4, 2, 3))
        self.both = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cut.chunk(2)
        x = F.linear(x, first) + F.linear(x, second) + x @ self.turned.t()
        x = F.linear(x, self.both) + torch.matmul(x, self.both)
        y = torch.stack([x] * 4, 1)
        return F.conv1d(y[:, :2], self.filters) + F.conv1d(y, self.filters, groups=2)


def test_functional_uses_come_with_a_reason() -> None:
    sites, excluded = find_sites(trace(Functional().eval(), torch.randn(2, 4)))
    assert sites == ()
    assert {item.name: item.reason.split(":")[0] for item in excluded} == {
        "cut": "cut into parts before it is used",
        "turned": "transposed or reshaped before it is used, not as the weight of a linear or conv",
        "both": "used in two layouts, as [out, in] and as [in, out]",
        "filters": "used with 1 and 2 groups",
    }


class CrossAttention(nn.Module):
    """nn.MultiheadAttention whose keys come from elsewhere, so that its fused weight is cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]  # type: ignore[no-any-return]


def test_fused_projections() -> None:
    sites = {site.name: site for site in find_sites(traced("attention"))[0]}
    assert sites["attention.in_proj_weight"].shape == (48, 16)
    assert len(sites["attention.in_proj_weight"].uses) == 1
    sites = {site.name: site for site in find_sites(traced("gpt2"))[0]}
    assert sites["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    found, excluded = find_sites(trace(CrossAttention().eval(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8))))
    assert [site.name for site in found] == ["attention.out_proj.weight"]
    assert [item.name for item in excluded] == ["attention.in_proj_weight"]
    assert excluded[0].reason.startswith("cut into parts before it is used")


def test_language_models_with_a_tied_output_layer_keep_it_whole() -> None:
    for name in ("gpt2", "t5"):
        _, excluded = find_sites(traced(name))
        assert {"also used by embedding: pruning it would change that too"} <= {item.reason for item in excluded}
