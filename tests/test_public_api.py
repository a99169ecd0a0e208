"""The package's public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import graphprune as gp


@pytest.mark.parametrize("name", gp.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(gp, name)
    assert value is not None
    if name != "__version__":
        assert (value.__doc__ or "").strip()
    assert name in dir(gp)


def test_names_are_sorted_and_complete() -> None:
    assert gp.__all__ == sorted(gp.__all__)
    wanted = {
        "trace",
        "inspect",
        "transform",
        "export",
        "verify",
        "save",
        "load",
        "training",
        "Recipe",
        "Pass",
        "Target",
    }
    assert wanted | {"Program", "Property", "GraphPruneError", "__version__"} <= set(gp.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trnasform'"):
        gp.trnasform  # type: ignore[attr-defined]  # noqa: B018


def test_functions_are_the_ones_of_their_modules() -> None:
    from graphprune.artifact.checkpoint import load_program, save_program
    from graphprune.artifact.inspection import inspect
    from graphprune.training import Session

    assert (gp.save, gp.load, gp.inspect, gp.training.Session) == (save_program, load_program, inspect, Session)


def _modules_after(code: str) -> set[str]:
    listing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not _modules_after("import graphprune") & {"torch", "transformers", "onnx", "onnxruntime", "networkx"}


def test_using_all_public_names_loads_neither_onnx_nor_transformers() -> None:
    code = "import graphprune as gp\nfor name in gp.__all__: getattr(gp, name)"
    assert not _modules_after(code) & {"onnx", "onnxruntime", "onnxscript", "transformers"}


def test_the_command_line_starts_without_torch() -> None:
    assert not _modules_after("import graphprune.cli") & {"torch", "transformers", "onnx"}
