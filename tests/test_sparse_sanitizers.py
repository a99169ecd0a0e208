"""The kernels of target sparse-cpu alone, in C++, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from graphprune.targets.sparse_cpu import building

_KERNELS = Path(building.__file__).parent / "kernels"
_MAIN = Path(__file__).parent / "sparse_kernels" / "main.cpp"
_SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
_FLAGS = ("-std=c++20", "-O1", "-g", "-w", "-ffp-contract=off", *_SANITIZERS)
_LACKING = 77  # what main.cpp ends with where the CPU lacks the instruction set


def _compile(sources: list[Path], binary: Path) -> subprocess.CompletedProcess[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *_FLAGS, f"-I{_KERNELS}", *map(str, sources), "-o", str(binary)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program; skips where no compiler is there, or one without the sanitizers' libraries."""
    folder = tmp_path_factory.mktemp("sanitizers")
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    try:
        tried = _compile([empty], folder / "empty")
    except OSError as error:
        pytest.skip(f"no C++ compiler: {error}")
    if tried.returncode:
        pytest.skip(f"no sanitizers: {tried.stderr}")
    sources = [path for path in sorted(_KERNELS.glob("*.cpp")) if path.name != "operators.cpp"]  # that one needs torch
    done = _compile([*sources, _MAIN], folder / "checks")
    assert done.returncode == 0, done.stderr
    return folder / "checks"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_nothing_outside_of_the_buffers_is_touched(checks: Path, isa: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(checks), isa], capture_output=True, text=True, env=environment)
    if done.returncode == _LACKING:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{isa}: ")


def test_an_unknown_instruction_set_has_no_kernels(checks: Path) -> None:
    assert subprocess.run([str(checks), "sse9"], capture_output=True).returncode == _LACKING
