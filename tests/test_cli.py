"""The command line: results on standard output, everything else on standard error, errors without tracebacks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphprune import cli

_MASKS = "insert-masks{sparsity=0.5,criterion=magnitude,schedule=one-shot}"
_MLP = ("tests.models:mlp", "--input", "x=4x16")


def run(*arguments: str | Path) -> Result:
    """Run in this process."""
    return CliRunner().invoke(cli.app, [str(item) for item in arguments])


def refused(*arguments: str | Path) -> str:
    """The message of a command that must fail with exit code 2, on standard error only."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned mlp, saved by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "saved"
    result = run("transform", *_MLP, "-p", _MASKS, "-o", folder)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    "command",
    ["inspect", "sensitivity", "tune", "prune", "transform", "export", "verify", "report", "passes", "targets", "demo"],
)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("graphprune 0.")


def test_inspect_prints_a_table() -> None:
    result = run("inspect", *_MLP)
    assert result.exit_code == 0, result.stderr
    assert "first.weight     linear     32x16" in result.stdout
    assert "unstructured 4x1 2:4" in result.stdout
    assert "head.weight  last layer before the output" in result.stdout


def test_inspect_prints_json_and_nothing_else() -> None:
    result = run("inspect", *_MLP, "--json", "--include-last", "--exclude", "first", "--op", "linear")
    assert [site["name"] for site in json.loads(result.stdout)["sites"]] == ["second.weight", "head.weight"]


def test_output_of_the_users_code_stays_off_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty.py").write_text(
        "from torch import nn\nprint('imported')\ndef build():\n    print('built')\n    return nn.Linear(4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("inspect", "chatty:build", "--input", "input=2x4", "--json")
    assert json.loads(result.stdout)["totals"]["sites"] == 1
    assert "imported\nbuilt" in result.stderr


def test_transform_prints_the_graph_alone(golden: Callable[[str, str], None]) -> None:
    result = run("transform", *_MLP, "-p", _MASKS, "--diff", "--print-after", "all", "--time")
    assert result.exit_code == 0, result.stderr
    golden("cli_transform_mlp", result.stdout)
    for part in ("+++ after [0] insert-masks", "// after [0] insert-masks", "s  all passes"):
        assert part in result.stderr


def test_transform_reads_a_recipe_with_variables(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\nvariables: {amount: 0.5}\npipeline:\n"
        "  - insert-masks: {sparsity: '${amount}', schedule: one-shot}\n"
        "  - remove-dead\n"
    )
    result = run("transform", *_MLP, "--recipe", recipe, "--set", "amount=0.25", "--dump", tmp_path / "dump")
    assert result.exit_code == 0, result.stderr
    assert "sparsity=0.25" in result.stdout
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["00-input.ir", "01-insert-masks.ir", "02-remove-dead.ir"]


def test_transform_with_labels() -> None:
    result = run("transform", "tests.models:bert_qa", "--labels")
    assert result.stdout.startswith("graph @bert_for_question_answering(")
    assert "%start_positions: i64[b]" in result.stdout


def test_export_and_verify(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = run("export", saved, "--target", "onnx", "-o", tmp_path / "artifact", "--option", "opset=19")
    assert result.exit_code == 0, result.stderr
    assert "3 weights measured" in result.stdout
    verified = run("verify", tmp_path / "artifact")
    assert verified.exit_code == 0, verified.stderr
    assert verified.stdout.count("passed") == 3
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text())["options"]["opset"] == 19
    (tmp_path / "artifact" / "model.onnx").write_bytes(b"x")
    assert "model.onnx was changed" in refused("verify", tmp_path / "artifact")
    assert "exported artifact" in refused("inspect", tmp_path / "artifact")


def test_a_saved_program_can_go_on(saved: Path) -> None:
    result = run("transform", saved, "-p", "fold-masks")
    assert result.exit_code == 0, result.stderr
    assert "graphprune.mask" not in result.stdout
    assert json.loads(run("inspect", saved, "--json").stdout)["totals"]["sparsity"] == pytest.approx(0.5)


def test_passes_and_targets() -> None:
    listed = run("passes").stdout
    assert "insert-masks" in listed
    assert "pattern=4x1" in listed
    assert "masked" in listed
    listed = run("targets").stdout
    assert "stored only" in listed
    assert "installed" in listed or "missing: " in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./nowhere"], "no such model"),
        (["inspect", "no-such-model/at-all"], "neither a local folder"),
        (["inspect", "tests.models:mpl"], "did you mean 'mlp'"),
        (["inspect", "tests.models:mlp"], "example_inputs"),
        (["inspect", *_MLP, "--select", "frist"], "did you mean 'first'"),
        (["inspect", "tests.models:mlp", "--input", "x=4by16"], "write NAME=SHAPE"),
        (["inspect", "tests.models:mlp", "--input", "x"], "write NAME=VALUE"),
        (["inspect", "tests.models:mlp", "--input", "x=4x16:flaot"], "write NAME=SHAPE"),
        (["transform", *_MLP, "-p", "insert-msaks"], "did you mean 'insert-masks'"),
        (["transform", *_MLP, "-p", "insert-masks{sparsity=80}"], "is not in"),
        (["transform", *_MLP, "-p", "insert-masks{"], "column 14"),
        (["transform", *_MLP, "-p", "fold-masks"], "requires masked"),
        (["transform", *_MLP, "-p", "remove-dead", "--set", "a=1"], "give --recipe FILE"),
        (["transform", *_MLP, "-p", "remove-dead", "--recipe", "r.yaml"], "not both"),
        (["transform", *_MLP, "-p", "remove-dead", "--print-after", "remove-daed"], "did you mean 'remove-dead'"),
        (["transform", *_MLP, "--recipe", "no-such-recipe.yaml"], "cannot read recipe"),
        (["export", "./nowhere", "-o", "out"], "no saved Program"),
        (["export", "./nowhere", "-o", "out", "--target", "onxn"], "did you mean 'onnx'"),
        (["export", "./nowhere", "-o", "out", "--option", "opset=[}"], "cannot be read as a YAML value"),
        (["verify", "./nowhere"], "is no folder"),
    ],
)
def test_expected_errors_are_one_message(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_usage_errors_have_exit_code_2() -> None:
    for arguments in (
        ["inspect"],
        ["inspect", "--no-such-option", "x"],
        ["no-such-command"],
        ["export", "x"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""


def test_an_input_for_a_saved_program_is_refused(saved: Path) -> None:
    assert "leave --input out" in refused("inspect", saved, "--input", "x=4x16")


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    message = refused("transform", *_MLP, "-p", "remove-dead", "--dump", tmp_path / "dump")
    assert "No space left on device" in message
    assert "00-input.ir" in message


def test_an_interrupt_has_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupt)
    result = run("inspect", *_MLP)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_as_a_process() -> None:
    """The console entry point: JSON alone on standard output, also when libraries log, and codes reach the shell."""
    command = [sys.executable, "-c", "from graphprune.cli import main; main()", "inspect", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TRANSFORMERS_VERBOSITY": "debug"}

    def start(model: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, model], capture_output=True, text=True, env=environment, timeout=120)

    good = start("tests.models:bert_qa")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["totals"]["sites"] > 0
    bad = start("tests.models:brt_qa")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: tests.models:brt_qa")
