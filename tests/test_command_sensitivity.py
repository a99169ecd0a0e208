"""The command ``graphprune sensitivity``: tables, JSON, plots, recipes, resume and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphprune import cli
from graphprune.artifact.sensitivity import Sensitivity

_LAYERS = ["first", "second", "head"]
_METRIC = '''
import os
from pathlib import Path
import torch

_INPUT = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))


def norm(program):
    """The mean absolute output; ends the process at a call that the environment names."""
    print("called")
    calls = Path("calls")
    calls.write_text(str(int(calls.read_text()) + 1 if calls.exists() else 1))
    if calls.read_text() == os.environ.get("END_AT"):
        os._exit(9)
    return program(_INPUT).abs().mean()


def nothing(program):
    return None


number = 3
'''


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a metric in ``my_metric.py``, each time anew."""
    (tmp_path / "my_metric.py").write_text(_METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_metric", raising=False)
    return tmp_path


def command(*options: str | Path, metric: str = "my_metric:norm") -> Result:
    return run(
        "sensitivity", "tests.models:mlp", "--input", "x=4x16", "--metric", metric, "--sparsity", "0.5,0.9",
        "--include-last", *options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_process_goes_on(work: Path) -> None:
    line = [
        sys.executable, "-c", "from graphprune.cli import main; main()", "sensitivity", "tests.models:mlp", "--input", "x=4x16",
        "--metric", "my_metric:norm", "--sparsity", "0.5", "--include-last", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line, capture_output=True, text=True, env={**environment, **more}, timeout=120, check=False
        )

    killed = start(END_AT="4")
    assert killed.returncode == 9
    assert killed.stdout == ""
    assert len(Sensitivity.load("sensitivity.json").points) == 2
    assert sorted(path.name for path in work.iterdir() if path.suffix == ".json") == ["sensitivity.json"]
    done = start()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((work / "sensitivity.json").read_text())
    assert "called" in done.stderr
    assert (work / "calls").read_text() == "6"
    assert len(Sensitivity.load("sensitivity.json").points) == 3


def test_the_command_prints_a_table_and_writes_a_recipe(work: Path) -> None:
    result = command("--target", "0.8", "--recipe", "recipe.yaml", "-o", "found.json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split() == ["layer", "weights", "0.5", "0.9", "target"]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == _LAYERS
    assert "called" in result.stderr  # what the user's code prints
    assert Sensitivity.load("found.json").settings.metric == "my_metric:norm"
    done = run("transform", "tests.models:mlp", "--input", "x=4x16", "--recipe", "recipe.yaml")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("graphprune.mask(") == 3


def test_the_command_prints_json(work: Path) -> None:
    result = command("--json", "--target", "0.8", "--lower-is-better", "--exclude", "head")
    found = json.loads(result.stdout)
    assert found["targets"].keys() == {"first", "second"}
    assert found["settings"]["lower_is_better"] is True


def test_the_command_explains_an_interrupt(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.artifact import sweep as module

    evaluate = module.evaluate

    def interrupt(*arguments: object) -> float:
        if "head" in str(arguments[-1]):
            raise KeyboardInterrupt
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "evaluate", interrupt)
    result = command()
    assert result.exit_code == 130
    assert "is in sensitivity.json; the same command goes on from there" in result.stderr
    assert len(Sensitivity.load("sensitivity.json").points) == 4


@pytest.mark.parametrize("name", ["map.png", "map.SVG"])
def test_the_command_draws(work: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    result = command("--plot", name, "--sparsity", "0.7")
    assert result.exit_code == 0, result.stderr
    head = (work / name).read_bytes()[:200]
    assert head.startswith(b"\x89PNG") or b"<?xml" in head


def test_a_missing_matplotlib_is_told_before_measuring(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = command("--plot", "map.png")
    assert result.exit_code == 2
    assert 'pip install "graphprune[plot]"' in result.stderr
    assert not (work / "calls").exists()


@pytest.mark.parametrize(
    ("options", "metric", "message"),
    [
        ([], "no_such_module:norm", "no module named 'no_such_module'"),
        ([], "my_metric:nrom", "did you mean 'norm'"),
        ([], "my_metric:number", "is a int, not a function that takes a Program"),
        ([], "my_metric", "is not of the form package.module:function"),
        ([], "my_metric:nothing", "returned None; it must return a finite number"),
        (["--exclude", "heda"], "my_metric:norm", "did you mean 'head'"),
        (["--sparsity", "0.5;0.8"], "my_metric:norm", "is no number"),
        (["--sparsity", "80"], "my_metric:norm", "is not in (0, 1)"),
        (["--recipe", "recipe.yaml"], "my_metric:norm", "--recipe needs --target"),
        (["--target", "80"], "my_metric:norm", "--target 80.0 is not in (0, 1)"),
        (["--target", "0.95"], "my_metric:norm", "is above every sparsity to measure (0.9 at most)"),
        (["--plot", "map.jpeg"], "my_metric:norm", "is written as .png, .svg, .pdf"),
        (["-o", "my_metric.py"], "my_metric:norm", "my_metric.py cannot be read"),
    ],
)
def test_the_command_explains_errors(work: Path, options: list[str], metric: str, message: str) -> None:
    result = command(*options, metric=metric)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (work / "sensitivity.json").exists()
