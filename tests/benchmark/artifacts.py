"""Artifacts to compare, and a process that takes the times that a test wants."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.artifact.manifest import Manifest
from graphprune.artifact.samples import read_samples
from graphprune.pipeline.target import Target
from tests.traced import traced

SPARSE = "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,scope=local}"
LATENCY = {"dense": 0.08, "sparse": 0.04, "dense-int8": 0.02, "sparse-int8": 0.01}


def make_artifacts(root: Path) -> Path:
    """The four corners of an mlp, one of them with fixed sizes, and a tiny BERT, lowered to ONNX."""
    dense = traced("mlp")
    programs = {"dense": dense, "sparse": gp.transform(dense, SPARSE)}
    programs |= {f"{key}-int8": gp.transform(value, "dynamic-quant") for key, value in programs.items()}
    for key, program in programs.items():
        gp.export(program, "onnx", root / "mlp" / key, per_node=False)
    gp.export(traced("bert_qa"), "onnx", root / "bert", per_node=False)
    shutil.copytree(root / "mlp" / "dense", root / "fixed")
    edited(root / "fixed", lambda content: content["inputs"][0].update(shape=[4, 16]))
    return root


class FakeRemote:
    """Stands for a process: computes the sample's outputs, takes the times of ``LATENCY``, and writes down what was asked."""

    log: list[str]
    answers: Mapping[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]

    def __init__(self, target: Target, folder: Path, *, threads: int | None = None):
        self.folder, self.threads, self.round = folder, threads, 0
        self.log.append(f"open {folder.name} {threads}")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for given, expected in read_samples(self.folder):
            if all(np.array_equal(inputs[name], given[name]) for name in given):
                found = expected
                break
        else:
            batch = len(next(iter(inputs.values())))
            found = {"output": np.full((batch, 4), LATENCY[self.folder.name], dtype=np.float32)}
        change = self.answers.get(self.folder.name)
        return change(found) if change is not None else found

    def time(self, inputs: Mapping[str, np.ndarray], calls: int = 1) -> list[float]:
        self.log.append(f"time {self.folder.name} {calls}")
        self.round += 1
        latency = LATENCY[self.folder.name] * (1 + self.round % 3)  # machines are noisy, for all artifacts alike
        return [9.0, *[latency] * (calls - 1)]

    def peak_memory(self) -> int:
        return 123_000_000

    def __enter__(self) -> FakeRemote:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"close {self.folder.name}")


def edited(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest and make it whole again."""
    content = Manifest.read(folder).model_dump()
    change(content)
    Manifest.model_validate(content).write(folder)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr
