"""The gradient sampler: right gradients, nothing disturbed, and a position that can be resumed."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from graphprune.errors import SparsityError
from graphprune.ir.choosing import update_masks
from graphprune.ir.masking import masked_sites
from graphprune.passes.insert_masks import InsertMasks
from graphprune.sparsity import to_logical
from graphprune.training.randomness import random_state
from graphprune.training.sampler import GradientSampler
from tests.traced import answer, inputs_of, pair, run_passes, traced


def labelled(count: int, shape: tuple[int, ...] = (16,), batch: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(batch, *shape, generator=generator), torch.randint(0, 4, (batch,), generator=generator))
        for _ in range(count)
    ]


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def gradients(sampler, program, count):
    return [[item.grad.clone() for item in program.parameters()] for _ in sampler.sample(program, count)]


def numbers(state):
    return torch.cat(
        [state["torch"].double(), state["numpy"]["key"].double(), torch.tensor(state["python"][1]).double()]
    )


def test_gradients_are_those_of_single_batches_in_eval_mode():
    model, program = pair("mlp")
    batches = labelled(3)
    program.train()
    with torch.no_grad():  # as in an optimizer's hook
        have = gradients(GradientSampler(batches, cross_entropy), program, 4)
    model.eval()
    for batch, grads in zip([*batches, batches[0]], have, strict=True):
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("leave", ["finish", "break", "raise"])
def test_nothing_is_disturbed(training, leave):
    program = run_passes(traced("conv_bn"), "insert-masks{sparsity=0.5,pattern=1x1},insert-fake-quant")
    batches = labelled(3, (3, 8, 8))
    program.train()
    F.cross_entropy(program(batches[0][0]), batches[0][1]).backward()
    program.train(training)
    parameters = list(program.parameters())
    parameters[1].grad = None
    grads = [item.grad for item in parameters]
    values = [None if grad is None else grad.clone() for grad in grads]
    state, rng = copy.deepcopy(program.state_dict()), numbers(random_state())

    def shuffled():
        order = np.random.permutation(3)
        random.random()
        torch.rand(1)
        return (batches[place] for place in order)

    def use():
        for number, _ in enumerate(GradientSampler(shuffled, cross_entropy).sample(program, 5)):
            assert all(item.grad is not before for item, before in zip(parameters, grads, strict=True))
            assert program.training == program.observing == training
            torch.testing.assert_close(numbers(random_state()), rng, rtol=0, atol=0)
            if number == 1 and leave == "break":
                break
            if number == 1 and leave == "raise":
                raise ValueError("the caller failed")

    if leave == "raise":
        with pytest.raises(ValueError, match="the caller failed"):
            use()
    else:
        use()
    assert program.training == program.observing == training
    for parameter, grad, value in zip(parameters, grads, values, strict=True):
        assert parameter.grad is grad
        if value is not None:
            torch.testing.assert_close(grad, value, rtol=0, atol=0)
    for name, value in program.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    torch.testing.assert_close(numbers(random_state()), rng, rtol=0, atol=0)


def loader() -> DataLoader:
    data = labelled(7, batch=1)
    return DataLoader(
        TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])), batch_size=2, shuffle=True
    )


@pytest.mark.parametrize("before", [0, 1, 4, 6, 9])
def test_resuming_draws_what_an_unbroken_run_draws(before):
    program = traced("mlp")
    torch.manual_seed(1)
    unbroken = GradientSampler(loader(), cross_entropy)
    gradients(unbroken, program, before)
    state = unbroken.state_dict()
    want = gradients(unbroken, program, 6)
    torch.manual_seed(2)  # whatever the process did before
    resumed = GradientSampler(loader(), cross_entropy, seed=5)
    resumed.load_state_dict(state)
    have = gradients(resumed, program, 6)
    assert resumed.state_dict() == unbroken.state_dict()
    for first, second in zip(itertools.chain(*want), itertools.chain(*have), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_every_pass_and_seed_shuffles_anew():
    program = traced("mlp")
    sampler = GradientSampler(loader(), cross_entropy)
    first, second = gradients(sampler, program, 4), gradients(sampler, program, 4)
    other = gradients(GradientSampler(loader(), cross_entropy, seed=1), program, 4)
    assert sampler.passes == 1
    assert sampler.drawn == 4
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_samples_that_are_not_finite_are_left_out():
    program = traced("mlp")
    good = labelled(2)
    bad = (torch.full((2, 16), float("nan")), good[0][1])
    sampler = GradientSampler([good[0], bad, good[1]], cross_entropy)
    have = gradients(sampler, program, 3)
    assert sampler.skipped == 1
    assert sampler.drawn == 1
    assert all(bool(grad.isfinite().all()) for grads in have for grad in grads)
    with pytest.raises(SparsityError, match="2 of the batches"):
        gradients(GradientSampler([bad], cross_entropy), program, 2)
    assert all(item.grad is None for item in program.parameters())


def test_hugging_face_batches_bring_their_loss():
    model, program = pair("bert_sequence", labels=True)
    inputs = {**inputs_of("bert_sequence", model), "labels": torch.tensor([0, 1, 1])}
    sampler = GradientSampler([inputs])
    for _ in sampler.sample(program, 1):
        model(**inputs).loss.backward()
        for (name, one), other in zip(program.named_parameters(), model.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    extra = {**inputs, "weight": torch.tensor(2.0)}
    weighted = GradientSampler([extra], lambda output, batch: output["loss"] * batch["weight"])
    for _ in weighted.sample(program, 1):
        head = next(item for name, item in program.named_parameters() if name == "classifier.bias")
        torch.testing.assert_close(head.grad, 2 * model.classifier.bias.grad, rtol=1e-4, atol=1e-6)


def wave(x):
    return torch.tanh(x @ torch.randn(16, 4, generator=torch.Generator().manual_seed(4)) / 2)


def pruned_loss(program, criterion, sampler, count):
    """The loss after masking half of the weights in ``count`` steps, each with samples of its own."""
    program = InsertMasks(pattern="1x1", sparsity=0.5, criterion=criterion).run(copy.deepcopy(program)).program
    sites = masked_sites(program)
    for step in range(count):
        stored = {
            site.name: site.criterion.initial(site.pattern, site.shape, device="cpu", name=site.name) for site in sites
        }
        for _ in sampler.sample(program, 128 if sites[0].criterion.needs_samples else 0):
            for site in sites:
                grad = to_logical(site.weight.grad, site.decision.layout)
                site.criterion.accumulate(stored[site.name], site.logical_weight, grad, site.pattern)
        update_masks(sites, 0.5 * (step + 1) / count, stored)
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))
    return float(F.mse_loss(answer(program, x), wave(x)))


def test_obs_with_samples_prunes_a_trained_network_better_than_magnitude():
    program = traced("mlp").train()
    optimizer = torch.optim.Adam(program.parameters(), lr=1e-2)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 250 else 1e-3
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        F.mse_loss(program(x), wave(x)).backward()
        optimizer.step()
    sampler = GradientSampler(
        lambda: ((torch.randn(1, 16),) for _ in itertools.count()),
        lambda output, batch: F.mse_loss(output, wave(batch[0])),
    )
    magnitude = pruned_loss(program, "magnitude", sampler, 1)
    once, repeated = (pruned_loss(program, "obs(samples=128,block=32)", sampler, count) for count in (1, 4))
    assert repeated < once < 0.5 * magnitude


def test_refusals():
    program = traced("mlp")
    (batch,) = labelled(1)
    with pytest.raises(SparsityError, match="no batches for gradient samples"):
        gradients(GradientSampler([], cross_entropy), program, 1)
    with pytest.raises(SparsityError, match="not an iterator that is exhausted"):
        gradients(GradientSampler(iter([batch]), cross_entropy), program, 2)
    with pytest.raises(SparsityError, match="the output's loss is NoneType"):
        gradients(GradientSampler([batch[0]]), program, 1)
    with pytest.raises(SparsityError, match=r"returned a tensor of shape \(2, 4\)"):
        gradients(GradientSampler([batch], lambda output, _: output), program, 1)
    with pytest.raises(SparsityError, match="depends on no trainable parameter"):
        gradients(GradientSampler([batch], lambda output, _: output.detach().sum()), program, 1)
    short = GradientSampler([batch], cross_entropy)
    short.load_state_dict({"passes": 0, "drawn": 3, "skipped": 0, "seed": 0})
    with pytest.raises(SparsityError, match="resume with the same data"):
        gradients(short, program, 1)
