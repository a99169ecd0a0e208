"""A session inside Lightning: automatic and manual optimization, accumulation, resuming, several optimizers, refusals."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir.masking import masked_sites, sparsity_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
lightning = pytest.importorskip("lightning.pytorch", reason="LightningSession needs Lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

PIPELINE = "insert-masks{pattern=4x1,sparsity=0.75,frequency=1,warm_up=0,cool_down=0.25}"


def net() -> gp.Program:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)]
    model = nn.Sequential(*layers).train()
    return gp.transform(gp.trace(model, torch.randn(4, 16)), PIPELINE).train()


class Automatic(lightning.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.net = program
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, batch: Tensor) -> Tensor:
        (x,) = batch
        return nn.functional.cross_entropy(self.net(x) * self.scale, (x.sum(1) > 0).long())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Automatic):
    def __init__(self, program: nn.Module) -> None:
        super().__init__(program)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.scale], lr=0.1), torch.optim.AdamW(self.net.parameters(), lr=0.01)]


def fit(
    module: Any, session: gp.training.LightningSession, folder: Path, resume: Path | None = None, **options: Any
) -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(32, 16, generator=torch.Generator().manual_seed(1)))
    settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": False, "logger": False} | options
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=[session, *settings.pop("callbacks", [])], **settings,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def reached(program: gp.Program) -> bool:
    sites = masked_sites(program)
    exact = all((site.weight[~site.mask] == 0).all() for site in sites)
    return exact and sparsity_of(sites) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("kind", [Automatic, Manual, TwoOptimizers])
def test_masks_reach_their_sparsity(kind: type[Any], tmp_path: Path) -> None:
    program = net()
    session = gp.training.LightningSession(log=tmp_path / "session.jsonl")
    trainer = fit(kind(program), session, tmp_path)
    assert reached(program)
    assert session.session is not None
    assert session.session.step == 24
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(session.session.sparsity)
    assert len((tmp_path / "session.jsonl").read_text().splitlines()) == 24
    gp.training.Session(
        program, torch.optim.SGD(program.parameters(), lr=0.1), total_steps=9
    ).close()  # the first is closed


def test_accumulation_and_epochs(tmp_path: Path) -> None:
    program = net()
    session = gp.training.LightningSession()
    fit(Automatic(program), session, tmp_path, accumulate_grad_batches=3, precision="bf16-mixed", gradient_clip_val=1.0)
    assert session.session is not None
    assert session.session.total_steps == session.session.step == 9  # 3 epochs of 8 batches
    assert reached(program)


def test_automatic_optimization_is_the_plain_loop(tmp_path: Path) -> None:
    """Lightning makes gradients in a closure, inside the optimizer's step; scores must see those and no older ones."""
    data = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    program, plain = net().eval(), net().eval()
    module = Automatic(program)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, callbacks=[gp.training.LightningSession()],
    )  # fmt: skip
    trainer.fit(module, loader)
    other = Automatic(plain)
    optimizer = other.configure_optimizers()
    session = gp.training.Session(plain, optimizer, total_steps=16)
    for step in range(16):
        loss = other.loss((data[(step % 8) * 4 : (step % 8) * 4 + 4],))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert session.done
    for name, value in program.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_resumed_is_unbroken_to_the_bit(tmp_path: Path) -> None:
    program = net()
    keep = lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    fit(Automatic(program), gp.training.LightningSession(), tmp_path, enable_checkpointing=True, callbacks=[keep])
    other = net()
    torch.manual_seed(99)
    session = gp.training.LightningSession()
    fit(Automatic(other), session, tmp_path, resume=tmp_path / "epoch=0.ckpt")
    assert session.session is not None
    assert session.session.step == 24
    for name, value in program.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(16, 2), {}, "Automatic holds no Program"),
        (
            lambda: nn.ModuleList([net(), net()]),
            {},
            r"several Programs \(net.0, net.1\); name the one .*LightningSession\('net.0'\)",
        ),
        (net, {"attribute": "nett"}, "Automatic has no module 'nett'"),
    ],
)
def test_programs_that_are_not_found(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        fit(Automatic(make()), gp.training.LightningSession(**options), tmp_path)


def test_a_run_without_end_and_one_with_a_given_length(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="does not know how many steps"):
        fit(Automatic(net()), gp.training.LightningSession(), tmp_path, max_epochs=-1)
    program = net()
    fit(Manual(program), gp.training.LightningSession("net", total_steps=8), tmp_path, max_epochs=1)
    assert reached(program)


def test_a_checkpoint_without_a_session_is_refused(tmp_path: Path) -> None:
    module = Automatic(net())
    trainer = fit(module, gp.training.LightningSession(), tmp_path)
    trainer.callbacks = [item for item in trainer.callbacks if not isinstance(item, gp.training.LightningSession)]
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(gp.GraphPruneError, match="written without a LightningSession"):
        fit(Automatic(net()), gp.training.LightningSession(), tmp_path, resume=tmp_path / "bare.ckpt", max_epochs=5)


@pytest.mark.slow
def test_without_lightning_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = sys.modules['pytorch_lightning'] = None\n"
        "from graphprune.training import *\ntry: LightningSession()\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run: pip install lightning" in done.stdout


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for arguments in ([], launcher):
        command = [sys.executable, "-W", "ignore", *arguments, "-m", "tests.lightning_run", str(tmp_path)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=0, atol=1e-6)
    assert len((tmp_path / "2.jsonl").read_text().splitlines()) == 12
