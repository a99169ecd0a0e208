"""What ``sst2.py`` trains: its numbers, its rows, and SST-2 as token ids."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

import graphprune as gp
from graphprune.demo.corpus import pad, tokenize

WEIGHTS = "weights/all-MiniLM-L6-v2-fp16"
TRAIN, DEV = "glue/SST-2/train.tsv.gz", "glue/SST-2/dev.tsv.gz"
DENSE, LONGER = "dense", "dense, trained as long"


@dataclass(frozen=True)
class Settings:
    """Numbers of a run; a finished run counts only under equal ones.

    Attributes:
        phrases: Training phrases, chosen at random once, the same for all rows and seeds; 0 = all.
        length: Most tokens of a phrase.
        tokens: Most tokens in a batch, padding included.
        dense_steps: Optimizer steps of fine-tuning.
        dense_rate: Its peak learning rate.
        prune_steps: Optimizer steps of pruning.
        prune_rate: Its peak learning rate.
        rising: Fraction of steps over which a learning rate rises; then it falls along a cosine.
        warm_up: Fraction of steps before the first mask update.
        cool_down: Fraction of steps after the last.
        frequency: Steps between mask updates.
        logits: Weight of the loss against the dense model's logits.
        hidden: Weight of the loss against its hidden states.
        labels: Weight of the loss against the labels while pruning.
        temperature: Softens the logits.
    """

    phrases: int = 24_000
    length: int = 64
    tokens: int = 256
    dense_steps: int = 1600
    dense_rate: float = 1e-4
    prune_steps: int = 2000
    prune_rate: float = 2e-4
    rising: float = 0.05
    warm_up: float = 0.03
    cool_down: float = 0.6
    frequency: int = 10
    logits: float = 1.0
    hidden: float = 3.0
    labels: float = 0.5
    temperature: float = 2.0

    def of_row(self, row: str) -> dict[str, float]:
        """The numbers that a row depends on: the dense one does not ask how the others are pruned."""
        names = ("phrases", "length", "tokens", "dense_steps", "dense_rate", "rising") if row == DENSE else asdict(self)
        return {name: getattr(self, name) for name in names}

    @classmethod
    def quick(cls) -> Settings:
        """A few steps, to try the machinery; the accuracy says nothing."""
        return cls(phrases=64, tokens=128, dense_steps=4, prune_steps=12, frequency=2)


@dataclass(frozen=True)
class Row:
    """One row of the table: the rule that its model is pruned by; None prunes nothing."""

    name: str
    pattern: str | None = None
    sparsity: float = 0.0

    def passes(self, settings: Settings) -> tuple[str, str]:
        """Mask the encoder's weights; pooler and classifier, untrained in the checkpoint, stay dense."""
        schedule = f"warm_up={settings.warm_up},cool_down={settings.cool_down},frequency={settings.frequency}"
        rule = f"pattern={self.pattern},sparsity={self.sparsity},criterion=snip_momentum,schedule=cubic,{schedule}"
        return 'find-prunable{exclude=["*pooler*"]}', f"insert-masks{{{rule}}}"


ROWS = {
    row.name: row
    for row in (
        Row(DENSE),
        Row("80 % 4x1", "4x1", 0.8),
        Row("2:4", "2:4", 0.5),
        Row("90 % unstructured", "unstructured", 0.9),
        Row(LONGER),
    )
}


@dataclass(frozen=True)
class Phrases:
    """Token ids of each phrase with its label, 0 = negative, 1 = positive."""

    items: list[list[int]]
    labels: list[int]

    def inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A padded batch: ids, mask and labels, int64."""
        ids, mask = pad([self.items[index] for index in indices])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([self.labels[index] for index in indices]),
        }


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        train: Training phrases.
        dev: Phrases that accuracy is measured on.
        load: Makes the model to start from, with a fraction of dropout; its classifier comes from torch's generator.
        tokenizer: What made the tokens, None where they are made up.
    """

    train: Phrases
    dev: Phrases
    load: Callable[[float], Any]
    tokenizer: Any = None


def data_folder() -> Path:
    """Folder of data and weights: ``GRAPHPRUNE_DATA``, else ``../shared/data`` beside the checkout.

    Raises:
        GraphPruneError: A file is missing there.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("GRAPHPRUNE_DATA", beside))
    for name in (TRAIN, DEV, f"{WEIGHTS}/model.safetensors", f"{WEIGHTS}/tokenizer.json"):
        if not (folder / name).is_file():
            raise gp.GraphPruneError(
                f"{folder / name} does not exist; set GRAPHPRUNE_DATA to a folder with SST-2 of GLUE ({TRAIN}, {DEV}: "
                f"gzip of the tables) and the model {WEIGHTS}, or try --quick, which needs neither"
            )
    return folder


def read_phrases(path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of one table of GLUE's SST-2: a header line, then text, tab, 0 or 1.

    Raises:
        GraphPruneError: The file is damaged or not such a table.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header, *lines = file.read().splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise gp.GraphPruneError(f"{path} cannot be read: {error}; fetch it again") from error
    rows = [line.split("\t") for line in lines]
    wrong = next((number for number, row in enumerate(rows, 2) if len(row) != 2 or row[1] not in ("0", "1")), None)
    if header.split("\t") != ["sentence", "label"] or wrong is not None:
        raise gp.GraphPruneError(f"{path}, line {wrong or 1}, is not text, tab, label 0 or 1; it is not GLUE's SST-2")
    return [row[0].strip() for row in rows], [int(row[1]) for row in rows]


def read_task(folder: Path, settings: Settings) -> Task:
    """SST-2 with all-MiniLM-L6-v2."""
    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / WEIGHTS)
    texts, labels = read_phrases(folder / TRAIN)
    chosen = sorted(random.Random(0).sample(range(len(texts)), settings.phrases or len(texts)))
    train = Phrases(
        tokenize(tokenizer, [texts[index] for index in chosen], settings.length), [labels[index] for index in chosen]
    )
    texts, labels = read_phrases(folder / DEV)

    def load(dropout: float) -> Any:
        return transformers.BertForSequenceClassification.from_pretrained(
            folder / WEIGHTS,
            num_labels=2,
            dtype=torch.float32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )

    return Task(train, Phrases(tokenize(tokenizer, texts, settings.length), labels), load, tokenizer)


def made_up_task(settings: Settings) -> Task:
    """A random BERT of two layers and phrases of random tokens; its label says whether a phrase has token 5."""
    generator = random.Random(0)

    def phrases(count: int) -> Phrases:
        items = [[generator.randrange(1, 20) for _ in range(generator.randrange(3, 12))] for _ in range(count)]
        return Phrases(items, [int(5 in item) for item in items])

    def load(dropout: float) -> Any:
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    return Task(phrases(settings.phrases), phrases(32), load)
