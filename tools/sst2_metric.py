"""Accuracy on SST-2's dev set, as a metric for ``graphprune tune`` and ``graphprune sensitivity``.

    python tools/sst2.py --row dense --seed 0
    python tools/sst2_metric.py phrases.txt               # training phrases to calibrate with, one a line
    graphprune tune out/sst2/dense-0 --metric tools.sst2_metric:accuracy --data phrases.txt --relative 0.005

The data lies in ``../shared/data``, or where ``GRAPHPRUNE_DATA`` points.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sst2 import accuracy as accuracy_of
from sst2_task import DEV, TRAIN, WEIGHTS, Phrases, data_folder, read_phrases

from graphprune.demo.corpus import tokenize


def accuracy(program: Callable[..., Any]) -> float:
    """Fraction of the 872 dev sentences that a model labels right; larger is better."""
    with torch.no_grad():
        return accuracy_of(program, _dev())


@functools.cache
def _dev() -> Phrases:
    from transformers import AutoTokenizer

    folder = data_folder()
    texts, labels = read_phrases(folder / DEV)
    return Phrases(tokenize(AutoTokenizer.from_pretrained(folder / WEIGHTS), texts, 64), labels)


def main(out: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write the training phrases of SST-2, one a line."""
    texts, _ = read_phrases(data_folder() / TRAIN)
    out.write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
