"""The pass lower-attention: attention of torch becomes the operator that has a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.ir.program import Program
from graphprune.ir.sparse_operators import attention
from graphprune.ir.trace import trace
from graphprune.passes import LowerAttention, RemoveDropout
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe

aten = torch.ops.aten


class Attending(nn.Module):
    """Attention of two heads of 16 features, ``[b, s, 32]``, as ``how`` calls it."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 96)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner(x).view(x.shape[0], x.shape[1], 3, 2, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        return self.how(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


def lowered(model: nn.Module, *inputs: Tensor) -> tuple[Program, Program]:
    """The Program of a model before and after."""
    program = PassManager((RemoveDropout(),)).run(trace(model.eval(), inputs).eval()).program
    return program, PassManager((LowerAttention(),)).run(program).program


def sdpa(mask: Callable[[Tensor], Tensor] | None = None, **options: object) -> Attending:
    def how(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = None if mask is None else mask(q)
        result: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, seen, **options)  # type: ignore[arg-type]
        return result

    return Attending(how)


MASKS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "bool": lambda q: torch.ones(q.shape[0], 1, 1, q.shape[2], dtype=torch.bool) & (torch.arange(q.shape[2]) % 3 != 1),
    "float": lambda q: torch.arange(q.shape[2]).float().view(1, 1, 1, -1) / 7,
}


@pytest.mark.parametrize("mask", MASKS)
def test_outputs_are_equal(mask: str) -> None:
    torch.manual_seed(0)
    before, after = lowered(sdpa(MASKS[mask]), torch.randn(2, 9, 32))
    assert len(list(after.calls(attention))) == 1
    assert not list(after.calls(aten.scaled_dot_product_attention.default))
    for batch, length in ((2, 9), (5, 9)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)


def test_causal_and_scaled() -> None:
    before, after = lowered(sdpa(is_causal=True, scale=0.5), torch.randn(2, 9, 32))
    x = torch.randn(3, 9, 32)
    torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)


def test_what_a_mask_says_for_nothing_is_left_out() -> None:
    """transformers spreads a mask of keys over all queries, and says "and" to what is always true."""

    def spread(q: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        always = places.view(1, 1, -1, 1) >= 0
        keys = (torch.arange(q.shape[2]) % 2 == 0).view(1, 1, 1, -1)
        return (always & keys).expand(q.shape[0], -1, -1, -1)

    before, after = lowered(sdpa(spread), torch.randn(2, 9, 32))
    (node,) = after.calls(attention)
    mask = node.args[3]
    assert isinstance(mask, torch.fx.Node)
    assert mask.meta["val"].shape[2] == 1
    x = torch.randn(4, 9, 32)
    torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)


def test_what_is_left_to_torch() -> None:
    narrow = Attending(lambda q, k, v: nn.functional.scaled_dot_product_attention(q[..., :8], k[..., :8], v[..., :8]))
    program = trace(narrow.eval(), (torch.randn(2, 9, 32),)).eval()
    result = PassManager((LowerAttention(),)).run(program)
    assert not list(result.program.calls(attention))
    (reason,) = LowerAttention().run(program).coverage.left_out.values()
    assert "8 features a head" in reason


def test_text_reads_back() -> None:
    assert Recipe.of(["lower-attention"]).passes == (LowerAttention(),)
    assert Recipe.of(["lower-attention{bfloat16=true}"]).passes == (LowerAttention(True),)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_operator_is_told_whether_it_may_round(bfloat16: bool) -> None:
    program = trace(sdpa().eval(), (torch.randn(2, 9, 32),)).eval()
    (node,) = PassManager((LowerAttention(bfloat16),)).run(program).program.calls(attention)
    assert node.args[6] is bfloat16
