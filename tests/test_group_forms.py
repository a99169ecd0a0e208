"""Heads and neurons of every form of attention and of feed-forward block, and blocks that have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.ir.groups import find_heads, find_neurons
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from tests.units import check, check_cover, outline

# -- attention of every form -----------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """Attention over [b, s, 16] with 4 query heads of 4; options make it one of the forms that models have."""

    def __init__(
        self, heads: int = 4, *, form: str = "sdpa", norm: str = "", fused: str = "", gate: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.form, self.norm, self.fused, self.gate = heads, form, norm, fused, gate
        if fused:
            self.qkv = nn.Linear(16, 48)
        else:
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * heads), nn.Linear(16, 4 * heads)
        self.o = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(16 if norm == "all" else 4) + 0.5)
        self.head = nn.Linear(16, 3)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        b, s, _ = x.shape
        if self.fused == "interleaved":
            return tuple(part.transpose(1, 2) for part in self.qkv(x).view(b, s, 4, 12).chunk(3, -1))
        if self.fused == "unbind":
            return self.qkv(x).view(b, s, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm == "all":
            q = F.layer_norm(q, (16,), self.scale)
        return tuple(part.view(b, s, -1, 4).transpose(1, 2) for part in (q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.project(x)
        if self.norm == "head":
            q, k = (part * part.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * self.scale for part in (q, k))
        repeat = 4 // k.shape[1]
        if self.form == "sdpa":
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.form == "bmm":
            q, k, v = (part.reshape(b * 4, s, 4) for part in (q, k, v))
            scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), beta=1.0, alpha=0.5).view(b, 4, s, s)
            scores = scores + torch.arange(4).view(1, 4, 1, 1) * torch.arange(s)
            y = torch.bmm(scores.softmax(-1).view(b * 4, s, s), v).view(b, 4, s, 4)
        else:
            scores = (q @ k.transpose(-1, -2)) / 2
            mask = torch.ones(s, s, dtype=torch.bool).tril()
            y = scores.masked_fill(~mask, -1e4).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, s, 16)
        if self.gate:
            y = y * x.sigmoid()
        return self.head(F.layer_norm(x + self.o(y), (16,)))  # type: ignore[no-any-return]


def attend(heads: int = 4, **options: object) -> Program:
    torch.manual_seed(3)
    return trace(Attend(heads, **options).eval(), torch.randn(2, 5, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "count", "members"),
    [
        ({}, 4, [("q", 0, 0, 4), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"form": "eager"}, 4, [("q", 0, 0, 4), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"form": "bmm"}, 4, [("q", 0, 0, 4), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"norm": "head"}, 4, [("q", 0, 0, 4), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"heads": 2}, 2, [("q", 0, 0, 8), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 8)]),
        ({"heads": 2, "form": "gqa"}, 2, [("q", 0, 0, 8), ("k", 0, 0, 4), ("v", 0, 0, 4), ("o", 1, 0, 8)]),
        ({"heads": 1}, 4, [("q", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"heads": 1, "form": "eager"}, 4, [("q", 0, 0, 4), ("o", 1, 0, 4)]),
        ({"fused": "interleaved"}, 4, [("qkv", 0, 0, 12), ("o", 1, 0, 4)]),
        ({"fused": "unbind"}, 4, [("qkv", 0, 0, 4), ("qkv", 0, 16, 4), ("qkv", 0, 32, 4), ("o", 1, 0, 4)]),
    ],
)
def test_forms_of_attention(options: dict[str, object], count: int, members: list[tuple[str, int, int, int]]) -> None:
    program = attend(**options)  # type: ignore[arg-type]
    groups, left_out = find_heads(program)
    assert outline(groups) == [("o", count, members)]
    assert "head.weight" in left_out
    check(program, {"x": torch.randn(2, 5, 16)}, groups)
    check_cover(program, groups)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "all"}, "heads are mixed before attention"),
        ({"gate": True}, "mul joins its features with sigmoid, which comes from no linear layer"),
    ],
)
def test_attention_without_heads(options: dict[str, object], reason: str) -> None:
    groups, left_out = find_heads(attend(**options))  # type: ignore[arg-type]
    assert not groups
    assert left_out["o.weight"] == reason
    assert left_out["q.weight"] == f"o.weight: {reason}"


class Probe(nn.Module):
    """Attention with one head, or whose weights or result are used elsewhere too."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = 1 if self.use == "one" else 2
        q, k, v = (part.view(*x.shape[:2], heads, -1).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        y = (scores @ v).transpose(1, 2).reshape(x.shape)
        return self.o(y), {"one": x, "weights": scores, "result": y, "key": k}[self.use]


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("one", "it has one head only, or its heads are mixed"),
        ("weights", "the features of {} are also used by the output"),
        ("result", "the features of {} are also used by the output"),
        ("key", "the features of k.weight are also used by the output"),
    ],
)
def test_attention_that_others_look_into(use: str, reason: str) -> None:
    groups, left_out = find_heads(trace(Probe(use).eval(), torch.randn(2, 5, 8), check=False))
    assert not groups
    assert set(left_out) == {"q.weight", "k.weight", "v.weight", "o.weight"}
    assert left_out["o.weight"] in {reason.format(name) for name in left_out}
    assert left_out["q.weight"] == f"o.weight: {left_out['o.weight']}"


