"""Compile the kernels with the system's compiler, once for each version of their source, and register them with torch."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import LoweringError
from graphprune.ir import sparse_operators as sparse_operators  # defines the operators that the kernels implement

CHOICE = "GRAPHPRUNE_SPARSE_CPU_ISA"
"""Environment variable: avx512, avx2 or portable takes these kernels, torch those of torch alone; else the best that runs here."""
_SOURCES = Path(__file__).parent / "kernels"
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fopenmp", "-w")


def cache_folder() -> Path:
    """Where compiled kernels and measured costs are kept: ``graphprune/sparse-cpu`` in the user's cache (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphprune" / "sparse-cpu"


@functools.cache
def kernel_key(compiler: str = "") -> str:
    """Names a version of the kernels: their source, and what compiles them.

    Args:
        compiler: Its version.
    """
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h", ".inl"))
    content = b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources)
    told = "\0".join((torch.__version__, compiler, *_FLAGS)).encode()
    return hashlib.sha256(content + b"\0" + told).hexdigest()[:16]


@functools.cache
def load_kernels() -> str:
    """Register the kernels in this process, compiled if that was not done before (about a minute).

    Returns:
        The instruction set that runs: ``avx512``, ``avx2`` or ``portable``; ``torch`` where that was asked for.

    Raises:
        LoweringError: There is no compiler, compilation fails, or the instruction set that was asked for does not run here.
    """
    wanted = os.environ.get(CHOICE, "")
    if wanted == "torch":
        return wanted
    if wanted not in ("", "avx512", "avx2", "portable"):
        raise LoweringError(f"{CHOICE}={wanted} is no instruction set; choose avx512, avx2, portable or torch")
    compiler = os.environ.get("CXX", "c++")
    key = kernel_key(_version(compiler))
    folder = cache_folder() / "kernels" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoweringError(
            f"compiled kernels are kept in {folder}, which cannot be made ({error}); name a folder in XDG_CACHE_HOME. {_WITHOUT}"
        ) from error
    try:
        from torch.utils import cpp_extension

        extension: Any = cpp_extension
        with _ninja_on_path():
            extension.load(
                f"graphprune_sparse_cpu_{key}",
                [str(path) for path in sorted(_SOURCES.glob("*.cpp"))],
                extra_cflags=list(_FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except LoweringError:
        raise
    except Exception as error:  # a failed build raises what it likes
        raise LoweringError(
            f"the kernels of target sparse-cpu do not compile with {compiler}: {_reason(error)}. {_WITHOUT}"
        ) from error
    chosen = str(torch.ops.graphprune.sparse_cpu_isa())
    if not chosen:
        raise LoweringError(f"{CHOICE}={wanted}: this CPU does not run it; choose another, or unset it")
    return chosen


_WITHOUT = f"To compute with torch alone, slowly, set {CHOICE}=torch"


def _version(compiler: str) -> str:
    """First line of the compiler's version.

    Raises:
        LoweringError: It cannot be run.
    """
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise LoweringError(
            f"target sparse-cpu compiles its kernels, and the C++ compiler {compiler} cannot be run ({error}); run: apt-get install g++ "
            f"(Debian, Ubuntu), or name one in the environment variable CXX. {_WITHOUT}"
        ) from error
    return done.stdout.splitlines()[0]


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find ninja, which it builds extensions with, beside this Python too: where an environment is not activated.

    Raises:
        LoweringError: There is none.
    """
    before, scripts = os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")
    if shutil.which("ninja") is not None:
        yield
        return
    if shutil.which("ninja", path=scripts) is None:
        raise LoweringError(
            f'target sparse-cpu compiles its kernels with ninja, which is not here; run: pip install "graphprune[sparse-cpu]". {_WITHOUT}'
        )
    os.environ["PATH"] = os.pathsep.join((scripts, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _reason(error: BaseException) -> str:
    said = str(error).splitlines()
    lines = (
        [line for line in said if "error:" in line.lower()]
        or [line for line in said if "error" in line.lower()]
        or said
    )
    return lines[0].strip() if lines else type(error).__name__
