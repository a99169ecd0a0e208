"""fold-conv-bn: batch normalization becomes part of the convolution before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.ir.verifier import verify
from graphprune.passes import FoldConvBn
from graphprune.pipeline.recipe import Recipe
from tests.models import ConvBn, example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]


def warmed(model: nn.Module, x: Tensor) -> Program:
    """A Program whose normalizations hold statistics of ``x`` and random scales and shifts."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for value in (*module.parameters(), *module.buffers()):
                if value.is_floating_point():
                    value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return trace(model, x, check=False).eval()


def norms(program: Program) -> int:
    return len(list(program.calls(torch.ops.aten.batch_norm.default)))


def assert_folds_exactly(program: Program, x: Tensor, count: int) -> None:
    before = answer(program, x)
    result = FoldConvBn().run(program)
    assert result.changed is (count > 0)
    assert result.stats["folded"] == count == len(result.coverage.matched)
    verify(program)
    torch.testing.assert_close(answer(program, x), before, rtol=1e-5, atol=1e-5)


def test_golden(golden: Golden) -> None:
    program = traced("conv_bn")
    golden("fold_conv_bn_before", str(program))
    golden("fold_conv_bn_after", str(run_passes(program, "fold-conv-bn,remove-dead")))


def test_numbers_and_the_bias_that_is_added() -> None:
    (x,) = example("conv_bn") or ()
    torch.manual_seed(0)
    program = warmed(ConvBn(), x)
    assert_folds_exactly(program, x, 2)
    assert norms(program) == 0
    assert isinstance(program.get_submodule("conv1").bias, nn.Parameter)


def test_train_mode_computes_as_eval_mode_afterwards() -> None:
    (x,) = example("conv_bn") or ()
    program = run_passes(warmed(ConvBn(), x), "fold-conv-bn")
    with torch.no_grad():
        assert torch.equal(program.train()(x), program.eval()(x))


def test_nothing_to_fold_and_running_twice() -> None:
    program = traced("mlp")
    text = str(program)
    assert not FoldConvBn().run(program).changed
    assert str(program) == text
    program = run_passes(traced("conv_bn"), "fold-conv-bn")
    text = str(program)
    assert not FoldConvBn().run(program).changed
    assert str(program) == text


def test_zeros_and_masks_stay() -> None:
    (x,) = example("conv_bn") or ()
    program = warmed(ConvBn(), x)
    run_passes(program, "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5}")
    mask = program.tensor("conv2.weight_mask").clone()
    assert_folds_exactly(program, x, 2)
    run_passes(program, "fold-masks")
    assert not bool(program.tensor("conv2.weight")[~mask].any())


class Block(nn.Module):
    """One convolution and its normalization, of any kind."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@settings(max_examples=12, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    affine=st.booleans(),
    kernel=st.sampled_from([1, 3]),
    eps=st.sampled_from([1e-5, 1e-3]),
    padding=st.sampled_from([0, "same"]),
)
def test_every_kind_of_convolution(
    groups: int, bias: bool, affine: bool, kernel: int, eps: float, padding: int | str
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, groups=groups, bias=bias, padding=padding)
    x = torch.randn(2, 4, 5, 5)
    assert_folds_exactly(warmed(Block(conv, nn.BatchNorm2d(8, eps=eps, affine=affine)), x), x, 1)


def test_one_dimension_and_double_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9)
    assert_folds_exactly(warmed(Block(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), x), x, 1)
    x = x.double()
    assert_folds_exactly(warmed(Block(nn.Conv1d(4, 6, 3).double(), nn.BatchNorm1d(6).double()), x), x, 1)


class RawWeights(nn.Module):
    """Two convolutions whose weights lie in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.down = nn.Parameter(torch.randn(2, 4, 1, 1))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(F.conv2d(F.relu(self.norm1(F.conv2d(x, self.up))), self.down))


def test_biases_of_two_weights_in_one_module_do_not_collide() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    assert_folds_exactly(warmed(RawWeights(), x), x, 2)


class Shared(nn.Module):
    """What cannot be folded, by ``case``."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        if case == "weight":
            self.other.weight = self.conv.weight
        if case == "bias":
            self.other.bias = self.conv.bias
        self.norm = nn.BatchNorm2d(3, track_running_stats=case != "statistics")

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "linear":
            return self.norm(F.relu(self.conv(x)))
        y = self.conv(x)
        out = self.norm(y)
        if self.case == "result":
            out = out + y
        return self.other(out)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("result", "the convolution's result is used elsewhere too"),
        ("weight", "the convolution's weight is used elsewhere too"),
        ("bias", "the convolution's bias is used elsewhere too"),
        ("statistics", "it has no running statistics"),
        ("linear", "aten.relu.default is no convolution"),
    ],
)
def test_what_cannot_be_folded_is_reported(case: str, reason: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    program = warmed(Shared(case), x)
    result = FoldConvBn().run(program)
    assert not result.changed
    assert set(result.coverage.left_out.values()) == {reason}
    assert norms(program) == 1


def test_a_transposed_convolution_is_reported() -> None:
    torch.manual_seed(0)
    program = warmed(Block(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), torch.randn(2, 3, 4, 4))
    (reason,) = FoldConvBn().run(program).coverage.left_out.values()
    assert "conv_transpose2d" in reason


def test_a_quantized_weight_is_reported() -> None:
    program = run_passes(traced("conv_bn"), "fold-conv-bn,insert-fake-quant")
    assert not FoldConvBn().run(program).changed


def test_text_reads_back() -> None:
    assert Recipe.of(str(FoldConvBn())).passes == (FoldConvBn(),)
