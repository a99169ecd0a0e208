"""The examples of docs/adapters.md run as they stand."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.ir.masking import masked_sites, sparsity_of
from tests.models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def examples() -> dict[str, str]:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        found[section.partition("\n")[0]] = code
    return found


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests left in accelerate's state is none of these examples' business."""
    accelerate = pytest.importorskip("accelerate", reason="the examples need the extra train")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    states = (accelerate.state.AcceleratorState, accelerate.state.PartialState, accelerate.state.GradientState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.fixture(scope="module")
def traced() -> gp.Program:
    """Traced once; the examples make a Program of their own of it."""
    return gp.trace(MODELS["bert_sequence"]().train(), labels=True)


@pytest.mark.parametrize("title", ["Your own loop", "Hugging Face's Trainer", "Lightning", "accelerate"])
def test_it_runs_and_prunes(title: str, traced: gp.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = examples()[title]
    for name in re.findall(r"^import (\w+)$", code, re.MULTILINE):
        pytest.importorskip(name, reason="an example needs it")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (48, 8), generator=generator)
    dataset = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    batches = [
        {name: torch.stack([row[name] for row in dataset[i : i + 4]]) for name in dataset[0]} for i in range(0, 48, 4)
    ]
    scope: dict[str, Any] = {"model": traced, "batches": batches, "dataset": dataset, "__name__": "example"}
    exec(compile(code, f"docs/adapters.md, {title}", "exec"), scope)
    program = scope["program"]
    assert isinstance(program, gp.Program)
    sites = masked_sites(program)
    assert sparsity_of(sites) == pytest.approx(0.8, abs=0.02)
    assert all((site.weight[~site.mask] == 0).all() for site in sites)
    if "tensorboard" in code:
        assert any(path.name.startswith("events.out") for path in tmp_path.rglob("*"))
