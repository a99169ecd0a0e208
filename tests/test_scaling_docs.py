"""The loop of docs/scaling.md runs as it stands, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_sharded_loop_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "sharded.py").write_text(code, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, "sharded.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "sparsity 0.800\n"
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    masks = {name: value for name, value in state.items() if name.endswith("_mask")}
    assert masks
    for name, mask in masks.items():
        assert (state[name.removesuffix("_mask")][~mask] == 0).all()
