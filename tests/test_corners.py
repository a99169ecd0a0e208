"""``tools/corners.py``: one command that lowers all four corners to every target and compares them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import graphprune as gp
from graphprune.ir.masking import masked_sites

ROOT = Path(__file__).parent.parent
CORNERS = ["dense-fp32", "dense-int8", "sparse-fp32", "sparse-int8"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported as a script finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("corners")
    for name in [n for n in sys.modules if n in ("corners", "environment") or n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def small(tool: Any) -> Any:
    return tool.Model(layers=1, hidden=64, length=8)


def quiet() -> Console:
    return Console(quiet=True)


def test_every_corner_is_lowered_once(tool: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def export(program: Path, target: str, out: Path) -> str:
        asked.append((program.name, str(out.relative_to(tmp_path))))
        if target == "openvino" and "int8" in out.name:
            return "no openvino here"
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{}")
        return ""

    monkeypatch.setattr(tool, "export", export)
    made, left_out = tool.lower(tmp_path, small, ["onnx", "openvino"], quiet())
    assert [str(path.relative_to(tmp_path)) for path in made] == [
        *(f"onnx/{name}" for name in CORNERS),
        "openvino/dense-fp32",
        "openvino/sparse-fp32",
    ]
    assert left_out == {f"openvino/{name}": "no openvino here" for name in ("dense-int8", "sparse-int8")}
    assert asked[:4] == [
        ("dense-fp32", "onnx/dense-fp32"),
        ("dense-onnxruntime", "onnx/dense-int8"),
        ("sparse-fp32", "onnx/sparse-fp32"),
        ("sparse-onnxruntime", "onnx/sparse-int8"),
    ]
    sparse = gp.load(tmp_path / "programs" / "sparse-onnxruntime")
    assert {site.decision.sparsity for site in masked_sites(sparse)} == {0.8}
    assert gp.Property.FAKE_QUANT in sparse.properties
    asked.clear()
    monkeypatch.setattr(tool.Programs, "_traced", lambda self: pytest.fail("what is there is not made again"))
    again, _ = tool.lower(tmp_path, small, ["onnx", "openvino"], quiet())
    assert again == made
    assert [out for _, out in asked] == ["openvino/dense-int8", "openvino/sparse-int8"]


def test_a_folder_holds_one_model(tool: Any, small: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool.claim(out, small, False)
    tool.claim(out, small, False)
    assert json.loads((out / "model.json").read_text()) == {"layers": 1, "hidden": 64, "length": 8}
    (out / "onnx").mkdir()
    other = tool.Model(layers=2, hidden=64, length=8)
    with pytest.raises(gp.GraphPruneError, match="choose another folder, or replace it with --force"):
        tool.claim(out, other, False)
    assert (out / "onnx").exists()
    tool.claim(out, other, True)
    assert not (out / "onnx").exists()
    with pytest.raises(gp.GraphPruneError, match="holds files that this tool did not write"):
        tool.claim(tmp_path, small, False)


def test_a_failed_export_says_why(tool: Any, tmp_path: Path) -> None:
    reason = tool.export(tmp_path / "nothing", "onnx", tmp_path / "out")
    assert "nothing" in reason
    assert not reason.startswith("error")


def test_models_of_ipex_are_lowered_in_its_environment(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$GRAPHPRUNE_IPEX_PYTHON" "$@" > "{tmp_path}/asked"\necho error: just a test >&2\nexit 2\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("GRAPHPRUNE_IPEX_PYTHON", str(python))
    assert tool.export(tmp_path / "program", "ipex", tmp_path / "out") == "just a test"
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(" -c")  # it runs where it is lowered, in no process of another Python
    assert f"export {tmp_path}/program --target ipex -o {tmp_path}/out" in asked


def test_environments_of_the_cache_are_found(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHPRUNE_DEEPSPARSE_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tool.find_environments(["deepsparse", "onnx"])
    assert "GRAPHPRUNE_DEEPSPARSE_PYTHON" not in tool.os.environ
    folder = tool.environment.folder("deepsparse")
    (folder / "bin").mkdir(parents=True)
    for path in (folder / "bin" / "python", folder / ".ready"):
        path.touch()
    tool.find_environments(["deepsparse", "onnx"])
    assert tool.os.environ["GRAPHPRUNE_DEEPSPARSE_PYTHON"] == str(folder / "bin" / "python")
    monkeypatch.setenv("GRAPHPRUNE_DEEPSPARSE_PYTHON", str(folder / "bin" / "python"))  # so that it is taken away again


def test_the_table_is_made_of_all(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Found:
        def save(self, path: Path) -> None:
            path.write_text("{}")

        def __str__(self) -> str:
            return "the table"

    asked: list[Any] = []
    monkeypatch.setattr(tool, "lower", lambda *_: ([tmp_path / "onnx" / "dense-fp32"], {"ipex/dense-fp32": "not here"}))
    monkeypatch.setattr(tool.gp, "benchmark", lambda made, **options: asked.append((made, options)) or Found())
    out = tmp_path / "out"
    tool.corners(out, ["onnx", "ipex"], 1, 64, [1, 8], None, 1, 5, False)
    assert capsys.readouterr().out == "the table\nleft out: ipex/dense-fp32: not here\n"
    assert (out / "benchmark.json").exists()
    ((made, options),) = asked
    assert made == [tmp_path / "onnx" / "dense-fp32"]
    assert (options["batch"], options["threads"], options["rounds"]) == ([1, 8], 1, 5)
    with pytest.raises(tool.typer.Exit) as exit_:
        tool.corners(out, ["onyx"], 1, 64, None, None, None, 5, False)
    assert exit_.value.exit_code == 2
    assert "unknown target 'onyx'" in capsys.readouterr().err
