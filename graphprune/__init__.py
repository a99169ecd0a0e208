"""graphprune: compiler passes that make PyTorch and Hugging Face models sparse and small, and prove the result right.

Trace a model into a ``Program``, run passes on it, train it with the loop you have, export it, verify it::

    import graphprune as gp

    program = gp.transform(model, passes=["insert-masks{pattern=4x1,sparsity=0.8}", "insert-fake-quant"])
    session = gp.training.Session(program, optimizer, total_steps=steps)
    ...
    artifact = gp.export(program, target="onnx", out="out/")

Names are loaded when they are first used, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphprune import training
    from graphprune.artifact.benchmark import benchmark
    from graphprune.artifact.checkpoint import load_program as load
    from graphprune.artifact.checkpoint import save_program as save
    from graphprune.artifact.comparison import Benchmark
    from graphprune.artifact.export import export
    from graphprune.artifact.inspection import inspect
    from graphprune.artifact.sensitivity import Sensitivity
    from graphprune.artifact.sweep import sensitivity
    from graphprune.artifact.tune import tune
    from graphprune.artifact.tuning import Tuning
    from graphprune.artifact.verification import verify
    from graphprune.errors import (
        GraphPruneError,
        LoweringError,
        PassError,
        RecipeError,
        SparsityError,
        TraceError,
        VerifyError,
    )
    from graphprune.ir.program import Program
    from graphprune.ir.properties import Property
    from graphprune.ir.trace import trace
    from graphprune.pipeline.base import DataPass, Pass
    from graphprune.pipeline.recipe import Recipe
    from graphprune.pipeline.target import Target
    from graphprune.pipeline.transform import transform
    from graphprune.reporting.report import report

    __version__: str

__all__ = [
    "Benchmark",
    "DataPass",
    "GraphPruneError",
    "LoweringError",
    "Pass",
    "PassError",
    "Program",
    "Property",
    "Recipe",
    "RecipeError",
    "Sensitivity",
    "SparsityError",
    "Target",
    "TraceError",
    "Tuning",
    "VerifyError",
    "__version__",
    "benchmark",
    "export",
    "inspect",
    "load",
    "report",
    "save",
    "sensitivity",
    "trace",
    "training",
    "transform",
    "tune",
    "verify",
]

_HOMES = {
    "Benchmark": "graphprune.artifact.comparison",
    "DataPass": "graphprune.pipeline.base",
    "GraphPruneError": "graphprune.errors",
    "LoweringError": "graphprune.errors",
    "Pass": "graphprune.pipeline.base",
    "PassError": "graphprune.errors",
    "Program": "graphprune.ir.program",
    "Property": "graphprune.ir.properties",
    "Recipe": "graphprune.pipeline.recipe",
    "RecipeError": "graphprune.errors",
    "Sensitivity": "graphprune.artifact.sensitivity",
    "SparsityError": "graphprune.errors",
    "Target": "graphprune.pipeline.target",
    "TraceError": "graphprune.errors",
    "Tuning": "graphprune.artifact.tuning",
    "VerifyError": "graphprune.errors",
    "benchmark": "graphprune.artifact.benchmark",
    "export": "graphprune.artifact.export",
    "inspect": "graphprune.artifact.inspection",
    "load": "graphprune.artifact.checkpoint:load_program",
    "report": "graphprune.reporting.report",
    "save": "graphprune.artifact.checkpoint:save_program",
    "sensitivity": "graphprune.artifact.sweep",
    "trace": "graphprune.ir.trace",
    "transform": "graphprune.pipeline.transform",
    "tune": "graphprune.artifact.tune",
    "verify": "graphprune.artifact.verification",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("graphprune")
    elif name == "training":
        value = importlib.import_module("graphprune.training")
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(module), attribute or name)
    else:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
