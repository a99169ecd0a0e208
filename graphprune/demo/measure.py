"""Measure the demo's files: sparsity, agreement with the teacher, size and latency, all on the lowered files themselves."""

from __future__ import annotations

import gzip
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.artifact.export import Artifact
from graphprune.demo.corpus import pad
from graphprune.pipeline.target import Run
from graphprune.training.losses import mean_pool


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        name: Which corner: dense or sparse, fp32 or int8; with ``sparse-cpu`` the sparse one in kernels that skip zeros, the others are
            run by onnxruntime.
        sparsity: Of the 36 encoder weights, in blocks of 4x1, measured in the file.
        cosine: Mean cosine to the teacher's embeddings on held-out sentences.
        retrieval: How often the nearest other held-out sentence is the one that the teacher finds.
        size: Bytes of the model file.
        zipped: Bytes after gzip.
        latency: Median time over the median time of dense fp32.
    """

    name: str
    sparsity: float
    cosine: float
    retrieval: float
    size: int
    zipped: int
    latency: float


def embed(run: Run, items: Sequence[Sequence[int]], batch: int = 32) -> Tensor:
    """Normalized sentence embeddings, ``[sentences, features]``."""
    parts = []
    for start in range(0, len(items), batch):
        ids, mask = pad(items[start : start + batch])
        hidden = run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["last_hidden_state"]
        parts.append(nn.functional.normalize(mean_pool(torch.from_numpy(hidden), mask), dim=-1))
    return torch.cat(parts)


def agreement(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Mean cosine, and how often both find the same nearest neighbor among the other sentences."""
    cosine = float((student * teacher).sum(-1).mean())
    nearest = []
    for embeddings in (student, teacher):
        similarity = embeddings @ embeddings.T
        nearest.append(similarity.fill_diagonal_(-2).argmax(-1))
    return cosine, float((nearest[0] == nearest[1]).float().mean())


def zipped_size(path: Path) -> int:
    """Bytes of a file after gzip at level 6."""
    with tempfile.TemporaryFile() as target:
        with path.open("rb") as source, gzip.GzipFile(fileobj=target, mode="wb", compresslevel=6, mtime=0) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        return target.tell()


def latency_ratios(runs: Mapping[str, Run], inputs: Mapping[str, np.ndarray], repeats: int) -> dict[str, float]:
    """Median times of interleaved runs, over that of the first.

    Args:
        runs: Models by name; the first is the base.
        inputs: One batch.
        repeats: Rounds; in each, every model runs once, after two rounds of warm-up, and each time after a run that does not count,
            since threads of the runtime before it go on spinning for a while.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 2):
        for name, run in runs.items():
            run(inputs)
            start = time.perf_counter()
            run(inputs)
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(times.values())))
    return {name: statistics.median(values) / base for name, values in times.items()}


def model_file(artifact: Artifact) -> Path:
    """The model file of an artifact: its largest file."""
    entry = max(artifact.manifest.files, key=lambda item: item.bytes)
    return artifact.folder / entry.name
