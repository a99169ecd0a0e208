"""The training session: schedule, exactness, and everything that must not go silently wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.ir.masking import masked_sites, sparsity_of
from tests.session_net import PIPELINE, Net, batch, masked, traced_net, train


@pytest.fixture(scope="module")
def traced() -> gp.Program:
    return traced_net()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_reaches_the_target_and_keeps_zeros_and_moments_zero(traced: gp.Program, make: type) -> None:
    program = masked(traced)
    optimizer = make(program.parameters(), lr=0.05, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    session = gp.training.Session(program, optimizer, total_steps=20)
    train(program, optimizer, range(20))
    assert session.step == 20
    assert session.done
    assert session.sparsity == pytest.approx(0.75, abs=1e-3)
    for site in masked_sites(program):
        gone = ~site.mask
        assert gone.any()
        assert (site.weight[gone] == 0).all()
        for value in optimizer.state[site.weight].values():
            if isinstance(value, Tensor) and value.shape == site.weight.shape:
                assert (value[gone] == 0).all()


def test_follows_the_cubic_schedule(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    for step in range(20):
        train(program, optimizer, range(step, step + 1))
        progress = min(1.0, (step - step % 2) / 11) if step < 11 else 1.0
        assert session.sparsity == pytest.approx(0.75 * (1 - (1 - progress) ** 3), abs=0.01), step


def test_gradient_accumulation_counts_optimizer_steps(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    for step in range(8):
        (program(batch(step)).square().mean() / 4).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    program.eval()
    program(batch(0))
    assert session.step == 2


def test_steps_that_a_gradient_scaler_skips_do_not_count(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, poison in enumerate((1.0, float("inf"), 1.0)):
        scaler.scale(program(batch(step)).square().mean() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert session.step == 2
    assert all(torch.isfinite(score).all() for score in session.state_dict()["rules"][0]["scores"].values())


def test_a_step_with_infinite_gradients_is_left_out_of_the_scores_and_counted(traced: gp.Program) -> None:
    program = masked(traced)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.0)
    session = gp.training.Session(program, optimizer, total_steps=20)
    (program(batch(0)).sum() * float("inf")).backward()
    optimizer.step()
    assert session.skipped == 1
    assert all(torch.isfinite(score).all() for score in session.state_dict()["rules"][0]["scores"].values())


def test_magnitude_needs_no_gradient(traced: gp.Program) -> None:
    program = masked(traced, PIPELINE.replace("frequency", "criterion=magnitude,frequency"))
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    session = gp.training.Session(program, optimizer, total_steps=20)
    train(program, optimizer, range(20))
    assert session.done
    assert session.state_dict()["rules"][0]["scores"] == {}


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2:4", "channelx1"])
@pytest.mark.parametrize("schedule", ["one-shot", "linear", "cubic", "exponential", "cosine"])
def test_every_pattern_scope_and_schedule_reaches_half(
    traced: gp.Program, pattern: str, scope: str, schedule: str
) -> None:
    text = f"insert-masks{{pattern={pattern},sparsity=0.5,scope={scope},schedule={schedule},frequency=3,cool_down=2}}"
    program = masked(traced, text)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    with gp.training.Session(program, optimizer, total_steps=12) as session:
        train(program, optimizer, range(12))
    assert session.sparsity == pytest.approx(0.5, abs=0.02)
    for site in masked_sites(program):
        assert site.pattern.holds(site.logical_mask)


def test_two_rules_are_driven_separately(traced: gp.Program) -> None:
    program = gp.transform(
        traced,
        [
            "insert-masks{select=first,pattern=2:4,sparsity=0.5,frequency=1,cool_down=2}",
            "insert-masks{select=second,pattern=4x1,sparsity=0.75,frequency=2,cool_down=2}",
        ],
    ).train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    gp_session = gp.training.Session(program, optimizer, total_steps=12)
    train(program, optimizer, range(12))
    assert gp_session.done
    reached = {site.name: sparsity_of([site]) for site in masked_sites(program)}
    assert reached == {"first.weight": pytest.approx(0.5), "second.weight": pytest.approx(0.75)}


def test_works_through_torch_compile_wrapping(traced: gp.Program) -> None:
    program = masked(traced)
    wrapped = torch.compile(program, backend="eager")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    session = gp.training.Session(wrapped, optimizer, total_steps=4)
    for step in range(4):
        wrapped(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.done


class TestRefusals:
    def test_no_masks(self, traced: gp.Program) -> None:
        with pytest.raises(gp.SparsityError, match=r"no masks .* no quantizers; run insert-masks or insert-fake-quant"):
            gp.training.Session(traced, torch.optim.SGD(traced.parameters(), lr=0.1), total_steps=5)

    def test_not_a_program(self) -> None:
        net = Net()
        with pytest.raises(gp.SparsityError, match="drives a Program, not Net"):
            gp.training.Session(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=5)

    def test_optimizer_of_the_source_model(self, traced: gp.Program) -> None:
        program = masked(traced)
        with pytest.raises(gp.SparsityError, match=r"does not hold first\.weight"):
            gp.training.Session(program, torch.optim.SGD(Net().parameters(), lr=0.1), total_steps=20)

    def test_loss_that_does_not_reach_a_site(self, traced: gp.Program) -> None:
        program = masked(traced)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        session = gp.training.Session(program, optimizer, total_steps=20)
        program.last.bias.square().sum().backward()
        with pytest.raises(gp.SparsityError, match=r"no gradient reached first\.weight"):
            optimizer.step()
        assert session.step == 0

    def test_ending_under_the_target(self, traced: gp.Program) -> None:
        program = masked(traced)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        short = gp.training.Session(program, optimizer, total_steps=20)
        with pytest.raises(gp.SparsityError, match="training ended at step 3 of 20"), short:
            train(program, optimizer, range(3))
        with pytest.raises(gp.SparsityError, match="has reached sparsity"):
            gp.transform(program, "fold-masks")

    def test_schedule_that_does_not_fit(self, traced: gp.Program) -> None:
        program = masked(traced, "insert-masks{sparsity=0.5,warm_up=10,cool_down=10}")
        with pytest.raises(gp.SparsityError, match="leave nothing of 5 steps"):
            gp.training.Session(program, torch.optim.SGD(program.parameters(), lr=0.1), total_steps=5)

    def test_state_of_another_run(self, traced: gp.Program) -> None:
        program = masked(traced)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        state = gp.training.Session(program, optimizer, total_steps=20).state_dict()
        with pytest.raises(gp.SparsityError, match="a run of 20 steps"):
            gp.training.Session(program, optimizer, total_steps=30).load_state_dict(state)
        other = masked(traced, PIPELINE.replace("frequency", "select=first,frequency"))
        session = gp.training.Session(other, torch.optim.SGD(other.parameters(), lr=0.1), total_steps=20)
        with pytest.raises(gp.SparsityError, match="masks of other sites"):
            session.load_state_dict(state)

    def test_session_that_was_dropped(self, traced: gp.Program) -> None:
        program = masked(traced)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
        gp.training.Session(program, optimizer, total_steps=20)
        with pytest.raises(gp.SparsityError, match="keep it in a variable"):
            train(program, optimizer, range(1))


class TestZerosStay:
    """A session skips the mask's product where it changes nothing; nothing may come of that but speed."""

    def trained(self, traced: gp.Program) -> tuple[gp.Program, torch.optim.Optimizer, gp.training.Session]:
        program = masked(traced)
        optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
        session = gp.training.Session(program, optimizer, total_steps=20)
        train(program, optimizer, range(20))
        return program, optimizer, session

    def test_an_edited_weight_is_masked_again(self, traced: gp.Program) -> None:
        program, _, _session = self.trained(traced)
        x = batch(0)
        before = program(x)
        with torch.no_grad():
            for site in masked_sites(program):
                site.weight.add_((~site.mask).float())
        assert torch.equal(program(x), before)

    def test_another_mask_takes_effect_at_once(self, traced: gp.Program) -> None:
        program, _, _session = self.trained(traced)
        site = masked_sites(program)[0]
        site.mask.zero_()
        assert torch.equal(program(torch.zeros(2, 16)), program(batch(0)[:2]))

    def test_gradients_are_those_of_the_operator(self, traced: gp.Program) -> None:
        program, _, _session = self.trained(traced)
        program.zero_grad()
        program(batch(1)).square().sum().backward()
        fast = {name: item.grad.clone() for name, item in program.named_parameters() if item.grad is not None}
        copied = copy.deepcopy(program)
        copied.zero_grad()
        copied(batch(1)).square().sum().backward()
        for name, item in copied.named_parameters():
            assert item.grad is None or torch.equal(item.grad, fast[name]), name

    def test_noise_on_the_gradients_does_not_wake_pruned_weights(self, traced: gp.Program) -> None:
        program = masked(traced)
        optimizer = torch.optim.SGD(program.parameters(), lr=0.05)
        session = gp.training.Session(program, optimizer, total_steps=20)
        for step in range(20):
            program(batch(step)).square().mean().backward()
            for parameter in program.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter))
            optimizer.step()
            optimizer.zero_grad()
        assert session.done
        assert all((site.weight[~site.mask] == 0).all() for site in masked_sites(program))

    def test_an_optimizer_that_mixes_entries_does_not_wake_pruned_weights(self, traced: gp.Program) -> None:
        class Mixing(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: object = None) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.add_(parameter.grad.mean(), alpha=-0.05)

        program = masked(traced)
        optimizer = Mixing(program.parameters(), lr=0.05)
        session = gp.training.Session(program, optimizer, total_steps=20)
        train(program, optimizer, range(20))
        assert session.done
        assert all((site.weight[~site.mask] == 0).all() for site in masked_sites(program))


@pytest.mark.parametrize("criterion", ["snip_momentum", "movement"])
def test_clipped_gradients(traced: gp.Program, criterion: str) -> None:
    program = masked(traced, f"{PIPELINE[:-1]},criterion={criterion}}}")
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1, momentum=0.9)
    session = gp.training.Session(program, optimizer, total_steps=20)
    for step in range(20):
        program(batch(step)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(program.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert session.done
    assert all((site.weight[~site.mask] == 0).all() for site in masked_sites(program))


def test_recomputed_blocks_train_to_the_same_masks() -> None:
    from tests.blocked import Stack

    found = []
    for blocks in ("", ",partition-blocks", ",partition-blocks{checkpoint=true}"):
        torch.manual_seed(0)
        program = gp.transform(gp.trace(Stack().train(), torch.randn(4, 8)), PIPELINE + blocks)
        optimizer = torch.optim.AdamW(program.parameters(), lr=0.05)
        session = gp.training.Session(program, optimizer, total_steps=20)
        for step in range(20):
            program(batch(step)[:, :8]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.done
        found.append(program.state_dict())
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
