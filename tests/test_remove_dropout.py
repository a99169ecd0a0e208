"""remove-dropout: nothing is left of it, and attention has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.artifact.samples import make_inputs
from graphprune.ir.trace import trace
from graphprune.passes import RemoveDropout
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS, example
from tests.traced import answer, assert_same, run, run_passes, traced

Golden = Callable[[str, str], None]
aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


class _Forms(nn.Module):
    """Dropout of single numbers, of features and of SELU's kind, and attention with a probability: [b, s, 8] to itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout1d(x, 0.3, self.training)
        x = nn.functional.alpha_dropout(x, 0.2, self.training)
        x = nn.functional.dropout(x, 0.1, self.training)
        probability = 0.4 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=probability)


def test_golden(golden: Golden) -> None:
    program = trace(_Forms().eval(), (torch.randn(2, 4, 8),))
    golden("remove_dropout_before", str(program))
    golden("remove_dropout_after", str(run_passes(program, "remove-dropout")))


@pytest.mark.parametrize("name", ["mlp", "bert_qa", "gpt2", "vit"])
def test_outputs_are_bitwise_equal(name: str) -> None:
    program = traced(name)
    (inputs, _) = make_inputs(program)
    before = run(program, inputs)
    result = RemoveDropout().run(program)
    assert result.changed
    assert result.stats["removed"] == len(result.coverage.matched) > 0
    assert_same(before, run(program, inputs), 0.0)
    assert not list(program.calls(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default))
    assert all(node.args[4] == 0.0 for node in program.calls(ATTENTION) if len(node.args) > 4)


def test_train_mode_computes_the_same_afterwards() -> None:
    program = traced("mlp")
    (x,) = example("mlp") or ()
    before = answer(program, x)
    run_passes(program, "remove-dropout")
    assert torch.equal(program.train()(x), before)


def test_other_options_of_attention_stay() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = 0.4 if self.training else 0.0
            return nn.functional.scaled_dot_product_attention(x, x, x, None, p, True, scale=0.25)

    program = trace(Causal().eval(), (torch.randn(2, 4, 8),))
    run_passes(program, "remove-dropout")
    (node,) = program.calls(ATTENTION)
    assert node.args[3:] == (None, 0.0, True)
    assert node.kwargs == {"scale": 0.25}


def test_nothing_to_remove() -> None:
    program = traced("residual")
    text = str(program)
    result = RemoveDropout().run(program)
    assert (result.changed, result.stats) == (False, {"removed": 0})
    assert str(program) == text


def test_twice_is_once() -> None:
    program = run_passes(traced("bert_qa"), "remove-dropout")
    text = str(program)
    assert not RemoveDropout().run(program).changed
    assert str(program) == text


def test_the_source_model_still_drops() -> None:
    model = MODELS["mlp"]()
    program = trace(model, example("mlp"))
    run_passes(program, "remove-dropout")
    (x,) = example("mlp") or ()
    assert not torch.equal(model.train()(x), model(x))


def test_text_reads_back() -> None:
    assert Recipe.of(str(RemoveDropout())).passes == (RemoveDropout(),)
