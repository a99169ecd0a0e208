"""Classification and regression of texts and pairs of texts: GLUE's tasks and own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError
from graphprune.tasks import glue_examples as read
from graphprune.tasks.glue_tasks import class_scores, find_task, number_scores
from graphprune.tasks.in_memory import make_dataset, map_rows
from graphprune.tasks.labels import label_names, match_labels, sorted_labels
from graphprune.tasks.task import Outputs, Task, labels_missing, logits_of

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_NO_LABEL = (None, "", "-1")  # of test data


class GlueTask(Task):
    """Texts or pairs of texts have a class or a number.

    ``task_name`` names a task of GLUE, whose columns, labels and scores are known, also where its data comes from files.
    Own data is regression where its labels are fractions, else classification with the labels found. Features have
    ``labels`` where the split has them, int64 or float32. A model's output is ``logits``, ``[features, classes]``, or
    ``[features, 1]`` for regression.
    """

    name = "glue"
    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._task = find_task(self.settings.task_name) if self.settings.task_name else None
        self._examples: dict[str, Dataset] = {}
        self._indices: dict[str, int] | None = None  # by label of the data; empty for regression

    @property
    def main_metric(self) -> str:
        """The task's first score; of own data ``accuracy``, or ``pearson`` for regression."""
        if self._task is not None:
            return self._task.metrics[0]
        return "pearson" if self.label_names is None else "accuracy"

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes by the model's index; None for regression."""
        indices = self._labels()
        return label_names(indices, self.config) if indices else None

    def config_changes(self) -> dict[str, Any]:
        """Also ``problem_type``, so that the loss does not depend on the labels' type."""
        if self.label_names is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {**super().config_changes(), "problem_type": "single_label_classification"}

    def examples(self, split: str) -> Dataset:
        """Examples of a split: columns ``first`` and, for pairs, ``second``, and ``labels`` where there are any."""
        if split not in self._examples:
            self._examples[split] = self._read(split)
        return self._examples[split]

    def score(self, split: str, outputs: Outputs) -> dict[str, float]:
        """The task's scores; ``accuracy`` and ``f1`` for own classes, correlations and ``mse`` for numbers."""
        examples = self.examples(split)
        if "labels" not in examples.column_names:
            raise labels_missing(self.sources.table(split), split)
        predicted = self._predicted(split, outputs)
        true = np.asarray(examples["labels"])
        if self.label_names is None:
            return number_scores(predicted, true)
        classes = len(self.label_names)
        if self._task is not None:
            return class_scores(predicted, true, classes, self._task.metrics)
        scores = class_scores(predicted, true, classes, ("accuracy", "f1"))
        return {name: scores[name] for name in ("accuracy", "f1")}

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Write ``predict_results_<task>.txt`` (of validation data ``eval_predictions_<task>.txt``).

        A header, then a line with number and predicted label of each example, parted by a tab.
        """
        names = self.label_names
        kind = "predict_results" if split.startswith("test") else "eval_predictions"
        task = self.settings.task_name or "own"
        path = Path(folder) / f"{kind}_{task}{'-mm' if split.endswith('mismatched') else ''}.txt"
        lines = ["index\tprediction"]
        for row, value in enumerate(self._predicted(split, outputs).tolist()):
            lines.append(f"{row}\t{value:3.3f}" if names is None else f"{row}\t{names[value]}")
        with written(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [path]

    def _predicted(self, split: str, outputs: Outputs) -> Any:
        (logits,) = logits_of(outputs, "logits")
        self._check_rows(split, len(logits))
        classes = len(self.label_names or (0,))
        if logits.shape[1:] not in ((classes,), () if classes == 1 else (classes,)):
            raise GraphPruneError(f"logits of shape {list(logits.shape)}; they must be [features, {classes}]")
        return logits.reshape(-1) if self.label_names is None else logits.argmax(axis=1)

    def _labels(self) -> dict[str, int]:
        if self._indices is None:
            self._indices = self._find_labels()
        return self._indices

    def _find_labels(self) -> dict[str, int]:
        splits = self.splits()
        if self._task is not None:
            names = self._task.names
            return match_labels(names, self.config, training="train" in splits) if names else {}
        for split in [name for name in splits if name == "train"] or splits:
            table = self.sources.table(split)
            column = read.label_column(table, self.settings, None)
            if column is None:
                if split == "train" or self.settings.label_column_name:
                    table.column(self.settings.label_column_name or "label", "label_column_name")
                continue
            values = read.raw_labels(table, column)
            if column not in table.class_names and read.is_regression(values):
                return {}
            known = table.class_names.get(column) or sorted_labels(str(value) for value in values if value is not None)
            if known:
                return match_labels(known, self.config, training="train" in splits)
        raise GraphPruneError(
            f"no split of the data ({', '.join(splits)}) has labels; give training or validation data"
        )

    def _read(self, split: str) -> Dataset:
        table = self.sources.table(split)
        names = read.text_columns(table, self.settings, self._task)
        columns: dict[str, Sequence[Any]] = {
            kind: table.texts(name, "text_column_name") for kind, name in zip(("first", "second"), names, strict=False)
        }
        kinds = dict.fromkeys(columns, "string")
        column = read.label_column(table, self.settings, self._task)
        values = read.raw_labels(table, column) if column is not None else []
        if column is None and not split.startswith("test"):
            table.column(
                self.settings.label_column_name or (self._task.label[0] if self._task else "label"), "label_column_name"
            )
        blank = all(value in _NO_LABEL for value in values)
        if not blank or (values and not split.startswith("test")):
            columns["labels"] = self._encoded(table, values)
            kinds["labels"] = "int64" if self._labels() else "float32"
        return make_dataset(columns, kinds)

    def _encoded(self, table: Any, values: Sequence[str | float | None]) -> Sequence[Any]:
        indices = self._labels()
        if not indices:
            return read.numbers(table, values)
        if self._task is not None:
            return read.class_indices(table, values, indices, self._task.names, f"{self.settings.task_name} has")
        whose = "training has" if "train" in self.splits() else "the model and the data have"
        return read.class_indices(table, values, indices, (), whose)

    def _make_features(self, split: str) -> Dataset:
        encoding = _Encoding(self.tokenizer, self.max_length, self.settings.pad_to_max_length)
        key = f"{encoding.length} {encoding.pad} {self.tokenizer!r}"
        return map_rows(self.examples(split), encoding, key=key, processes=self.settings.preprocessing_num_workers)


@dataclass(frozen=True)
class _Encoding:
    """Tokenize texts or pairs, cutting the longer; called with batches of examples."""

    tokenizer: Any
    length: int
    pad: bool

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        texts = [list(rows[name]) for name in ("first", "second") if name in rows]
        padding = "max_length" if self.pad else False
        encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.length, padding=padding))
        if "labels" in rows:
            encoded["labels"] = rows["labels"]
        return {**encoded, "example_index": list(indices), "feature_index": list(indices)}
