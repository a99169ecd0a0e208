"""The compiled kernels of target sparse-cpu, on every instruction set that this CPU has, and what happens without a compiler."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from graphprune.errors import LoweringError
from graphprune.targets.inductor_model.compiling import check_compiler
from graphprune.targets.sparse_cpu import building
from graphprune.targets.sparse_cpu.building import CHOICE, cache_folder
from tests import sparse_kernel_run

_ROOT = Path(__file__).parents[1]
_LOAD = "from graphprune.targets.sparse_cpu.building import load_kernels; print(load_kernels())"
_COMPILED = ("avx512", "avx2", "portable")


def _has_compiler() -> bool:
    try:
        check_compiler()
    except LoweringError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="the kernels are C++, and no compiler is here")


def _python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@functools.cache
def _report(isa: str) -> Mapping[str, Any]:
    """What the checks found in a process of its own."""
    done = _python("-m", "tests.sparse_kernel_run", **{CHOICE: isa})
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _names(checks: tuple[Any, ...]) -> list[str]:
    return [check.__name__ for check in checks]


@needs_compiler
@pytest.mark.parametrize("check", _names(sparse_kernel_run.EXACT + sparse_kernel_run.REFUSALS))
@pytest.mark.parametrize("isa", _COMPILED)
def test_kernels(isa: str, check: str) -> None:
    report = _report(isa)
    if "does not run it" in report.get("error", ""):
        pytest.skip(f"this CPU lacks {isa}")
    assert report["isa"] == isa
    assert report["failures"][check] == ""


@pytest.mark.parametrize("check", _names(sparse_kernel_run.EXACT))
def test_torch_alone_computes_the_same(check: str) -> None:
    assert _report("torch")["failures"][check] == ""


@needs_compiler
def test_the_best_instruction_set_is_taken_unless_one_is_named() -> None:
    lacking = [isa for isa in _COMPILED if "error" in _report(isa)]
    best = next(isa for isa in _COMPILED if isa not in lacking)
    assert _python("-c", _LOAD, **{CHOICE: ""}).stdout.split() == [best]


def test_without_a_compiler_there_is_one_clear_error(tmp_path: Path) -> None:
    done = _python("-c", _LOAD, **{CHOICE: "", "CXX": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("graphprune.errors.LoweringError: target sparse-cpu compiles its kernels")
    for part in (
        "/nonexistent cannot be run",
        "apt-get install g++",
        "environment variable CXX",
        f"set {CHOICE}=torch",
    ):
        assert part in last


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """``load(NAME=value)`` loads kernels as a process with these variables does, and an empty cache."""

    def call(**variables: str) -> str:
        for name, value in {CHOICE: "", "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}.items():
            monkeypatch.setenv(name, value)
        loaded: str = building.load_kernels.__wrapped__()
        return loaded

    return call


def test_torch_alone_needs_no_compiler(load: Callable[..., str], tmp_path: Path) -> None:
    assert load(**{CHOICE: "torch", "CXX": "/nonexistent"}) == "torch"
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_one_clear_error(load: Callable[..., str], tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "c++ 1.0" && exit 0\necho "fatal error: broken" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not know this compiler
        said = rf"do not compile with {re.escape(str(compiler))}: .*fatal error: broken.*set {CHOICE}=torch"
        with pytest.raises(LoweringError, match=said):
            load(CXX=str(compiler))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_one_clear_error(load: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoweringError, match=r"which cannot be made.*XDG_CACHE_HOME"):
        load(XDG_CACHE_HOME=str(tmp_path / "file"))


def test_a_wrong_name_is_an_error(load: Callable[..., str]) -> None:
    wanted = f"{CHOICE}=sse9 is no instruction set; choose avx512, avx2, portable or torch"
    with pytest.raises(LoweringError, match=f"^{wanted}$"):
        load(**{CHOICE: "sse9"})


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "graphprune" / "sparse-cpu"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "graphprune" / "sparse-cpu"
