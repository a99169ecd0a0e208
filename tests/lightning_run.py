"""Train with Lightning in one process or several, each with its share of every batch.

``torchrun --nproc-per-node 2 -m tests.lightning_run FOLDER`` writes ``<processes>-<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

import graphprune as gp
from tests.test_lightning import Automatic, net


class Trained(Automatic):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


def main(folder: Path) -> None:
    """Train 12 steps of 8 examples, in an order that does not depend on the number of processes."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    data = torch.utils.data.TensorDataset(torch.randn(32, 16, generator=torch.Generator().manual_seed(1)))
    sampler = torch.utils.data.DistributedSampler(data, count, rank, shuffle=False)
    loader = torch.utils.data.DataLoader(data, batch_size=8 // count, sampler=sampler)
    program = net().eval()  # no dropout: processes draw other numbers than one
    session = gp.training.LightningSession(log=folder / f"{count}.jsonl")
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", devices=count, use_distributed_sampler=False, default_root_dir=folder,
        strategy=DDPStrategy(process_group_backend="gloo") if count > 1 else "auto",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False, callbacks=[session],
    )  # fmt: skip
    trainer.fit(Trained(program), loader)
    assert session.session is not None
    assert session.session.done
    torch.save(program.state_dict(), folder / f"{count}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
