"""Programs for the IPEX tests, saved by one environment and lowered by another.

python -m tests.ipex_programs FOLDER     # what `make test-ipex` does in graphprune's own environment

Each is a folder, with an npz file of inputs and of the outputs that they give beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import graphprune as gp
from graphprune.artifact.samples import make_inputs, run_program
from tests.traced import traced

STATIC = "annotate-quant{preset=ipex},insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
RULE = "pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,scope=local"
KINDS = ("bert_sequence", "distilbert_qa", "vit", "resnet")
MATRIX = tuple(f"{kind}-{pattern}-{way}" for kind in KINDS for pattern in ("dense", "4x1") for way in ("fp32", "int8"))
OTHERS = ("bert_sequence-4x1-qat", "bert_sequence-4x1-dynamic", "bert_sequence-dense-partly")


def make(name: str) -> gp.Program:
    """The Program of a name: model, pattern and way to quantize, with hyphens between them."""
    kind, pattern, way = name.split("-")
    program = traced(kind)
    if kind == "resnet":
        program = gp.transform(program, "fold-conv-bn")
    if pattern == "4x1":
        program = gp.transform(program, f"insert-masks{{{RULE}}}")
    return _WAYS[way](program).eval()


def _static(program: gp.Program) -> gp.Program:
    return gp.transform(program, STATIC, data=make_inputs(program))


def _partly(program: gp.Program) -> gp.Program:
    """The pooler and the output projections stay in float."""
    text = STATIC.replace("preset=ipex", "preset=ipex,exclude=[*pooler*,*.output.dense]")
    return gp.transform(program, text, data=make_inputs(program))


def _dynamic(program: gp.Program) -> gp.Program:
    return gp.transform(program, "dynamic-quant{ops=[linear]}")


def _trained(program: gp.Program) -> gp.Program:
    """Two steps of quantization-aware training; what it finds is not what IPEX would."""
    text = "annotate-quant{preset=ipex,observer=moving-average-min-max},insert-fake-quant"
    program = gp.transform(program, text).train()
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-2)
    gp.training.Session(program, optimizer, total_steps=100).close()
    for inputs in make_inputs(program):
        program(**inputs).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return program


_WAYS: dict[str, Callable[[gp.Program], gp.Program]] = {
    "fp32": lambda program: program,
    "int8": _static,
    "partly": _partly,
    "dynamic": _dynamic,
    "qat": _trained,
}


def save(name: str, folder: Path) -> None:
    """Save a Program, and what it answers, under its name."""
    program = make(name)
    gp.save(program, folder / name, overwrite=True)
    inputs = make_inputs(program)[0]
    outputs = run_program(program, inputs, program.interface.output_names)
    np.savez(folder / f"{name}.npz", **{f"in {key}": value.numpy() for key, value in inputs.items()}, **outputs)


def main() -> None:
    """Save all of them, and say with which torch."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*MATRIX, *OTHERS):
        save(name, folder)
    (folder / "torch.txt").write_text(torch.__version__, encoding="utf-8")


if __name__ == "__main__":
    main()
