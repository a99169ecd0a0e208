"""IPEX's side: lowers saved Programs in its own environment, runs them and answers JSON lines.

    python -P ipex_worker.py --folder FOLDER --threads 2     # -P: nothing beside this file shadows a package

Each folder in ``FOLDER`` is a saved Program; its name is that of a run, and ``eager`` is the source model of ``fp32`` as torch runs it.
The first line on standard output says that all is ready; then each line on standard input, ``{"run": NAME}``, is answered by
``{"seconds": ...}``. The clock runs here, so the pipe costs nothing.
"""

# ruff: noqa: E402 - standard output is put aside before the libraries are imported

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)  # the libraries' own prints must not come between the answers

import intel_extension_for_pytorch
import torch
import transformers

import graphprune as gp
from graphprune.ir.source_model import source_model
from graphprune.targets.ipex import Ipex


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, 30000, (1, options.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    runs: dict[str, Callable[[], object]] = {}
    for path in sorted(options.folder.iterdir()):
        program = gp.load(path)
        if path.name == "fp32":
            runs["eager"] = functools.partial(source_model(program), **batch)
        folder = gp.export(program, Ipex(), options.folder / f"{path.name}-lowered").folder
        lowered = Ipex().open(folder, options.threads)
        runs[path.name] = functools.partial(lowered, {name: value.numpy() for name, value in batch.items()})
    packages = (intel_extension_for_pytorch, torch, transformers)
    ready = {"runs": list(runs), "versions": {module.__name__: module.__version__ for module in packages}}
    print(json.dumps(ready), file=ANSWERS)
    for line in sys.stdin:
        run = runs[json.loads(line)["run"]]
        with torch.no_grad():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds}), file=ANSWERS)


if __name__ == "__main__":
    main()
