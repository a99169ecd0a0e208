"""What a fine-tuning task is: its data, its features, and what a model's outputs are worth.

A task reads its splits when they are first needed, tokenizes them in memory and keeps them. Scores are made from the
logits of all features of a split in the features' order, as ``Trainer.predict`` gives them.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.tasks.collation import INDEX_COLUMNS, Collator
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.extra import require_train_extra
from graphprune.tasks.sources import Sources
from graphprune.tasks.tables import Table
from graphprune.training.fingerprints import of_data

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

Outputs = Mapping[str, Any] | Sequence[Any] | NDArray[Any]
"""A model's outputs on all features of a split: logits by name, a tuple of them, or one array."""


class Task(abc.ABC):
    """Data, features and scores of one task.

    Args:
        settings: Where the data is and how to make features of it.
        tokenizer: Of the model, as ``AutoTokenizer`` loads it.
        config: The model's configuration; its label names are kept where they are those of the data.
    """

    name: ClassVar[str]
    """``qa``, ``glue`` or ``ner``."""
    auto_class: ClassVar[str]
    """Class of transformers that loads a model for the task."""
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)
    """Columns of the features that a loss is made from."""
    default_length: ClassVar[int] = 128
    reads_conll: ClassVar[bool] = False
    """Whether files may hold CoNLL columns."""
    needs_offsets: ClassVar[bool] = False

    def __init__(self, settings: DataSettings, tokenizer: Any, config: Any = None):
        require_train_extra()
        self.settings = settings
        self.tokenizer = tokenizer
        self.config = config
        self.sources = Sources(settings, columns=self.reads_conll, glue=self.name == "glue")
        self.max_length = self._max_length()
        if self.needs_offsets and not getattr(tokenizer, "is_fast", False):
            raise GraphPruneError(
                f"{type(tokenizer).__name__} does not say where its tokens lie in the text; task {self.name} needs a fast "
                f"tokenizer (a tokenizer.json in the model's folder, use_fast=True)"
            )
        self._features: dict[str, Dataset] = {}
        self._fingerprints: dict[str, str] = {}

    @property
    @abc.abstractmethod
    def main_metric(self) -> str:
        """Name of the score that says which of two models is better; larger is better."""

    @property
    @abc.abstractmethod
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes by index; None where there are none (question answering, regression)."""

    @abc.abstractmethod
    def score(self, split: str, outputs: Outputs) -> dict[str, float]:
        """Scores of a model on a split.

        Args:
            split: Which.
            outputs: Logits of all features of the split, in their order; positions that the Trainer padded do not count.

        Returns:
            Scores by name. Fractions, but for question answering, whose F1 and exact match are percent, as SQuAD's own
            script prints them.

        Raises:
            GraphPruneError: The split has no labels, or the outputs are not those of its features.
        """

    @abc.abstractmethod
    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Write what a model predicts, in files named as transformers' examples name theirs.

        Args:
            split: Of which; it need not have labels.
            outputs: As for :meth:`score`.
            folder: Where to; it is made.

        Returns:
            The files.
        """

    @abc.abstractmethod
    def _make_features(self, split: str) -> Dataset:
        """Tokenize a split; index columns included."""

    def config_changes(self) -> dict[str, Any]:
        """What the model's configuration must say: ``num_labels``, ``id2label``, ``label2id`` and ``problem_type``."""
        names = self.label_names
        if names is None:
            return {}
        numbered = dict(enumerate(names))
        return {"num_labels": len(names), "id2label": numbered, "label2id": {name: i for i, name in numbered.items()}}

    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are, ``train`` first."""
        return self.sources.splits()

    def features(self, split: str) -> Dataset:
        """Tokenized examples of a split.

        Returns:
            Columns: the model's inputs (lists of integers), labels where the split has them (:attr:`label_columns`), and
            the integers ``example_index`` (row of the example) and ``feature_index`` (row of the feature), which survive
            shuffling and selection and are left out by the collator.

        Raises:
            GraphPruneError: The split does not exist, or one of its examples is malformed.
        """
        if split not in self._features:
            self._features[split] = self._make_features(split)
        return self._features[split]

    def fingerprint(self, split: str) -> str:
        """Hash of the model inputs of a split's features: the same inputs in the same order, and only those, give it.

        Labels do not count: a teacher does not read them.
        """
        if split not in self._fingerprints:
            features = self.features(split)
            inputs = [name for name in features.column_names if name not in (*self.label_columns, *INDEX_COLUMNS)]
            self._fingerprints[split] = of_data(features, inputs)
        return self._fingerprints[split]

    def collator(self, *, keep: Sequence[str] = (), multiple: int | None = None) -> Collator:
        """What makes batches of features: padding to the longest, int64 tensors, no index columns.

        Args:
            keep: Index columns to keep, such as ``feature_index`` for a cache of teacher outputs.
            multiple: Pad to a multiple of this.

        Raises:
            GraphPruneError: An unknown column, or the tokenizer has no padding token.
        """
        for name in keep:
            if name not in INDEX_COLUMNS:
                raise GraphPruneError(f"features have no index column {name!r}{suggest(name, INDEX_COLUMNS)}")
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:
            raise GraphPruneError(
                f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token, and the same id as pad_token_id "
                f"in the model's config"
            )
        paddings = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": -100}
        return Collator(paddings, tokenizer.padding_side == "left", multiple, tuple(keep))

    def _max_length(self) -> int:
        asked = self.settings.max_seq_length
        limits = {"the tokenizer's model_max_length": getattr(self.tokenizer, "model_max_length", None)}
        limits["the model's max_position_embeddings"] = getattr(self.config, "max_position_embeddings", None)
        known = {where: int(limit) for where, limit in limits.items() if isinstance(limit, int) and limit > 0}
        for where, limit in known.items():
            if asked is not None and asked > limit:
                raise RecipeError(f"max_seq_length is {asked}, but {where} is {limit}; give {limit} or less")
        return asked or min([self.default_length, *known.values()])

    def _check_rows(self, split: str, rows: int) -> None:
        wanted = len(self.features(split))
        if rows != wanted:
            raise GraphPruneError(f"outputs of {rows} features for split {split}, which has {wanted}")


def make_task(name: str, settings: DataSettings, tokenizer: Any, config: Any = None) -> Task:
    """The task of a name.

    Args:
        name: ``qa``, ``glue`` or ``ner``.
        settings: Its data.
        tokenizer: Of the model.
        config: Of the model, or None.

    Raises:
        RecipeError: An unknown task, or settings that it cannot work with.
        GraphPruneError: A library is missing, or the tokenizer cannot be used.
    """
    from graphprune.tasks.glue import GlueTask
    from graphprune.tasks.ner import NerTask
    from graphprune.tasks.qa import QaTask

    tasks: dict[str, type[Task]] = {task.name: task for task in (QaTask, GlueTask, NerTask)}
    if name not in tasks:
        raise RecipeError(f"unknown task {name!r}{suggest(name, tasks)}")
    return tasks[name](settings, tokenizer, config)


def logits_of(outputs: Outputs, *names: str) -> list[NDArray[Any]]:
    """The named arrays among a model's outputs; a tuple's first ones, in order.

    Returns:
        One array a name, float32 or float64.

    Raises:
        GraphPruneError: One is missing, or holds NaN.
    """
    if isinstance(outputs, Mapping):
        missing = [name for name in names if name not in outputs]
        if missing:
            raise GraphPruneError(f"outputs have no {missing[0]!r}; they have {', '.join(map(str, outputs))}")
        found = [outputs[name] for name in names]
    else:
        parts = [outputs] if isinstance(outputs, np.ndarray) and len(names) == 1 else list(outputs)
        if len(parts) < len(names):
            raise GraphPruneError(f"{len(parts)} outputs where {', '.join(names)} are needed")
        found = parts[: len(names)]
    arrays = []
    for name, values in zip(names, found, strict=True):
        array = np.asarray(values)
        array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
        if np.isnan(array).any():
            raise GraphPruneError(f"{name} of the model hold NaN; nothing can be scored")
        arrays.append(array)
    return arrays


def labels_missing(table: Table, split: str) -> GraphPruneError:
    """The error of scoring a split without labels."""
    return GraphPruneError(f"{table.name} has no labels; split {split} can be predicted but not scored")
