"""fuse-epilogues: activations and residuals move into the sparse linear layers before them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.ir.program import Program
from graphprune.ir.sparse_operators import LAYERS, read_argument
from graphprune.ir.trace import trace
from graphprune.passes import FuseEpilogues
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS
from tests.packed_programs import PACK, blocked, integers
from tests.traced import answer, assert_same, inputs_of, run, run_passes

Golden = Callable[[str, str], None]
aten = torch.ops.aten


class _Net(nn.Module):
    """A layer, and what a function makes of its result and its input: [b, 8] to [b, 8]."""

    def __init__(self, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(x), x)


def _packed(behind: Callable[[Tensor, Tensor], Tensor]) -> tuple[Program, Tensor, Tensor]:
    """A packed Program, an input and what comes out of the module."""
    model, x = _Net(behind).eval(), torch.randn(5, 8)
    with torch.no_grad():
        want = model(x)
    return run_passes(trace(model, (torch.randn(3, 8),)), PACK), x, want


def test_golden(golden: Golden) -> None:
    program = run_passes(blocked("residual"), PACK)
    golden("fuse_epilogues_before", str(program))
    golden("fuse_epilogues_after", str(run_passes(program, "fuse-epilogues")))


@pytest.mark.parametrize(
    ("name", "activations", "residuals"),
    [
        ("mlp", 2, 0),
        ("residual", 1, 1),
        ("shared_weight", 3, 0),
        ("attention", 1, 0),
        ("bert_qa", 2, 4),
        ("gpt2", 0, 0),
    ],
)
def test_outputs_are_equal(name: str, activations: int, residuals: int) -> None:
    program = run_passes(blocked(name), PACK)
    inputs = inputs_of(name, MODELS[name]())
    before = run(program, inputs)
    result = FuseEpilogues().run(program)
    assert result.stats == {"activations": activations, "residuals": residuals}
    assert result.changed is bool(activations or residuals)
    assert_same(before, run(program, inputs), 2e-6)


@pytest.mark.parametrize(("name", "way"), [("mlp", "static"), ("residual", "QAT")])
def test_layers_of_integers_fuse_too(name: str, way: str) -> None:
    program = run_passes(integers(name, way), PACK)
    inputs = inputs_of(name, MODELS[name]())
    before = run(program, inputs)
    assert FuseEpilogues().run(program).changed
    assert_same(before, run(program, inputs), 1e-2)  # a last place that differs may move a byte by one
    assert not list(program.calls(aten.relu.default, aten.gelu.default))


@pytest.mark.parametrize(
    ("behind", "activation", "residual"),
    [
        (lambda y, x: torch.relu(y), "relu", False),
        (lambda y, x: nn.functional.gelu(y), "gelu", False),
        (lambda y, x: nn.functional.gelu(y, approximate="tanh"), "gelu_tanh", False),
        (lambda y, x: y + x, "none", True),
        (lambda y, x: x + y, "none", True),
        (lambda y, x: nn.functional.gelu(y) + x, "gelu", True),
        (lambda y, x: y + torch.sin(x), "none", True),  # which is computed behind the layer
        (lambda y, x: torch.relu(y + x), "none", True),  # the sum comes first, and nothing fuses behind it
        (lambda y, x: y + x + x, "none", True),
        (lambda y, x: nn.functional.silu(y), "none", False),
        (lambda y, x: torch.relu(y) * y, "none", False),  # used twice
        (lambda y, x: y + y, "none", False),
        (lambda y, x: y + x[:1], "none", False),  # broadcast
        (lambda y, x: y + x[0], "none", False),
        (lambda y, x: y + 2.0, "none", False),
        (lambda y, x: torch.add(y, x, alpha=2), "none", False),
        (lambda y, x: y + x.double(), "none", False),
        (lambda y, x: y.reshape(-1), "none", False),
        (lambda y, x: y, "none", False),
    ],
)
def test_what_is_fused(behind: Callable[[Tensor, Tensor], Tensor], activation: str, residual: bool) -> None:
    program, x, want = _packed(behind)
    FuseEpilogues().run(program)
    (layer,) = program.calls(*LAYERS)
    assert read_argument(layer, "activation") == activation
    assert (read_argument(layer, "residual") is not None) is residual
    torch.testing.assert_close(answer(program, x), want, rtol=1e-5, atol=1e-5)


def test_the_sum_of_two_layers_joins_one_of_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.first(x)) + self.second(x)

    model, x = Two().eval(), torch.randn(70, 8)
    program = run_passes(trace(model, (torch.randn(3, 8),)), f"{PACK},fuse-epilogues")
    assert not list(program.calls(aten.add.Tensor, aten.relu.default))
    first, second = program.calls(*LAYERS)
    given = [read_argument(node, "residual") for node in (first, second)]
    assert sorted(item is None for item in given) == [False, True]
    with torch.no_grad():
        torch.testing.assert_close(answer(program, x), model(x), rtol=1e-5, atol=1e-5)


def test_results_that_are_in_panels_already_are_left() -> None:
    program = run_passes(blocked("mlp"), f"{PACK},fuse-epilogues,keep-panels")
    text = str(program)
    assert not FuseEpilogues().run(program).changed
    assert str(program) == text


def test_nothing_to_fuse() -> None:
    program = blocked("mlp")  # no sparse layer
    text = str(program)
    result = FuseEpilogues().run(program)
    assert (result.changed, result.stats) == (False, {"activations": 0, "residuals": 0})
    assert str(program) == text


def test_twice_is_once() -> None:
    program = run_passes(blocked("bert_qa"), f"{PACK},fuse-epilogues")
    text = str(program)
    assert not FuseEpilogues().run(program).changed
    assert str(program) == text


def test_text_reads_back() -> None:
    assert Recipe.of(str(FuseEpilogues())).passes == (FuseEpilogues(),)
