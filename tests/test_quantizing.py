"""Quantized Programs of every kind: schemes, operators, observers, modes, copies and files."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import VerifyError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.quantizing import observers, quantizers
from graphprune.ir.trace import trace
from graphprune.quant.affine import fake_quantize
from graphprune.quant.schemes import QuantDtype, Scheme, parse_scheme
from tests.models import MODELS, example, mlp
from tests.traced import answer, assert_same, inputs_of, pair, run, run_passes, traced

STATIC = "insert-observers,calibrate,insert-fake-quant,freeze-quant"


def quantized(name: str, plan: str, steps: str = STATIC) -> Program:
    """A statically quantized Program, calibrated with its example."""
    model, program = pair(name)
    return gp.transform(program, f"{plan},{steps}", data=[inputs_of(name, model)])


def error(name: str, plan: str, steps: str = STATIC) -> float:
    """Relative error of the quantized Program."""
    model, program = pair(name)
    inputs = inputs_of(name, model)
    want, have = run(program, inputs), run(quantized(name, plan, steps), inputs)
    assert isinstance(want, Tensor)
    assert isinstance(have, Tensor)
    return float((have - want).norm() / want.norm())


class Net(nn.Module):
    """Two convolutions, a residual sum with a ReLU behind it, and one value that three operators read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) + x) * self.third(x).sigmoid()
        return self.head(x.mean((2, 3)))


@functools.cache
def _net() -> Program:
    return trace(Net().eval(), torch.randn(2, 3, 6, 6))


def net(plan: str = "annotate-quant") -> Program:
    return gp.transform(_net(), f"{plan},{STATIC}", data=[torch.randn(4, 3, 6, 6)])


# -- schemes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plan", "most"),
    [
        ("mlp", "annotate-quant{weights=int4:symmetric:channel:group8}", 0.2),
        ("mlp", "annotate-quant{weights=uint4:affine:channel:group8,activations=none}", 0.2),
        ("gpt2_conv1d", "annotate-quant{weights=int4:affine:channel:group16,activations=none}", 0.2),
        ("mlp", "annotate-quant{weights=int4:symmetric:channel:group8,weight_observer=mse,activations=none}", 0.2),
        ("mlp", "annotate-quant{weights=int4:symmetric:channel,activations=none}", 0.3),
        ("mlp", "annotate-quant{activations=none}", 0.02),
        ("mlp", "annotate-quant{weights=none}", 0.02),
        ("mlp", "annotate-quant{weights=int8:symmetric:tensor}", 0.05),
        ("mlp", "annotate-quant{weights=int8:affine:channel}", 0.05),
        ("mlp", "annotate-quant{reduce_range=true}", 0.05),
        ("mlp", "annotate-quant{activations=int8:symmetric:tensor}", 0.05),
        ("mlp", "annotate-quant{preset=tensorrt}", 0.05),
        ("grouped_conv", "annotate-quant", 0.05),
        ("conv_bn", "fold-conv-bn,annotate-quant", 0.05),
        ("tied_embedding", "annotate-quant", 0.05),
        ("attention", "annotate-quant{preset=ipex}", 0.05),
    ],
)
def test_static_quantization_is_close_and_on_the_grid(name: str, plan: str, most: float) -> None:
    assert 0 < error(name, plan) < most
    program = quantized(name, plan)
    for node, decision in quantizers(program):
        if decision.weight:
            weight = program.tensor(decision.prefix).detach()
            scale, zero_point = (program.tensor(f"{decision.prefix}_{kind}") for kind in ("scale", "zero_point"))
            assert torch.equal(fake_quantize(weight, scale, zero_point, parse_scheme(decision.scheme)), weight)
            assert ops.fake_quantize(weight, scale, zero_point, *node.args[3:]).equal(weight)
    assert not list(observers(program))


