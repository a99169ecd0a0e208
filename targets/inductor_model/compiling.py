"""From a Program to an AOTInductor package, through ``torch.export`` and the C++ compiler of the machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.pipeline.quiet import quiet

FIRST = 2
_OTHERS = (128, 32, 8)
"""Free sizes to export with: the first dimension, and the others. Inductor decides by them what is worth threads, so that they must not be
small; where a model takes no longer inputs, the next one is tried."""
_LOGGERS = ("torch.export", "torch._export", "torch._inductor", "torch._dynamo", "torch._functorch")


def check_compiler() -> None:
    """Find the C++ compiler that Inductor will call.

    Raises:
        LoweringError: There is none.
    """
    import torch._inductor.config as config

    known = config.cpp.cxx  # CXX, as it was when torch was loaded
    command = str(known[-1] if isinstance(known, (tuple, list)) else known)
    try:
        subprocess.run([*shlex.split(command), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise LoweringError(
            f"target inductor needs a C++ compiler, and {command} cannot be run ({error}); run: apt-get install g++ (Debian, Ubuntu) or "
            f"brew install llvm libomp (macOS), or name one in the environment variable CXX"
        ) from error


def compile_package(program: Program, path: Path, first: int = FIRST) -> list[list[int | None]]:
    """Compile a Program and write the package.

    Args:
        program: From ``rewriting``; its quantizers are rewritten.
        path: Where the package goes; ends in ``.pt2``.
        first: Free size of the first dimension to export with.

    Returns:
        For each input the largest size of each dimension that the package can take; None where there is no limit.

    Raises:
        LoweringError: Export or compilation failed; names the operator and where it comes from, where that can be told.
    """
    check_compiler()
    with torch.no_grad(), quiet(*_LOGGERS), _own_cache(), _unfolded():
        try:
            exported = _export(program, first)
            largest = _limits(program, exported)
            inductor: Any = torch._inductor
            inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=_options())
        except LoweringError:
            raise
        except Exception as error:  # every stage of the compiler raises what it likes
            raise LoweringError(_explain(program, error)) from error
    return largest


def _export(program: Program, first: int) -> Any:
    """Export with the largest free sizes that the model takes."""
    shapes = _dynamic_shapes(program)
    for size in _OTHERS:
        try:
            return torch.export.export(
                program, (), _examples(program, first, size), dynamic_shapes=shapes, strict=False
            )
        except (RuntimeError, ValueError):
            # Only trying tells how long inputs may be (a table of positions is added, say); whatever else is wrong
            # fails with the shortest too.
            if size == _OTHERS[-1]:
                raise
    raise AssertionError


def _examples(program: Program, first: int, other: int) -> dict[str, Tensor]:
    """Tensors to export with, by name: fixed sizes as traced."""
    return {
        item.name: torch.ones(
            [size if isinstance(size, int) else other if dim else first for dim, size in enumerate(item.shape)],
            dtype=item.dtype,
        )
        for item in program.interface.inputs
    }


def _dynamic_shapes(program: Program) -> dict[str, dict[int, object]]:
    auto = torch.export.Dim.AUTO  # sizes of one name become one size again by the guards that made them one
    return {
        item.name: {dim: auto for dim, size in enumerate(item.shape) if not isinstance(size, int)}
        for item in program.interface.inputs
    }


def _limits(program: Program, exported: Any) -> list[list[int | None]]:
    """Largest sizes of the inputs, from the constraints of the export."""
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    values = values[len(values) - len(program.interface.inputs) :]  # parameters and buffers come first
    ranges = {str(symbol): limits for symbol, limits in exported.range_constraints.items()}
    found: list[list[int | None]] = []
    for item, value in zip(program.interface.inputs, values, strict=True):
        largest: list[int | None] = []
        for dim, (stated, size) in enumerate(zip(item.shape, value.shape, strict=True)):
            if not isinstance(stated, int) and isinstance(size, int):
                raise LoweringError(
                    f"dimension {dim} of input {item.name} must be free and came out fixed to {size}; trace the model with "
                    f"sizes that differ"
                )
            upper = getattr(ranges.get(str(size)), "upper", None)
            bounded = upper is not None and str(upper).isdigit() and int(upper) < 2**31
            largest.append(size if isinstance(size, int) else int(upper) if bounded else None)  # type: ignore[arg-type]
        found.append(largest)
    return found


def _options() -> dict[str, object]:
    """Inductor's options; see docs/targets-inductor.md."""
    import torch._inductor.config as config

    options: dict[str, object] = {
        "freezing": True,  # the integer patterns match constants only
        "cpp.dynamic_threads": True,  # else the number of threads of this process is compiled in
        "cpp.threads": max(2, os.cpu_count() or 2),
        "always_keep_tensor_constants": True,  # else the scales of a small layer are numbers in the code
        "compile_threads": 1,  # no pool of processes that outlives the call
        "force_disable_caches": True,
        "aot_inductor.precompile_headers": False,  # gains a second, takes seven, and stays behind in a cache
        "aot_inductor.metadata": {},  # the default is one dictionary for all, which a compilation changes
    }
    if hasattr(config.cpp, "march"):
        options["cpp.march"] = ""  # else native: instructions that no check at loading knows of
    return options


@contextmanager
def _own_cache() -> Iterator[None]:
    """Compile in a folder of its own: a cache names folders by code alone, and two models may differ in weights only."""
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(prefix="graphprune-", ignore_cleanup_errors=True) as folder,
        fresh_cache(dir=folder),
    ):
        yield


@contextmanager
def _unfolded() -> Iterator[None]:
    """Keep Inductor from folding sums and products behind a layer into its weight: the file has the weights of the Program."""
    import torch._inductor.fx_passes.freezing_patterns as patterns
    from torch._inductor.pattern_matcher import PatternMatcherPass

    known = patterns.binary_folding_pass
    patterns.lazy_init()  # registers into the one that is there
    patterns.binary_folding_pass = PatternMatcherPass()
    try:
        yield
    finally:
        patterns.binary_folding_pass = known


def _explain(program: Program, error: BaseException) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    named = re.search(r"\b((?:aten|prims|quantized_decomposed)\.\w+(?:\.\w+)?)", "\n".join(str(item) for item in chain))
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    reason = f"{type(chain[-1]).__name__}: {lines[0] if lines else ''}"
    where = ""
    if named:
        nodes = (node for node in program.nodes() if node.op == "call_function")
        node = next((node for node in nodes if str(node.target).startswith(named[1])), None)
        where = f" at {origin(node) if node is not None else named[1]}"
    return (
        f"{program.name} cannot be compiled by Inductor{where}. {reason}. An operator that it has no form for has to be "
        f"rewritten in the model or by a pass before lowering"
    )
