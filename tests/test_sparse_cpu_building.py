"""What target sparse-cpu compiles with: the compiler, ninja beside a Python that is not on PATH, and what it says where they lack."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphprune.errors import LoweringError
from graphprune.targets.sparse_cpu import building


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PATH with nothing on it, an empty cache, no choice; returns the folder of Python's scripts, empty too."""
    for name in ("nothing", "scripts"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(building.CHOICE, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(building.sysconfig, "get_path", lambda _: str(tmp_path / "scripts"))
    building.load_kernels.cache_clear()
    yield tmp_path / "scripts"
    building.load_kernels.cache_clear()


def _program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\necho one of them 1.0\n")
    (folder / name).chmod(0o755)


def test_ninja_beside_python_is_found_and_path_is_put_back(bare: Path) -> None:
    _program(bare, "ninja")
    before = os.environ["PATH"]
    with building._ninja_on_path():
        assert shutil.which("ninja") == str(bare / "ninja")
    assert os.environ["PATH"] == before
    assert shutil.which("ninja") is None


def test_without_ninja_the_pip_line_is_said(bare: Path) -> None:
    _program(Path(os.environ["PATH"]), "c++")
    with pytest.raises(LoweringError, match=r'pip install "graphprune\[sparse-cpu\]".*GRAPHPRUNE_SPARSE_CPU_ISA=torch'):
        building.load_kernels()


def test_without_a_compiler_it_says_what_to_install(bare: Path) -> None:
    _program(bare, "ninja")
    with pytest.raises(LoweringError, match=r"the C\+\+ compiler c\+\+ cannot be run .*apt-get install g\+\+"):
        building.load_kernels()


def test_the_choice_is_checked_and_torch_needs_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(building.CHOICE, "torch")
    assert building.load_kernels() == "torch"
    building.load_kernels.cache_clear()
    monkeypatch.setenv(building.CHOICE, "avx1024")
    with pytest.raises(LoweringError, match="avx1024 is no instruction set; choose avx512, avx2, portable or torch"):
        building.load_kernels()