def test_groups_have_scales_of_their_own_in_either_layout() -> None:
    program = quantized("gpt2_conv1d", "annotate-quant{weights=int4:affine:channel:group16,activations=none}")
    assert program.tensor("up.weight").shape == (16, 32)  # stored [in, out]
    assert program.tensor("up.weight_scale").shape == (1, 32)
    assert program.tensor("down.weight_scale").shape == (2, 16)
    assert program.tensor("head.weight_scale").shape == (4, 1)
    assert {str(node.args[5:]) for node, _ in quantizers(program)} == {"(1, 16)", "(0, 16)"}


def test_finer_groups_lose_less() -> None:
    weight = traced("mlp").tensor("second.weight").detach()
    plans = [f"annotate-quant{{weights=int4:symmetric:channel{group},activations=none}}" for group in ("", ":group4")]
    coarse, fine = (float((quantized("mlp", plan).tensor("second.weight").detach() - weight).norm()) for plan in plans)
    assert fine < 0.9 * coarse


# -- operators --------------------------------------------------------------------------------------------------------


def test_a_result_is_quantized_behind_its_relu() -> None:
    program = net()
    found = {decision.prefix: node for node, decision in quantizers(program)}
    relu = found["first.output"].args[0]
    assert relu.target is torch.ops.aten.relu.default  # type: ignore[union-attr]
    sums = next(iter(program.calls(torch.ops.aten.add.Tensor)))
    (behind,) = sums.users
    (quantizer,) = behind.users
    assert behind.target is torch.ops.aten.relu.default
    assert quantizer.target is ops.fake_quantize


def test_a_value_of_several_readers_has_one_quantizer() -> None:
    program = net()
    found = {decision.prefix: node for node, decision in quantizers(program)}
    assert len(found["first.output"].users) == 3  # two convolutions and the sum
    assert not {"second.input", "third.input"} & set(found)
    values = [node.args[0] for node in found.values()]
    assert len(values) == len(set(values))
    sums = next(iter(program.calls(torch.ops.aten.add.Tensor)))
    assert all(item.target is ops.fake_quantize for item in sums.all_input_nodes)


def test_two_schemes_of_one_value_are_two_quantizers() -> None:
    program = net('annotate-quant{rules=["name third: activations=int8:symmetric:tensor"]}')
    found = {decision.prefix: (node, decision) for node, decision in quantizers(program)}
    first, other = found["first.output"], found["third.input"]
    assert first[0].args[0] is other[0].args[0]
    assert {first[1].scheme, other[1].scheme} == {"uint8:affine:tensor", "int8:symmetric:tensor"}
    assert [user.target for user in other[0].users] == [torch.ops.aten.conv2d.default]


def test_inputs_only() -> None:
    found = {decision.prefix for _, decision in quantizers(net("annotate-quant{outputs=false}"))}
    assert not [name for name in found if name.endswith(".output")]


def test_embeddings_are_quantized_by_row_and_tied_weights_once() -> None:
    program = quantized("tied_embedding", "annotate-quant")
    weights = [node for node, decision in quantizers(program) if decision.prefix == "embedding.weight"]
    assert len(weights) == 1
    assert {user.target for user in weights[0].users} == {
        torch.ops.aten.embedding.default,
        torch.ops.aten.linear.default,
    }
    assert program.tensor("embedding.weight_scale").shape == (32,)


