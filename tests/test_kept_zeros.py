"""``tools/kept_zeros.py``: zeros that later checkpoints kept, counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TOOL = Path(__file__).parents[1] / "tools" / "kept_zeros.py"
SPARSE = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 4.0, 5.0]])


def save(folder: Path, state: dict[str, Tensor]) -> None:
    folder.mkdir()
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *words], cwd=folder, capture_output=True, text=True, check=False)


def cells(output: str) -> list[str]:
    """Of the table's last row."""
    return [cell.strip() for cell in output.splitlines()[-2].split("│")[1:-1]]


def test_zeros_are_counted_also_under_the_name_of_a_base_model(tmp_path: Path) -> None:
    save(tmp_path / "start", {"encoder.weight": SPARSE, "dense.weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    save(tmp_path / "kept", {"bert.encoder.weight": SPARSE * torch.tensor([2.0, 2.0, 2.0, 0.0])})
    found = run(tmp_path, "start", "kept")
    assert found.returncode == 0, found.stderr
    assert "start: 1 pruned weights, 3 zeros" in found.stdout
    assert cells(found.stdout) == ["kept", "3", "0", "2"]


def test_a_lost_zero_is_a_failure(tmp_path: Path) -> None:
    save(tmp_path / "start", {"weight": SPARSE})
    save(tmp_path / "lost", {"weight": SPARSE + torch.eye(2, 4)})
    found = run(tmp_path, "start", "lost")
    assert found.returncode == 1
    assert cells(found.stdout) == ["lost", "2", "1", "0"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "start", {"weight": SPARSE})
    save(tmp_path / "dense", {"other": torch.ones(3, 3)})
    assert "has no weight like weight" in run(tmp_path, "start", "dense").stderr
    assert "lower --least" in run(tmp_path, "dense", "start").stderr
    assert "holds no model.safetensors" in run(tmp_path, "start", ".").stderr
