"""DistributedDataParallel and FSDP2 on two processes: all hold the masks of one process with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_run import CHOSEN

ROOT = Path(__file__).parents[1]


def _run(folder: Path, mode: str) -> None:
    module = ["-m", "tests.distributed_run", str(folder), mode]
    if mode != "single":
        launcher = ["--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
        module = ["-m", "torch.distributed.run", *launcher, *module]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *module], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    _run(folder, "single")
    return folder


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_hold_the_masks_of_one(single: Path, mode: str) -> None:
    _run(single, mode)
    for family in CHOSEN:
        want = torch.load(single / f"{family}-single-0.pt", weights_only=True)
        for rank in range(2):
            have = torch.load(single / f"{family}-{mode}-{rank}.pt", weights_only=True)
            masks = [name for name in want if name.endswith("_mask")]
            assert masks
            for name in want:
                if name in masks:
                    assert torch.equal(have[name], want[name]), (family, rank, name)
                    assert not have[name].all(), (family, name)
                    assert (have[name.removesuffix("_mask")][~have[name]] == 0).all(), (family, rank, name)
                else:
                    torch.testing.assert_close(have[name], want[name], rtol=1e-9, atol=1e-12)
