"""The comparison with NNCF: a stand-in for its side, since it has an environment of its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from graphprune.targets.openvino import OpenVino

pytest.importorskip("openvino", reason="the comparison needs the extra openvino")
pytest.importorskip("onnxruntime", reason="the comparison needs the extra onnx")

_SIDE = """
import json, shutil, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for name in ("int8", "float"):
    shutil.copytree({source!r}, options["--out"] + "/" + name)
print(json.dumps({{"nncf": "3.4.0", "openvino": "2026.4", "threads": options["--threads"]}}))
"""


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The comparison and the measuring, imported as ``tools/bench.py`` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    return importlib.import_module("benchmarks.openvino"), importlib.import_module("benchmarks.measuring")


@pytest.mark.slow
def test_both_files_take_turns(tools: tuple[Any, Any], tmp_path: Path) -> None:
    comparison, measuring = tools
    setting = measuring.Setting(layers=1, hidden=64, length=16, repeats=1)
    (tmp_path / "theirs").mkdir()
    OpenVino().lower(comparison._dense(setting), tmp_path / "theirs")
    side = tmp_path / "side.py"
    side.write_text(_SIDE.format(source=str(tmp_path / "theirs")))
    found = list(comparison.compare(setting, [sys.executable, side]))
    assert [item.goal for item in found] == ["<= 1", *["no goal"] * 4]
    assert "nncf 3.4.0" in found[0].detail
    assert all(item.ratio > 0 for item in found)


def test_a_side_that_fails_says_why(tools: tuple[Any, Any], tmp_path: Path) -> None:
    comparison, measuring = tools
    with pytest.raises(RuntimeError, match=r"status 1(.|\n)*no such thing"):
        comparison._quantize(
            [sys.executable, "-c", "raise SystemExit('no such thing')"], measuring.Setting(), 1, tmp_path
        )


def test_a_missing_environment_is_named(tools: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, measuring = tools
    monkeypatch.setattr(comparison.environment, "interpreter", lambda name: None)
    with pytest.raises(measuring.Unavailable, match=r"environment\.py --bare nncf"):
        list(comparison.bench_openvino(measuring.Setting()))
