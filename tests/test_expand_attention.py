"""expand-attention: attention as two products with a softmax between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.quantizable import find_quantizable
from graphprune.ir.trace import trace
from graphprune.passes import ExpandAttention
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS
from tests.traced import assert_same, inputs_of, run, run_passes, tensors, traced

Golden = Callable[[str, str], None]
ATTENDING = ("attention", "bert_sequence", "distilbert_qa", "gpt2", "llama", "t5", "vit")


class Attend(nn.Module):
    """Attention alone."""

    def __init__(self, causal: bool = False, grouped: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.options = {"is_causal": causal, "enable_gqa": grouped, "scale": scale}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options)  # type: ignore[arg-type]


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def test_golden(golden: Golden) -> None:
    golden("expand_attention_before", str(traced("attention")))
    golden("expand_attention_after", str(run_passes(traced("attention"), "expand-attention")))


def test_nothing_to_do() -> None:
    program = traced("mlp")
    text = str(program)
    assert not ExpandAttention().run(program).changed
    assert str(program) == text


def test_running_twice_is_running_once() -> None:
    program = run_passes(traced("attention"), "expand-attention")
    text = str(program)
    assert not ExpandAttention().run(program).changed
    assert str(program) == text


@pytest.mark.parametrize("name", ATTENDING)
def test_outputs_are_equal_up_to_rounding(name: str) -> None:
    inputs = inputs_of(name, MODELS[name]())
    assert_same(run(traced(name), inputs), run(run_passes(traced(name), "expand-attention"), inputs), 1e-5)


def test_rows_that_may_see_nothing_give_zero_as_before() -> None:
    inputs = inputs_of("bert_sequence", MODELS["bert_sequence"]())
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert_same(
        run(traced("bert_sequence"), inputs), run(run_passes(traced("bert_sequence"), "expand-attention"), inputs)
    )


@settings(max_examples=15, deadline=None)
@given(
    causal=st.booleans(),
    kind=st.sampled_from(["none", "bool", "float"]),
    groups=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
    length=st.integers(1, 5),
)
def test_every_form_of_attention(causal: bool, kind: str, groups: int, scale: float | None, length: int) -> None:
    query, key, value = heads(2, 4, length, 8), heads(2, groups, length, 8), heads(2, groups, length, 8) * 2
    masks = {"none": None, "bool": heads(length, length) > 0, "float": heads(length, length)}
    mask = None if causal else masks[kind]
    given_inputs = (query, key, value) if mask is None else (query, key, value, mask)
    model = Attend(causal, groups != 4, scale)
    program = run_passes(trace(model, given_inputs, {}), "expand-attention")
    torch.testing.assert_close(program(*given_inputs), model(*given_inputs), rtol=1e-5, atol=1e-6)


def test_gradients_and_dropout_in_train_mode() -> None:
    program = run_passes(traced("bert_sequence"), "expand-attention").train()
    inputs = inputs_of("bert_sequence", MODELS["bert_sequence"]())
    first, second = (tensors(program(**inputs))[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(item.grad is not None for name, item in program.named_parameters() if ".query." in name)


def test_products_can_be_quantized_afterwards() -> None:
    program = run_passes(traced("bert_sequence"), "expand-attention")
    assert sum(item.kind == "matmul" for item in find_quantizable(program)) == 4
    text = "annotate-quant{ops=[matmul]},insert-fake-quant"
    quantized = run_passes(run_passes(traced("bert_sequence"), "expand-attention"), text)
    inputs = inputs_of("bert_sequence", MODELS["bert_sequence"]())
    quantized.train()
    for _ in range(2):
        quantized(**inputs)
    want, have = (tensors(run(item.eval(), inputs))[0] for item in (program, quantized))
    assert float((have - want).norm() / want.norm()) < 0.05
    assert not torch.equal(want, have)


def test_text_reads_back() -> None:
    assert Recipe.of("expand-attention").passes == (ExpandAttention(),)


def test_a_model_without_attention_is_left_as_it_is() -> None:
    program = gp.transform(MODELS["resnet"]().eval(), [])
    assert str(gp.transform(program, "expand-attention")) == str(program)
