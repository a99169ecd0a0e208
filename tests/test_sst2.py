"""The results table: a run on made-up phrases, resuming it, its errors, and a few steps on the real data where it is there."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import graphprune as gp

pytest.importorskip("torchmetrics", reason="accuracy is measured with torchmetrics, extra results")
TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import sst2  # noqa: E402
import sst2_task  # noqa: E402

QUICK = sst2_task.Settings.quick()


def with_data() -> Path:
    try:
        return sst2_task.data_folder()
    except gp.GraphPruneError as error:
        pytest.skip(f"needs SST-2 and weights: {error}")


def run_tool(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "sst2.py"), "--threads", "1", *options]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_quick_table_has_all_rows_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sst2.Experiment.run
    first = run_tool("--quick", "--seed", "0", "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / sst2.RUNS).read_text().splitlines()
    runs = {run["row"]: run for run in map(json.loads, lines)}
    assert list(runs) == list(sst2_task.ROWS)
    for name, row in sst2_task.ROWS.items():
        assert name in first.stdout
        assert runs[name]["sparsity"] == pytest.approx(row.sparsity, abs=0.01)
        assert runs[name]["holds"]

    torn = "\n".join([lines[0], lines[2][:40]])  # killed while it wrote its second run
    (tmp_path / sst2.RUNS).write_text(torn)
    trained: list[str] = []
    monkeypatch.setattr(
        sst2.Experiment, "run", lambda self, row, seed: trained.append(row.name) or run(self, row, seed)
    )
    sst2.make_table(sst2_task.made_up_task(QUICK), QUICK, tmp_path, [0], ["dense", "80 % 4x1"])
    assert trained == ["80 % 4x1"]
    again = sst2.finished(tmp_path, QUICK)
    assert set(again) == {("dense", 0), ("80 % 4x1", 0)}
    assert again["80 % 4x1", 0].accuracy == runs["80 % 4x1"]["accuracy"]


def test_runs_of_other_settings_do_not_count(tmp_path: Path) -> None:
    result = sst2.Result("dense", 0, 0.9, 0.0, True, 1.0, 1, {"phrases": 1}, {})
    sst2.write_result(tmp_path, result)
    assert sst2.finished(tmp_path, QUICK) == {}


def test_change_is_against_the_dense_model_of_the_same_seeds() -> None:
    def result(row: str, seed: int, accuracy: float) -> sst2.Result:
        return sst2.Result(row, seed, accuracy, 0.5, row != "2:4", 1.0, 1, {}, {})

    runs = [result("dense", 0, 0.8), result("dense", 1, 0.9), result("2:4", 1, 0.855), result("80 % 4x1", 2, 0.8)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sst2.table({(run.row, run.seed): run for run in runs}, [0, 1, 2]))
    text = {line.split()[1]: line for line in console.export_text().splitlines() if line.startswith("│")}
    assert "-5.00%" in text["2:4"]
    assert "no" in text["2:4"]
    assert "nan" in text["80"]  # there is no dense model of seed 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"sentence\tlabel\nfine \t1\nbad"), "line 3"),
        (gzip.compress(b"sentence\tlabel\nfine \t2\n"), "line 2"),
        (gzip.compress(b"a\tb\tc\n"), "line 1"),
        (gzip.compress(b"sentence\tlabel\nfine \t1\n" * 100)[:-20], "cannot be read"),
    ],
    ids=["not gzip", "no label", "label 2", "other columns", "cut off"],
)
def test_a_damaged_table_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.tsv.gz").write_bytes(content)
    with pytest.raises(gp.GraphPruneError, match=message):
        sst2_task.read_phrases(tmp_path / "train.tsv.gz")


def test_missing_data_and_unknown_rows_are_errors(tmp_path: Path) -> None:
    missing = run_tool(GRAPHPRUNE_DATA=str(tmp_path))
    assert missing.returncode == 1
    assert "GRAPHPRUNE_DATA" in missing.stderr
    assert "Traceback" not in missing.stderr
    unknown = run_tool("--quick", "--row", "4:8", "--out", str(tmp_path))
    assert unknown.returncode == 1
    assert "the rows are: dense; 80 % 4x1" in unknown.stderr


def test_the_real_data_is_read_whole_and_chosen_the_same_way() -> None:
    folder = with_data()
    texts, labels = sst2_task.read_phrases(folder / sst2_task.TRAIN)
    assert (len(texts), sum(labels)) == (67_349, 37_569)
    task = sst2_task.read_task(folder, replace(QUICK, phrases=20))
    assert len(task.dev.items) == 872
    assert task.train == sst2_task.read_task(folder, replace(QUICK, phrases=20)).train


@pytest.mark.parametrize("name", ["80 % 4x1", pytest.param("2:4", marks=pytest.mark.slow)])
def test_a_few_steps_on_the_real_data(tmp_path: Path, name: str) -> None:
    folder = with_data()
    settings = replace(QUICK, dense_steps=2, prune_steps=4, frequency=1)
    task: Any = sst2_task.read_task(folder, settings)
    task = replace(task, dev=sst2_task.Phrases(task.dev.items[:16], task.dev.labels[:16]))
    torch.set_num_threads(1)
    result = sst2.Experiment(task, settings, tmp_path, Progress(disable=True)).run(sst2_task.ROWS[name], seed=0)
    assert result.sparsity == pytest.approx(sst2_task.ROWS[name].sparsity, abs=1e-3)
    assert result.holds
    assert (tmp_path / "dense-0" / "model.safetensors").is_file()
