"""Distillation on two processes gives the weights, masks and logs of one, and they make a teacher's cache together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for arguments in ([], launcher):
        command = [sys.executable, *arguments, "-m", "tests.distilled_run", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    both = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2)]
    assert one["computed"] == 48
    assert [item["computed"] for item in both] == [24, 24]
    for two in both:
        for kind in ("online", "cached"):
            for name, value in one[kind].items():
                if value.dtype == torch.bool:
                    assert torch.equal(value, two[kind][name]), name
                else:
                    torch.testing.assert_close(value, two[kind][name], rtol=1e-3, atol=1e-5, msg=name)
    for kind in ("online logs", "cached logs"):
        for entry, other in zip(one[kind], both[0][kind], strict=True):
            for name in ("loss", "task_loss", "distillation_loss"):
                assert entry[name] == pytest.approx(other[name], rel=1e-3), (kind, name)
