"""A process that lowers a BERT for the comparison of whole models, in one or more forms.

    python -P sparse_lowering.py --out FOLDER '{"runtime": "sparse-cpu", "number_format": "fp32", "sparsity": 0.8}'

Each form becomes the artifact ``FOLDER/<name>`` and a line of JSON on standard output, ``{"name", "error"}``; the error is empty where
there is none.
"""

# ruff: noqa: E402 - standard output is put aside before the libraries are imported

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)
sys.path.append(str(Path(__file__).parents[1]))  # at the end, and -P: nothing beside this file shadows a package

from corners import EXPANDED, PRESETS

import graphprune as gp
from benchmarks.measuring import Setting
from benchmarks.quantization import _dense, _samples, _tensors
from benchmarks.sparse_artifacts import Contender

SPARSE = "insert-masks{{pattern=4x1,sparsity={},criterion=magnitude,schedule=one-shot,scope=local}}"
STATIC = "annotate-quant{{preset={}}},insert-observers,calibrate{{progress=false}},insert-fake-quant"
SPARSE_CPU_PRESET = "ipex"
"""Linear layers only, weights with a scale a row, activations of uint8: what the sparse kernels take."""
_CALIBRATION = 8


def main() -> None:
    """Lower what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    for name, value in {"layers": 12, "hidden": 768, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("forms", nargs="+")
    options = parser.parse_args()
    setting = Setting(options.layers, options.hidden, 1, options.length)
    dense = _dense(setting)
    for form in options.forms:
        contender = Contender(**json.loads(form))
        error = ""
        try:
            lower(dense, contender, setting, options.out / contender.name)
        except gp.GraphPruneError as reason:
            error = str(reason)
        print(json.dumps({"name": contender.name, "error": error}), file=ANSWERS)


def lower(dense: gp.Program, contender: Contender, setting: Setting, out: Path) -> None:
    """Prune, quantize and lower.

    Args:
        dense: The model.
        contender: What to make of it.
        setting: Its sizes; calibration samples are as long.
        out: The artifact.

    Raises:
        GraphPruneError: It cannot be lowered.
    """
    program = gp.transform(dense, SPARSE.format(contender.sparsity)) if contender.sparsity else dense
    if contender.number_format == "int8":
        steps = STATIC.format(PRESETS.get(contender.target, SPARSE_CPU_PRESET))
        if contender.target in EXPANDED:
            steps = f"expand-attention,{steps}"
        program = gp.transform(program, steps, data=[_tensors(item) for item in _samples(setting, _CALIBRATION, 1)])
    gp.export(
        program, contender.target, out, per_node=False, fresh=False
    )  # it is run in a new process, and checked there


if __name__ == "__main__":
    main()
