"""Hard-concrete gates in a Program: operators, insertion, training, folding, and what a Program can do with them."""

from __future__ import annotations

import copy

import pytest
import torch

from graphprune.errors import SparsityError
from graphprune.ir.gate_operators import bound_pattern, gate, noise
from graphprune.ir.gates import fold_gates, gated_sites, insert_gates
from graphprune.ir.masking import masked_sites
from graphprune.ir.verifier import verify
from graphprune.sparsity import Layout, from_logical, hard_concrete, logical_shape, parse_pattern
from tests.traced import answer, run_passes, traced

CASES = [
    ("unstructured", "out_in", (6, 8), 1),
    ("4x1", "out_in", (6, 7), 1),
    ("2:4", "in_out", (8, 6), 1),
    ("channelx1", "in_out", (8, 6), 1),
    ("1xchannel", "conv", (4, 3, 2, 2), 1),
    ("channelx2", "conv", (4, 3, 2, 2), 2),
    ("3x2", "conv", (4, 3, 2, 2), 1),
]


def program_with_gates(name="mlp", options="pattern=4x1,sparsity=0.5,criterion=magnitude", **more):
    program = run_passes(traced(name), f"insert-masks{{{options}}}")
    insert_gates(program, masked_sites(program), **more)
    verify(program)
    return program


def reference(weight, log_alpha, drawn, training, pattern, layout, groups):
    """Differentiable, from the formulas."""
    bound = bound_pattern(pattern, layout, groups, tuple(weight.shape))
    values = hard_concrete.sample(log_alpha, drawn) if training else hard_concrete.deterministic(log_alpha)
    logical = logical_shape(tuple(weight.shape), Layout(layout))
    return weight * from_logical(bound.spread(values, logical), Layout(layout), tuple(weight.shape))


@pytest.mark.parametrize(("text", "layout", "shape", "groups"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_operator_equals_the_formulas(text, layout, shape, groups, training):
    pattern = bound_pattern(text, layout, groups, shape)
    units = pattern.score_shape(logical_shape(shape, Layout(layout)))
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    log_alpha = torch.randn(units, dtype=torch.float64, requires_grad=True)
    given = (weight, log_alpha, torch.rand(units, dtype=torch.float64), training, text, layout, groups)
    torch.testing.assert_close(gate(*given), reference(*given), rtol=0, atol=0)
    upstream = torch.randn(shape, dtype=torch.float64)
    want = torch.autograd.grad((reference(*given) * upstream).sum(), (weight, log_alpha))
    have = torch.autograd.grad((gate(*given) * upstream).sum(), (weight, log_alpha))
    torch.testing.assert_close(have, want)
    torch.library.opcheck(gate, given, raise_exception=True)


def test_noise_draws_in_train_mode_only():
    like = torch.empty(5)
    state = torch.get_rng_state()
    assert bool((noise(like, False) == 0.5).all())
    assert torch.equal(torch.get_rng_state(), state)
    drawn = noise(like, True)
    assert not torch.equal(drawn, noise(like, True))
    assert bool(((drawn >= 0) & (drawn < 1)).all())


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "shared_weight"])
def test_insertion_and_folding_keep_eval_outputs_bitwise(name):
    from tests.models import example

    (x,) = example(name)
    plain = run_passes(
        traced(name), "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,ragged=pad}"
    )
    program = copy.deepcopy(plain)
    count = insert_gates(program, masked_sites(program))
    verify(program)
    assert count == len(masked_sites(program)) == len(gated_sites(program)) > 0
    torch.testing.assert_close(answer(program, x), answer(plain, x), rtol=0, atol=0)
    with torch.no_grad():
        for site in gated_sites(program):
            site.log_alpha.normal_()
    before = answer(program, x)
    assert not torch.equal(before, answer(plain, x))
    assert fold_gates(program) == count
    verify(program)
    torch.testing.assert_close(answer(program, x), before, rtol=0, atol=0)
    assert str(program) == str(plain)
    assert [key for key, _ in program.named_parameters()] == [key for key, _ in plain.named_parameters()]
    assert fold_gates(program) == 0


def test_modes_copies_and_state():
    x = torch.randn(4, 16)
    program = program_with_gates(log_alpha=0.5)
    names = [name for name, _ in program.named_parameters() if name.endswith("_log_alpha")]
    assert names == ["first.weight_log_alpha", "second.weight_log_alpha"]
    assert "%first.weight_log_alpha: f32[8,16] = param" in str(program)
    program.train()
    assert not torch.equal(program(x), program(x))
    program.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(program(x), program(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    clone = copy.deepcopy(program)
    assert clone.get_parameter(names[0]) is not program.get_parameter(names[0])
    with torch.no_grad():
        clone.get_parameter(names[0]).sub_(1)
    assert not torch.equal(clone(x), program(x))
    clone.load_state_dict(program.state_dict())
    torch.testing.assert_close(clone(x), program(x), rtol=0, atol=0)
    with torch.no_grad():
        want = program(x)
        exported = torch.export.export(program, (x,), strict=False).module()
        torch.testing.assert_close(exported(x)[0], want)


def test_the_penalty_closes_gates_that_the_loss_does_not_hold_open():
    program = program_with_gates(options="pattern=1xchannel,sparsity=0.5,criterion=magnitude").train()
    for site in gated_sites(program):
        value = site.penalty()
        (gradient,) = torch.autograd.grad(value, site.log_alpha)
        torch.testing.assert_close(site.penalty_gradient(), gradient)
        assert 0.95 * site.weight.numel() < float(value.detach()) < site.weight.numel()
    optimizer = torch.optim.Adam(program.parameters(), lr=0.05)
    x = torch.randn(64, 16)
    target = x[:, :4] * 2
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(program(x), target).backward()
        for site in gated_sites(program):
            site.log_alpha.grad.add_(site.penalty_gradient(), alpha=1e-3)
        optimizer.step()
    closed = [
        float((hard_concrete.deterministic(site.log_alpha.detach()) == 0).float().mean())
        for site in gated_sites(program)
    ]
    assert max(closed) > 0.2
    assert min(closed) < 0.95
    assert float(torch.nn.functional.mse_loss(answer(program, x), target)) < 1.0  # 4 without a network


def test_gradients_of_masked_units_are_zero():
    program = program_with_gates(options="pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot").train()
    program(torch.randn(8, 16)).square().sum().backward()
    for masked, gated in zip(masked_sites(program), gated_sites(program), strict=True):
        pruned = ~(masked.pattern.reduce(masked.logical_mask.float()) > 0)
        assert bool(pruned.any())
        assert not bool(gated.log_alpha.grad[pruned].any())
        assert bool(gated.log_alpha.grad[~pruned].any())


def test_refusals():
    program = program_with_gates()
    with pytest.raises(SparsityError, match="has a gate already"):
        insert_gates(program, masked_sites(program))
    assert parse_pattern("4x1").score_shape((32, 16)) == tuple(gated_sites(program)[0].log_alpha.shape)
