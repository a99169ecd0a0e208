"""The artifacts that the comparison of whole models runs: which there are, whether those in the folder still fit, and making the others."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment

from benchmarks.measuring import Setting
from benchmarks.openvino import WORKER as NNCF_WORKER
from benchmarks.openvino import _quantize
from graphprune.artifact.benchmark import machine
from graphprune.artifact.files import MANIFEST, written
from graphprune.artifact.manifest import versions
from graphprune.pipeline.remote import interpreter, variable

WORKER = Path(__file__).with_name("sparse_lowering.py")
LENGTH = 128
"""Tokens of calibration samples, and for how many the cost model decides."""
_ROOT = Path(__file__).parents[2]
_SOURCES = (
    "targets/sparse_cpu/*.py", "targets/inductor_model/*.py", "graphprune/ir/sparse_operators.py", "graphprune/sparsity/packed.py",
    "passes/*.py",
)  # fmt: skip
"""What a sparse-cpu artifact is made by, kernels not among them: they are compiled where it runs."""


@dataclass(frozen=True)
class Model:
    """A BERT for sequence classification with random weights.

    Attributes:
        layers: How many.
        hidden: Their width, a multiple of 64.
    """

    layers: int = 12
    hidden: int = 768

    def __str__(self) -> str:
        if self.hidden != 768:
            return f"bert, {self.layers} layer{'' if self.layers == 1 else 's'} of {self.hidden}"
        return "bert-base" if self.layers == 12 else f"bert-base, {self.layers} of 12 layers"


@dataclass(frozen=True)
class Contender:
    """An artifact.

    Attributes:
        runtime: Name of the target that it is lowered to; ``nncf`` is what NNCF makes for OpenVINO.
        number_format: ``fp32`` or ``int8``, which is static.
        sparsity: Fraction of zeros in blocks of 4x1; 0 where dense.
    """

    runtime: str
    number_format: str
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """Its folder, such as ``sparse-cpu-fp32-0.8``."""
        return f"{self.runtime}-{self.number_format}-{f'{self.sparsity:g}' if self.sparsity else 'dense'}"

    @property
    def target(self) -> str:
        """The target that runs it."""
        return "openvino" if self.runtime == "nncf" else self.runtime


ONNXRUNTIME, EAGER = Contender("onnx", "fp32"), Contender("torch", "fp32")
DENSE_INT8 = (Contender("openvino", "int8"), Contender("nncf", "int8"))


def required(sparsities: Sequence[float]) -> tuple[Contender, ...]:
    """Those without which there is nothing to compare."""
    sparse = (Contender("sparse-cpu", kind, sparsity) for sparsity in sparsities for kind in ("fp32", "int8"))
    return (*sparse, ONNXRUNTIME, EAGER)


def optional(sparsities: Sequence[float]) -> tuple[Contender, ...]:
    """Those of runtimes that may not be here."""
    return (*DENSE_INT8, *(Contender("deepsparse", kind, item) for item in sparsities for kind in ("fp32", "int8")))


def missing_runtime(contender: Contender) -> str | None:
    """Why a contender cannot run here, and what to do; None where it can."""
    if contender.runtime == "nncf" and environment.interpreter("nncf") is None:
        return "NNCF is not here; `python tools/environment.py --bare nncf` makes an environment for it"
    python = interpreter(contender.target)
    if contender.runtime == "deepsparse":
        fault = "it is not here" if python is None else _fault(python)
        return f"{fault}; `python tools/environment.py deepsparse` makes an environment for it" if fault else None
    module = {"onnx": "onnxruntime", "openvino": "openvino"}.get(contender.target)
    if module is None or python or importlib.util.find_spec(module) is not None:
        return None
    return f'{module} is not here; run: pip install "graphprune[{contender.target}]"'


def find_deepsparse() -> None:
    """Let the environment of DeepSparse that ``tools/environment.py`` made be found, where none is named, and have this checkout."""
    if interpreter("deepsparse") is None and (python := environment.interpreter("deepsparse")) is not None:
        os.environ[variable("deepsparse")] = str(python)
        if _fault(str(python)):
            environment.add_checkout(python)
            _fault.cache_clear()


@functools.cache
def _fault(python: str) -> str:
    """Why DeepSparse cannot be run by a Python; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:  # not here, where graphprune is always found
        command = [python, "-c", "import graphprune, torch, deepsparse"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{python}: {_last(done.stderr)}"


class Store:
    """The folder of a model's artifacts.

    Args:
        out: Folder of the artifacts of all models.
        model: Which.
    """

    def __init__(self, out: Path, model: Model):
        self.model = model
        self.root = out / f"{model.layers}x{model.hidden}"

    def folder(self, contender: Contender) -> Path:
        """What its target opens."""
        path = self.root / contender.name
        return path / "int8" if contender.runtime == "nncf" else path

    def fits(self, contender: Contender) -> bool:
        """Whether it is there, made on this machine by these versions and this source."""
        try:
            known = json.loads(self._stamp(contender).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        file = "model.xml" if contender.runtime == "nncf" else MANIFEST
        return bool(known == self._conditions(contender)) and (self.folder(contender) / file).is_file()

    def mark(self, contender: Contender) -> None:
        """Say what it was made by."""
        with written(self._stamp(contender)) as temporary:
            temporary.write_text(json.dumps(self._conditions(contender), indent=1) + "\n", encoding="utf-8")

    def remove(self, contender: Contender) -> None:
        """Delete it."""
        self._stamp(contender).unlink(missing_ok=True)
        shutil.rmtree(self.root / contender.name, ignore_errors=True)

    def _stamp(self, contender: Contender) -> Path:
        return self.root / f"{contender.name}.json"

    def _conditions(self, contender: Contender) -> dict[str, Any]:
        return {
            **asdict(self.model), **asdict(contender), "machine": machine(), "versions": dict(versions()),
            "source": _digest() if contender.runtime == "sparse-cpu" else "",
        }  # fmt: skip


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def lower(store: Store, wanted: Iterable[Contender]) -> dict[Contender, str]:
    """Make artifacts, two processes at a time.

    Args:
        store: Where.
        wanted: Those that do not fit; NNCF's is made in its own environment.

    Returns:
        Why others could not be made.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    todo = list(wanted)
    for contender in todo:
        store.remove(contender)
    slow = (
        "sparse-cpu",
        "deepsparse",
        "nncf",
    )  # each in a process of its own; the others share what they are made from
    groups = [[contender] for contender in todo if contender.runtime in slow]
    groups.append([contender for contender in todo if contender.runtime not in slow])
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        parts = pool.map(lambda group: _lower(store, group), [group for group in groups if group])
    return {contender: reason for part in parts for contender, reason in part.items()}


def _lower(store: Store, group: Sequence[Contender]) -> dict[Contender, str]:
    """Make some in one process."""
    if group[0].runtime == "nncf":
        return _lower_by_nncf(store, group[0])
    options = ("--out", store.root, "--layers", store.model.layers, "--hidden", store.model.hidden, "--length", LENGTH)
    described = (json.dumps(asdict(contender)) for contender in group)
    command = [sys.executable, "-P", "-W", "ignore", WORKER, *options, *described]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    answers = {item["name"]: item["error"] for item in map(json.loads, done.stdout.splitlines())}
    failed = {}
    for contender in group:
        reason = answers.get(contender.name, f"the process ended with status {done.returncode}: {_last(done.stderr)}")
        if reason:
            failed[contender] = reason
        else:
            store.mark(contender)
    return failed


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was said"


def _lower_by_nncf(store: Store, contender: Contender) -> dict[Contender, str]:
    folder = store.root / contender.name
    folder.mkdir()
    setting = Setting(store.model.layers, store.model.hidden, 1, LENGTH)
    command = [str(environment.interpreter("nncf")), "-P", "-W", "ignore", NNCF_WORKER]
    try:
        _quantize(command, setting, os.cpu_count() or 1, folder)
    except RuntimeError as error:
        return {contender: _last(str(error))}
    shutil.rmtree(folder / "float", ignore_errors=True)
    store.mark(contender)
    return {}
