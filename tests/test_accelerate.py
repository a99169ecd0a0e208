"""A plain loop with accelerate: accumulation, mixed precision, skipped steps, saving and resuming, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.ir.masking import masked_sites, sparsity_of

accelerate = pytest.importorskip("accelerate", reason="these loops use accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PIPELINE = "insert-masks{pattern=4x1,sparsity=0.75,frequency=1,warm_up=0,cool_down=0.25}"
STEPS = 12


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def net() -> gp.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)).train()
    return gp.transform(gp.trace(model, torch.randn(4, 16)), PIPELINE).train()


def prepared(program: gp.Program, size: int, **options: Any) -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    data = torch.utils.data.TensorDataset(torch.randn(96, 16, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(data, batch_size=size)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
    return accelerator, *accelerator.prepare(program, optimizer, loader)


def run(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def reached(program: gp.Program) -> bool:
    sites = masked_sites(program)
    exact = all((site.weight[~site.mask] == 0).all() for site in sites)
    return exact and sparsity_of(sites) == pytest.approx(0.75, abs=0.02)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    programs = []
    for size, accumulated in ((8, 1), (2, 4)):
        program = net()
        accelerator, model, optimizer, loader = prepared(program, size, gradient_accumulation_steps=accumulated)
        session = gp.training.Session(model, optimizer, total_steps=STEPS)
        run(accelerator, model, optimizer, loader)
        assert session.step == STEPS
        assert reached(program)
        programs.append(program)
        _reset()
    one, four = (program.state_dict() for program in programs)
    for name, value in one.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, four[name]), name
        else:
            torch.testing.assert_close(value, four[name], rtol=0, atol=1e-5)


def _reset() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_mixed_precision_and_what_comes_out(tmp_path: Path) -> None:
    program = net()
    accelerator, model, optimizer, loader = prepared(program, 8, mixed_precision="bf16")
    session = gp.training.Session(model, optimizer, total_steps=STEPS)
    run(accelerator, model, optimizer, loader)
    assert session.done
    assert reached(program)
    assert model(torch.randn(2, 16)).dtype == torch.float32
    whole = accelerator.unwrap_model(model)
    artifact = gp.export(whole, "reference", tmp_path / "out")
    assert gp.verify(artifact.folder).passed
    x = torch.randn(4, 16)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    dense.load_state_dict({name: value for name, value in program.state_dict().items() if not name.endswith("_mask")})
    folded = gp.transform(whole, "fold-masks").eval()
    torch.testing.assert_close(folded(x), dense(x), rtol=1e-6, atol=1e-6)  # in float32, not in bf16 any more


def test_skipped_steps_do_not_count() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    program = net()
    inner = torch.optim.AdamW(program.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    session = gp.training.Session(program, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        x = torch.randn(8, 16)
        loss = scaler.scale(nn.functional.cross_entropy(program(x), (x.sum(1) > 0).long()))
        (loss * (float("inf") if step % 4 == 3 else 1.0)).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (step % 4 == 3)
        optimizer.zero_grad()
    assert session.step == STEPS - 3
    assert session.skipped == 0


def test_saved_and_resumed_with_accelerate(tmp_path: Path) -> None:
    def begin(program: gp.Program) -> tuple[Any, ...]:
        accelerator, model, optimizer, loader = prepared(program, 8)
        session = gp.training.Session(model, optimizer, total_steps=2 * STEPS)
        accelerator.register_for_checkpointing(session)
        return session, accelerator, model, optimizer, loader

    program = net()
    session, *parts = begin(program)
    run(*parts)
    parts[0].save_state(str(tmp_path / "state"))
    run(*parts)
    assert session.done
    _reset()
    other = net()
    session, *parts = begin(other)
    parts[0].load_state(str(tmp_path / "state"))
    assert session.step == STEPS
    run(*parts)
    for name, value in program.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
