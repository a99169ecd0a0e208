"""The benchmarks run, on a BERT small enough for seconds; their numbers mean nothing here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
FAKE = """
import json, sys
print(json.dumps({ready!r}), flush=True)
for line in sys.stdin:
    print({noise!r}, file=sys.stderr)
    run = json.loads(line)["run"]
    if run == {fails!r}:
        sys.exit("no masks")
    print(json.dumps({{"seconds": 0.5, "update": 9.0 if run == "update" else 0.0, "sparsity": 0.8}}), flush=True)
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the benchmarks; they are imported as ``tools/bench.py`` does."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    names = ("measuring", "training", "memory", "passes", "inc", "ipex")
    yield SimpleNamespace(
        command=importlib.import_module("bench"),
        environment=importlib.import_module("environment"),
        **{name: importlib.import_module(f"benchmarks.{name}") for name in names},
    )
    for name in [
        name for name in sys.modules if name in ("bench", "environment") or name.split(".")[0] == "benchmarks"
    ]:
        del sys.modules[name]


@pytest.fixture
def setting(bench: Any) -> Any:
    return bench.measuring.Setting(layers=1, hidden=64, batch=1, length=8, repeats=1)


def fake_worker(folder: Path, *, weights: int = 53248, fails: str = "") -> list[str]:
    ready = {
        "ready": True, "sites": 7, "weights": weights, "threads": torch.get_num_threads(), "versions": {"fake": "1"},
    }  # fmt: skip
    path = folder / "worker.py"
    path.write_text(FAKE.format(ready=ready, noise="a line for the log", fails=fails), encoding="utf-8")
    return [sys.executable, str(path)]


def test_steps_updates_and_growth_are_measured(bench: Any, setting: Any) -> None:
    found = [item for name in ("step", "update", "large") for item in bench.command.BENCHES[name](setting)]
    assert len(found) == 4
    assert all(item.ratio > 0 for item in found)
    assert "53,248 weights" in found[2].detail


@pytest.mark.slow
def test_passes_are_measured(bench: Any, setting: Any) -> None:
    first, second = bench.passes.bench_passes(setting)
    assert first.ratio > 0
    assert second.ratio > 0


def test_memory_is_counted_exactly(bench: Any, setting: Any) -> None:
    masks, scores, largest, peak = bench.memory.bench_memory(setting)
    assert (masks.ratio, scores.ratio) == (1.0, 1.0)
    assert 0 < largest.ratio <= peak.ratio


def test_allocations_are_those_of_torch(bench: Any) -> None:
    def run() -> None:
        first = torch.empty(1000, dtype=torch.float32)  # 4000 bytes
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        third = torch.empty(2000, dtype=torch.uint8)
        del second, third

    used = bench.memory.allocations_of(run)
    assert (used.largest, used.peak, used.count) == (4000, 7000, 3)


def test_an_update_is_one_that_reaches_the_sparsity(bench: Any, setting: Any) -> None:
    trained = bench.training.Trained(bench.training.masked(setting))
    batch = bench.measuring.random_batch(setting)
    trained.step(batch)
    assert trained.session.sparsity == 0.0
    assert trained.update(batch) > 0
    assert trained.session.sparsity == pytest.approx(0.8, abs=1e-3)
    assert trained.gathering > 0


def test_both_sides_take_turns(bench: Any, setting: Any, tmp_path: Path) -> None:
    update, step = bench.inc.compare(setting, fake_worker(tmp_path))
    assert update.goal == "<= 0.02"
    assert 0 < update.ratio < 1
    assert "9.000 s" in update.detail
    assert step.goal == "<= 1, Neural Compressor's"
    assert "fake 1" in step.detail


def test_different_weights_are_not_compared(bench: Any, setting: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not comparable: 7 weights"):
        list(bench.inc.compare(setting, fake_worker(tmp_path, weights=7)))


def test_a_worker_that_ends_says_why(bench: Any, setting: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"status 1:\n(.*\n)*no masks"):
        list(bench.inc.compare(setting, fake_worker(tmp_path, fails="update")))
    with pytest.raises(RuntimeError, match="status 3"):
        bench.inc.Worker([sys.executable, "-c", "raise SystemExit(3)"], 1)


def test_what_is_not_installed_is_left_out(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bench.environment.folder("inc").parent == tmp_path / "graphprune"
    with pytest.raises(bench.command.typer.Exit) as exit_:
        bench.command.main(only=["inc"], layers=1, repeats=1, as_json=True)
    assert exit_.value.exit_code == 0
    output = capsys.readouterr()
    assert "make bench-inc" in json.loads(output.out)["left_out"]["inc"]
    assert "make bench-inc" in output.err


def test_ipex_runs_what_is_saved_here(bench: Any, setting: Any, tmp_path: Path) -> None:
    ready = {"runs": ["dynamic", "eager", "fp32", "int8"], "versions": {"fake": "1"}}
    path = tmp_path / "worker.py"
    looks = """
import json, os, sys
folder = sys.argv[sys.argv.index("--folder") + 1]
assert sorted(os.listdir(folder)) == ["dynamic", "fp32", "int8"], os.listdir(folder)
"""
    path.write_text(looks + FAKE.format(ready=ready, noise="", fails=""), encoding="utf-8")
    measures = list(bench.ipex.compare(setting, [sys.executable, str(path)]))
    assert [(item.ratio, item.goal) for item in measures] == [(1.0, ">= 3.5"), (1.0, ">= 1"), (1.0, ">= 1")]
    assert "fake 1" in measures[0].detail
    assert bench.ipex.WORKER.exists()


def test_the_worker_of_neural_compressor_is_found(bench: Any) -> None:
    assert bench.inc.WORKER.exists()
    assert "neural-compressor==2.6" in bench.environment.pins("inc").read_text(encoding="utf-8").split()