class Products(nn.Module):
    """Attention that spells its products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2)) / 8**0.5
        return torch.matmul(scores.softmax(-1), self.value(x))


def test_products_of_attention() -> None:
    x = torch.randn(2, 5, 8)
    plain = trace(Products().eval(), x)
    program = gp.transform(plain, f"annotate-quant{{ops=[linear,matmul]}},{STATIC}", data=[x])
    products = list(program.calls(torch.ops.aten.matmul.default))
    assert len(products) == 2
    assert all(item.target is ops.fake_quantize for node in products for item in node.all_input_nodes)
    assert float((answer(program, x) - answer(plain, x)).norm() / answer(plain, x).norm()) < 0.05
    left = gp.transform(plain, f"annotate-quant,{STATIC}", data=[x])
    assert not [node for node in left.calls(torch.ops.aten.matmul.default) if node.args[0].target is ops.fake_quantize]  # type: ignore[union-attr]


def test_dropout_and_reshapes_between_do_not_hide_a_residual_sum() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.conv(x), 0.1, self.training)

    program = run_passes(trace(Dropped().eval(), torch.randn(2, 2, 3)), "annotate-quant")
    assert "result@" in str(next(iter(program.calls(torch.ops.aten.add.Tensor))).meta["graphprune"])


# -- the operator -----------------------------------------------------------------------------------------------------

SCHEMES = [
    Scheme(QuantDtype.INT8, True, 0), Scheme(QuantDtype.INT8, True), Scheme(QuantDtype.UINT8, False),
    Scheme(QuantDtype.INT4, True, 0, 4), Scheme(QuantDtype.UINT4, False, 1, 4), Scheme(QuantDtype.INT8, False, 1, reduced=True),
]  # fmt: skip


@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_the_operator_is_the_reference_bit_by_bit_with_and_without_gradients(
    scheme: Scheme, seed: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = scheme.qparams_shape((8, 12))
    scale = 10.0**exponent * (torch.rand(shape, generator=generator) + 0.1)
    zero_point = torch.zeros(shape, dtype=torch.int32)
    if not scheme.symmetric:
        zero_point = torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator, dtype=torch.int32)
    x = 10.0**exponent * 20 * torch.randn(8, 12, generator=generator)
    arguments = (scheme.qmin, scheme.qmax, -1 if scheme.axis is None else scheme.axis, scheme.group or 0)
    want = fake_quantize(x, scale, zero_point, scheme)
    assert torch.equal(ops.fake_quantize(x, scale, zero_point, *arguments), want)
    x.requires_grad_()
    have = ops.fake_quantize(x, scale, zero_point, *arguments)
    assert torch.equal(have, want)
    have.sum().backward()
    assert x.grad is not None
    inside = (x.detach() - want).abs() <= 0.5001 * scale.max()
    assert bool((x.grad[~inside] == 0).all())
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}


def test_two_forward_passes_before_one_backward() -> None:
    program, (x,) = run_passes(traced("mlp"), "insert-fake-quant").train(), example("mlp") or ()
    loss = program(x).square().mean() + program(3 * x).square().mean()  # the second pass moves the scales
    loss.backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in program.parameters())


def test_what_comes_behind_may_work_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu_(self.first(x))
            z = self.second(y)
            z += y
            return torch.relu_(z)

    torch.manual_seed(0)
    x = torch.randn(3, 2, 4)
    plain = trace(InPlace().eval(), x)
    program = run_passes(copy.deepcopy(plain), "insert-fake-quant{momentum=1.0}").train()
    assert "add_" in str(program)
    program(x).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in program.parameters())
    torch.testing.assert_close(answer(program, x), answer(plain, x), rtol=0.05, atol=0.02)


def test_huge_values_saturate_at_the_right_end() -> None:
    x = torch.tensor([-1e30, 1e30, float("inf")], requires_grad=True)
    scale, zero_point = torch.tensor(1e-8), torch.tensor(3, dtype=torch.int32)
    shown = ops.fake_quantize(x, scale, zero_point, 0, 255)
    assert torch.equal(shown, torch.tensor([-3.0, 252.0, 252.0]) * scale)


# -- modes, copies, files ---------------------------------------------------------------------------------------------


@functools.cache
def _trainable(name: str) -> Program:
    pipeline = "insert-fake-quant{momentum=0.5}" if name == "conv_bn" else "insert-fake-quant"
    return gp.transform(traced(name), pipeline)


def trainable(name: str = "mlp") -> Program:
    program = copy.deepcopy(_trainable(name)).train()
    program(*(example(name) or ()))
    return program


def test_frozen_observers_do_not_follow_train_mode() -> None:
    program, (x,) = trainable(), example("mlp") or ()
    program.freeze("observers")
    before = {name: value.clone() for name, value in program.named_buffers()}
    for mode in (True, False, True):
        program.train(mode)
        program(10 * x)
    assert all(torch.equal(value, before[name]) for name, value in program.named_buffers())
    weight = program.tensor("first.weight")
    with torch.no_grad():
        weight.mul_(2)
    program(x)
    assert torch.equal(program.tensor("first.weight_scale"), before["first.weight_scale"])


def test_frozen_statistics_do_not_follow_train_mode() -> None:
    program, (x,) = trainable("conv_bn"), example("conv_bn") or ()
    program.freeze("batch-norm")
    before = {name: value.clone() for name, value in program.named_buffers()}
    program.train()
    program(x + 1)
    for name in ("bn1.running_mean", "bn2.running_var", "bn1.num_batches_tracked"):
        assert torch.equal(program.tensor(name), before[name])
    assert not torch.equal(program.tensor("head.input_high"), before["head.input_high"])
    with torch.no_grad():
        assert torch.equal(program(x), program.eval()(x)) or not program.frozen >= {"observers"}


def test_freezing_something_else() -> None:
    with pytest.raises(VerifyError, match="nothing called 'observer' can be frozen; did you mean 'observers'"):
        trainable().freeze("observer")


@pytest.mark.parametrize("pipeline", ["insert-fake-quant", "insert-fake-quant,freeze-quant"])
def test_copies_are_independent(pipeline: str) -> None:
    program, (x,) = trainable(), example("mlp") or ()
    if "freeze" in pipeline:
        run_passes(program, "freeze-quant")
    program.freeze("observers", "batch-norm")
    clone = copy.deepcopy(program)
    assert clone.frozen == {"observers", "batch-norm"}
    assert str(clone) == str(program)
    want = answer(program, x)
    with torch.no_grad():
        for value in clone.buffers():
            value.zero_()
    assert torch.equal(answer(program, x), want)


@pytest.mark.parametrize("steps", ["", "freeze-quant"])
def test_save_and_load(tmp_path: Path, steps: str) -> None:
    x = (example("mlp") or ())[0]
    text = "insert-masks{sparsity=0.5,schedule=one-shot,criterion=magnitude},insert-fake-quant{freeze_observers=3}"
    program = gp.transform(MODELS["mlp"](), text, (x,), factory=f"{mlp.__module__}:mlp").train()
    program(x)
    program = gp.transform(program, steps) if steps else program
    program.freeze("observers")
    gp.save(program, tmp_path / "saved")
    again = gp.load(tmp_path / "saved")
    assert str(again) == str(program)
    assert again.frozen == {"observers"}
    assert again.training == program.training
    assert not again.observing
    assert torch.equal(answer(again, x), answer(program, x))


def test_a_saved_program_is_the_same_on_another_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    (x,) = example("mlp") or ()
    for number, text in enumerate(("insert-fake-quant", "dynamic-quant")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
        program = gp.transform(MODELS["mlp"](), text, (x,), factory=f"{mlp.__module__}:mlp")
        assert "int8:symmetric:channel:reduced" in str(program)
        gp.save(program, tmp_path / str(number))
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
        assert str(gp.load(tmp_path / str(number))) == str(program)


def test_real_models_in_train_and_eval_mode() -> None:
    model, program = pair("bert_sequence", labels=True)
    inputs = inputs_of("bert_sequence", model)
    program = gp.transform(program, "insert-fake-quant").train()
    program(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(value.grad is not None for name, value in program.named_parameters() if "position" not in name)
    assert_same(run(model.eval(), inputs), run(program.eval(), inputs), 0.1)
