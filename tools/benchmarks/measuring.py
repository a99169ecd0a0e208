"""What all measurements share: the setting, the model, ratios with goals, and runs that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

MASKS = "insert-masks{pattern=4x1,sparsity=0.8,warm_up=0,cool_down=2,frequency=100}"
TOTAL_STEPS = 1_000_000
LAST_UPDATE, BETWEEN = TOTAL_STEPS - 3, 1
"""Steps of a session: the update that reaches the whole sparsity, and one without an update."""


class Unavailable(Exception):
    """A measurement that cannot be made here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        layers: Layers of the BERT; 12 is BERT-base.
        hidden: Width, a multiple of 64.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        repeats: Rounds of interleaved runs that count.
    """

    layers: int = 12
    hidden: int = 768
    batch: int = 8
    length: int = 128
    repeats: int = 7

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.length} tokens, {self.layers} layers of {self.hidden}"


@dataclass(frozen=True)
class Measure:
    """One ratio and its goal."""

    name: str
    ratio: float
    goal: str
    met: bool
    detail: str


def at_most(name: str, ratio: float, goal: float, detail: str) -> Measure:
    """A measure that meets its goal where it is not larger."""
    return Measure(name, ratio, f"<= {goal:.4g}", ratio <= goal, detail)


def bert(setting: Setting) -> nn.Module:
    """A BERT with random weights, in training mode."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=setting.layers, hidden_size=setting.hidden, intermediate_size=4 * setting.hidden,
        num_attention_heads=setting.hidden // 64, attn_implementation="sdpa",
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def random_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens with labels."""
    ids = torch.randint(0, 30000, (setting.batch, setting.length), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(setting.batch, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def medians(runs: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median of the seconds that each run returns; they take turns, and the first rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + warm_up):
        for name, run in runs.items():
            spent = run()
            if index >= warm_up:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same run, returning its seconds."""

    def clocked() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return clocked
