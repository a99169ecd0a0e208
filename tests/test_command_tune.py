"""The command ``graphprune tune``: tables, JSON, recipes, exit codes, resume and errors."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.artifact.tuning import Tuning
from graphprune.oneshot.calibration_data import read_batches
from tests.tuned import BATCHES, fragile, fragile_example, likeness

_METRIC = '''
import os, signal
from pathlib import Path
from tests.tuned import error, fragile, likeness


def metric(program):
    """The metric of the tests; ends the process at a call that the environment names."""
    print("called")
    calls = Path("calls")
    calls.write_text(str(int(calls.read_text()) + 1 if calls.exists() else 1))
    if calls.read_text() == os.environ.get("END_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return likeness(program)


def nothing(program):
    return None
'''


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a metric in ``my_task.py`` and calibration data in ``data.npz``."""
    (tmp_path / "my_task.py").write_text(_METRIC)
    np.savez(tmp_path / "data.npz", x=torch.cat([batch["x"] for batch in BATCHES]).numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    return tmp_path


def line(*options: str | Path, metric: str = "my_task:metric") -> list[str]:
    return [
        "tune", "tests.tuned:fragile", "--input", "x=4x16", "--metric", metric, "--data", "data.npz", *map(str, options),
    ]  # fmt: skip


def test_the_goal_is_met_and_the_recipe_gives_the_number_again(work: Path) -> None:
    result = run(*line("--relative", "0.03"))
    assert result.exit_code == 0, result.stderr
    rows = [row.split() for row in result.stdout.splitlines()]
    assert rows[0] == ["site", "level", "sensitivity"]
    assert rows[1][:2] == ["second.weight", "float"]
    assert {tuple(row[:2]) for row in rows[2:4]} == {("first.weight", "quantized"), ("head.weight", "quantized")}
    assert result.stdout.splitlines()[-1].startswith("goal met: best 97.")
    assert "called" in result.stderr  # what the user's code prints
    (command,) = (row.split(": ")[-1] for row in result.stderr.splitlines() if "recipe written to tune.yaml" in row)
    found = Tuning.load("tune.json")
    assert found.settings.metric == "my_task:metric"
    text = (work / "tune.yaml").read_text()
    assert text.startswith("# Written by graphprune tune for my_task:metric.\n# goal met: best 97.")
    batches = read_batches(Path("data.npz"), "")
    program = gp.transform(fragile(), work / "tune.yaml", fragile_example(), data=batches).eval()
    assert likeness(program) == found.best.value  # type: ignore[union-attr]
    shown = run(*shlex.split(command)[1:])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("graphprune.fake_quantize(") == 4


def test_the_best_is_kept_where_the_goal_is_not_met(work: Path) -> None:
    result = run(*line("--relative", "1e-9", "-o", "found.json", "--recipe", "found/best.yaml"))
    assert result.exit_code == 3, result.stderr
    assert result.stdout.splitlines()[-1].startswith("goal not met: best 9")
    assert not Tuning.load("found.json").met
    assert gp.Recipe.load("found/best.yaml").passes


def test_json(work: Path) -> None:
    result = run(*line("--relative", "0.03", "--json"))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((work / "tune.json").read_text())


def test_options(work: Path) -> None:
    (work / "base.yaml").write_text("pipeline: dynamic-quant\ntarget: onnx\n")
    result = run(
        *line("--absolute", "0.03", "--lower-is-better", "--base", "base.yaml", "--fallback", "off", metric="my_task:error"),
        *("--order", "one-on", "--group", "none", "--max-trials", "30", "--timeout", "600"),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    recipe = yaml.safe_load((work / "tune.yaml").read_text())
    assert recipe["target"]["name"] == "onnx"
    (step,) = recipe["pipeline"]
    assert step["dynamic-quant"]["rules"] == ["name second.weight: off"]


@pytest.mark.parametrize("end_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_process_goes_on(work: Path, end_at: int) -> None:
    command = [sys.executable, "-c", "from graphprune.cli import main; main()", *line("--relative", "1e-9", "--json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, env={**environment, **more}, timeout=240, check=False
        )

    killed = start(END_AT=str(end_at))
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout == ""
    if end_at > 2:
        assert len(Tuning.load("tune.json").trials) == end_at - 2
        assert [path.name for path in work.iterdir() if path.suffix == ".json"] == ["tune.json"]
    done = start()
    assert done.returncode == 3, done.stderr
    found = Tuning.load("tune.json")
    assert json.loads(done.stdout) == json.loads((work / "tune.json").read_text())
    assert int((work / "calls").read_text()) == end_at + 1 + len(found.trials) - (end_at - 2)
    assert (work / "tune.yaml").is_file()


def test_the_command_explains_an_interrupt(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.artifact import tune as module

    evaluate = module.evaluate

    def interrupt(*arguments: object) -> float:
        if "with 2 of 3" in str(arguments[-1]):
            raise KeyboardInterrupt
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "evaluate", interrupt)
    result = run(*line())
    assert result.exit_code == 130
    assert "is in tune.json; the same command goes on from there" in result.stderr
    assert len(Tuning.load("tune.json").trials) == 1


@pytest.mark.parametrize(
    ("options", "metric", "message"),
    [
        ([], "my_task:mertic", "did you mean 'metric'"),
        ([], "my_task", "is not of the form package.module:function"),
        ([], "my_task:nothing", "returned None; it must return a finite number"),
        (["--relative", "2"], "my_task:metric", "relative tolerance 2.0 is out of range"),
        (["--relative", "0.1", "--absolute", "1"], "my_task:metric", "give a relative or an absolute tolerance, not both"),
        (["--data", "none.npz"], "my_task:metric", "none.npz cannot be read"),
        (["-p", "dynamic-quant", "--base", "base.yaml"], "my_task:metric", "give --pipeline or --base, not both"),
        (["--base", "base.yaml"], "my_task:metric", "cannot read recipe base.yaml"),
        (["-p", "fold-conv-bn"], "my_task:metric", "one pass must decide what is quantized"),
        (["--order", "eror"], "my_task:metric", "did you mean 'error'"),
        (["--group", "inputs"], "my_task:metric", "did you mean 'input'"),
        (["--fallback", "float"], "my_task:metric", "fallback 'float'"),
        (["--recipe", "tune.json"], "my_task:metric", "--recipe and --out are both tune.json"),
        (["-o", "my_task.py"], "my_task:metric", "my_task.py cannot be read"),
    ],
)  # fmt: skip
def test_the_command_explains_errors(work: Path, options: list[str], metric: str, message: str) -> None:
    result = run(*line(*options, metric=metric))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (work / "tune.json").exists()
    assert not (work / "tune.yaml").exists()


def test_a_base_recipe_is_not_overwritten(work: Path) -> None:
    (work / "tune.yaml").write_text("pipeline: dynamic-quant\n")
    result = run(*line("--base", "tune.yaml"))
    assert result.exit_code == 2
    assert "would take the place of --base tune.yaml" in result.stderr
    assert (work / "tune.yaml").read_text() == "pipeline: dynamic-quant\n"
