"""DeepSparse's engine: compiled for the sizes of its inputs, and asked which operators it takes.

``python engine.py MODEL SHAPES`` compiles a model and prints the fraction of operators that it takes; what the engine prints beside that
says which it does not take, and why. This file needs no torch, so that such a process starts fast.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.errors import LoweringError

Shapes = Mapping[str, Sequence[int]]
"""Sizes of each input of a model, by its name."""

_OFFLINE = {"NM_DISABLE_ANALYTICS": "1", "NM_VERSION_CHECK": "false"}
"""Environment variables that keep DeepSparse and sparsezoo from reporting usage and from asking for newer versions."""
_RESULT = "graphprune: "


@dataclass(frozen=True)
class Examined:
    """What the engine takes of a model.

    Attributes:
        fraction: Of the operators, as the engine counts them after its own folding.
        left: Operators that it leaves to the onnxruntime inside it: their types and names.
        reasons: What it says of them.
    """

    fraction: float
    left: tuple[str, ...]
    reasons: tuple[str, ...]


class Engines:
    """A model, compiled for every set of input sizes that it meets.

    Attributes:
        path: The model.
    """

    def __init__(self, path: Path, threads: int | None, allow_fallback: bool) -> None:
        """Nothing is read before the first run: who asks for weights only does not wait for DeepSparse.

        Args:
            path: The model; it is left as it is, where the engine would write sizes into it.
            threads: Cores to run on; None takes all.
            allow_fallback: Run a model that the engine does not take in full.
        """
        self.path = path
        self._threads, self._allow_fallback = threads, allow_fallback
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; new sizes are compiled first, which takes seconds.

        Raises:
            LoweringError: An input is missing, its sizes do not fit, or the engine does not take the whole model at them.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise LoweringError(f"input {missing[0]!r} is missing; {self.path.name} takes {', '.join(self._inputs)}")
        arrays = [np.ascontiguousarray(inputs[name]) for name in self._inputs]
        key = tuple(array.shape for array in arrays)
        if key not in self._compiled:
            self._compiled[key] = self.compile(dict(zip(self._inputs, key, strict=True)))
        return dict(zip(self._outputs, self._compiled[key].run(arrays), strict=True))

    @cached_property
    def _model(self) -> Any:
        onnx: Any = importlib.import_module("onnx")
        try:
            return onnx.load(str(self.path))
        except Exception as error:  # protobuf has exceptions of its own
            raise LoweringError(f"cannot read {self.path}: {error}; lower the Program again") from error

    @cached_property
    def _inputs(self) -> list[str]:
        return [item.name for item in self._model.graph.input]

    @cached_property
    def _outputs(self) -> list[str]:
        return [item.name for item in self._model.graph.output]

    def compile(self, shapes: Shapes) -> Any:
        """A ``deepsparse.Engine`` for some sizes.

        Raises:
            LoweringError: They do not fit, or the engine does not take the whole model at them.
        """
        for item in self._model.graph.input:
            dims, sizes = item.type.tensor_type.shape.dim, list(shapes[item.name])
            fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
            stated = [None if dim.dim_param else size for dim, size in zip(dims, fixed, strict=True)]
            if len(stated) != len(sizes) or any(
                want not in (None, have) for want, have in zip(stated, sizes, strict=True)
            ):
                wanted = ", ".join(str(dim.dim_param or dim.dim_value) for dim in dims)
                raise LoweringError(f"input {item.name!r} has sizes {sizes}; {self.path.name} takes [{wanted}]")
        engine = self._compile(shapes)
        fraction = float(engine.fraction_of_supported_ops)
        if fraction < 1.0 and not self._allow_fallback:
            raise LoweringError(
                f"DeepSparse takes {fraction:.1%} of the operators of {self.path.name} at the sizes "
                f"{', '.join(f'{name} {list(sizes)}' for name, sizes in shapes.items())} and leaves the rest to onnxruntime; export "
                f"with allow_fallback=true to run it all the same"
            )
        return engine

    def _compile(self, shapes: Shapes) -> Any:
        stay_offline()
        onnx: Any = importlib.import_module("onnx")
        library: Any = importlib.import_module("deepsparse")
        sized = onnx.ModelProto()
        sized.CopyFrom(self._model)
        for item in sized.graph.input:
            for dim, size in zip(item.type.tensor_type.shape.dim, shapes[item.name], strict=True):
                dim.dim_value = size
        first = {sizes[0] for sizes in shapes.values() if len(sizes)}
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            path = str(Path(folder) / "model.onnx")
            onnx.save(sized, path)
            try:
                return library.Engine(
                    path, batch_size=first.pop() if len(first) == 1 else None, num_cores=self._threads
                )
            except Exception as error:  # the engine has exceptions of its own
                raise LoweringError(f"DeepSparse cannot compile {self.path.name}: {error}") from error


def stay_offline() -> None:
    """Switch off what DeepSparse would send; call it before it is imported."""
    os.environ.update(_OFFLINE)


def examine(python: str, path: Path, shapes: Shapes) -> Examined:
    """Compile a model in a process of its own, which tells what the engine takes.

    Args:
        python: The Python of an environment that has DeepSparse and graphprune.
        path: The model.
        shapes: Sizes of its inputs.

    Raises:
        LoweringError: The engine stops at the model, or the process does not run.
    """
    command = [
        python,
        "-P",  # the modules beside this file have names of their own
        str(Path(__file__).resolve()),
        str(path),
        json.dumps({name: list(sizes) for name, sizes in shapes.items()}),
    ]
    environment = {**os.environ, **_OFFLINE, "NM_LOGGING_LEVEL": "diagnose"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    said = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
    result = next((line for line in said.splitlines() if line.startswith(_RESULT)), None)
    if result is None:
        stop = re.search(r"Assertion at \S+?:\d+", said)
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        why = stop[0] if stop is not None else lines[-1] if lines else "nothing was said"
        raise LoweringError(
            f"DeepSparse does not take {path.name}: {why} (exit code {done.returncode}, {python}). Lower it without quantization to see "
            f"whether that is what it stops at"
        )
    return Examined(float(result.removeprefix(_RESULT)), *read_log(said))


def read_log(said: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Operators that the engine left, as ``type name``, and its reasons, out of what it printed at the level ``diagnose``."""
    everything: dict[str, None] = {}
    taken: set[str] = set()
    reasons: dict[str, None] = {}
    listed: dict[str, None] | None = None
    pending: dict[str, None] = {}
    for line in said.splitlines():
        node = re.match(r"Node \d+: (\S+ \S+)", line)
        if node is not None and listed is not None:
            listed[node[1]] = None
        elif "Printing GraphViewer" in line:
            listed = everything
        elif "Printing subgraph" in line:
            taken.update(pending)
            pending = listed = {}
        elif "FAILED TO COMPILE" in line:
            pending = {}
        elif "ALL OPS SUPPORTED" in line or "PATTERNS MATCHED" in line or "Beginning new subgraph" in line:
            listed = None
        unsupported = re.search(r"\] Unsupported (.*)|^Message: (.*)", line)
        if unsupported is not None:
            reasons[(unsupported[1] or unsupported[2]).strip()] = None
    taken.update(pending)
    return tuple(name for name in everything if name not in taken), tuple(reasons)


def _main(path: str, shapes: str) -> None:
    engine = Engines(Path(path), None, True).compile(json.loads(shapes))
    print(f"{_RESULT}{float(engine.fraction_of_supported_ops)}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
