"""The floors of the design: top may import lower, never up, and passes and targets do not import each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_module_imports_upward(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [str(program), "--cache-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_the_package_imports_neither_torch_nor_targets_libraries() -> None:
    code = "import sys, graphprune; print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_targets_import_without_their_libraries() -> None:
    code = (
        "import sys; sys.modules.update({name: None for name in ('onnx', 'onnxruntime', 'onnxscript', 'onnx_graphsurgeon')});"
        "from graphprune.pipeline.registry import known_targets; print(sorted(known_targets()))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "onnx" in result.stdout