class Twice(nn.Module):
    """One block that runs twice with the same weights, as in ALBERT; ``odd`` feeds its first layer otherwise once more."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12 if odd else 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.up(x) if self.odd else x)  # type: ignore[no-any-return]


def test_a_block_that_runs_twice() -> None:
    program = trace(Twice().eval(), torch.randn(3, 8))
    groups, _ = find_neurons(program)
    assert outline(groups) == [("down", 12, [("up", 0, 0, 1), ("down", 1, 0, 1)])]
    check(program, {"x": torch.randn(3, 8)}, groups)
    groups, left_out = find_neurons(trace(Twice(odd=True).eval(), torch.randn(3, 8)))
    assert not groups
    assert "used several times, in different ways" in left_out["down.weight"]


# -- feed-forward blocks of every form --------------------------------------------------------------------------------------


class Feed(nn.Module):
    """Up and down over [b, 8] with 8 neurons, joined in one of many ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        wide = {"gate_up": 16, "interleaved": 16, "maxout": 16, "half": 4}.get(form, 8)
        self.up, self.gate, self.down = nn.Linear(8, wide), nn.Linear(8, 1 if form == "scalar" else 8), nn.Linear(8, 8)
        self.norm, self.slope = nn.LayerNorm(8), nn.PReLU(8)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        up, also = self.up(x), x
        match self.form:
            case "gate_up":
                gate, value = up.chunk(2, -1)
                y = F.silu(gate) * value
            case "interleaved":
                y = F.silu(up[..., ::2]) * up[..., 1::2]
            case "maxout":
                y = up.view(-1, 8, 2).amax(-1)
            case "scalar":
                y = F.gelu(up) * self.gate(x).sigmoid()
            case "half":
                y = torch.cat([up, up.neg()], -1)
            case "in_place":
                y = F.relu(up, inplace=True)
            case "slope":
                y = self.slope(up)
            case "bias":
                y = F.gelu(up) + self.norm.bias * 2
            case "residual":
                y = F.relu(up) + x
            case "sum":
                y = F.relu(up) + self.gate(x)
            case "conv":
                y = up * self.conv(x[:, None])[:, 0]
            case "norm":
                y = self.norm(up)
            case "shown":
                y = also = F.relu(up)
            case "both":
                y, also = F.relu(up), self.gate(up)
            case "skip":
                y = F.relu(up)
                return self.down(y) + y, x
            case "mixed":
                y = F.relu(up) * self.norm(self.gate(x))
            case "reversed":
                y = up.flip(-1)
        return self.down(y), also


def feed(form: str) -> Program:
    torch.manual_seed(4)
    return trace(Feed(form).eval(), torch.randn(3, 8), check=form != "in_place")


@pytest.mark.parametrize(
    ("form", "members"),
    [
        ("gate_up", [("up", 0, 0, 1), ("up", 0, 8, 1), ("down", 1, 0, 1)]),
        ("interleaved", [("up", 0, 0, 2), ("down", 1, 0, 1)]),
        ("maxout", [("up", 0, 0, 2), ("down", 1, 0, 1)]),
        ("scalar", [("up", 0, 0, 1), ("down", 1, 0, 1)]),
        ("in_place", [("up", 0, 0, 1), ("down", 1, 0, 1)]),
        ("slope", [("up", 0, 0, 1), ("down", 1, 0, 1)]),
        ("bias", [("up", 0, 0, 1), ("down", 1, 0, 1)]),
        ("sum", [("up", 0, 0, 1), ("gate", 0, 0, 1), ("down", 1, 0, 1)]),
    ],
)
def test_forms_of_feed_forward(form: str, members: list[tuple[str, int, int, int]]) -> None:
    program = feed(form)
    groups, _ = find_neurons(program)
    assert outline(groups) == [("down", 8, members)]
    check(program, {"x": torch.randn(3, 8)}, groups)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("residual", "add joins its features with x, which comes from no linear layer"),
        ("conv", "mul joins its features with select, which comes from no linear layer"),
        ("norm", "operators before it mix features"),
        ("mixed", "mul joins its features with layer_norm, whose features are mixed"),
        ("shown", "the features of up.weight are also used by the output"),
        ("both", "the features of up.weight are also used by gate.weight"),
        ("skip", "the features of up.weight are also used by add"),
        ("half", "every input feature hangs together with every other"),
        ("reversed", "every input feature hangs together with every other"),
    ],
)
def test_features_that_are_no_neurons(form: str, reason: str) -> None:
    groups, left_out = find_neurons(feed(form))
    assert not groups
    assert left_out["down.weight"] == reason
    first = (
        "gate.weight: the features of up.weight are also used by relu" if form == "both" else f"down.weight: {reason}"
    )
    assert left_out["up.weight"] == first
