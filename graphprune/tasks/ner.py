"""Named entities, or any tag of a word: tokens with word numbers in, tags of words out."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError
from graphprune.tasks.in_memory import make_dataset, map_rows
from graphprune.tasks.labels import label_names, match_labels, sorted_labels
from graphprune.tasks.tables import Table
from graphprune.tasks.task import Outputs, Task, labels_missing, logits_of

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_log = logging.getLogger(__name__)
_CHUNK_TAG = re.compile(r"[BIESLUM]-.+")
_SPACE_FIRST = ("bloom", "deberta", "gpt2", "longformer", "roberta", "xlm-roberta-xl")


def tokenizer_arguments(model_type: str) -> dict[str, Any]:
    """What ``AutoTokenizer.from_pretrained`` must be told for words: some byte-level tokenizers need a space before each."""
    return {"add_prefix_space": True} if model_type in _SPACE_FIRST else {}


class NerTask(Task):
    """Each word of a sentence has a tag, such as ``B-location``.

    The first token of a word bears its tag; with ``label_all_tokens`` the others too, ``B-`` as ``I-`` where there is one.
    Features have ``labels`` where the split has tags, -100 for tokens without one. A model's output is ``logits``,
    ``[features, tokens, tags]``. Scores count words: a word that was cut off, or that the tokenizer has no token for, counts
    as predicted ``O`` (transformers' example leaves it out, which flatters recall).
    """

    name = "ner"
    auto_class = "AutoModelForTokenClassification"
    reads_conll = True
    needs_offsets = True  # word numbers come with them

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._indices: dict[str, int] | None = None
        self._examples: dict[str, Dataset] = {}
        self._first_tokens: dict[str, list[Any]] = {}

    @property
    def main_metric(self) -> str:
        """``f1`` of entities; ``accuracy`` where the tags are none of entities."""
        return "f1" if self._entities() else "accuracy"

    @property
    def label_names(self) -> tuple[str, ...]:
        """Tags by the model's index."""
        return label_names(self._labels(), self.config)

    def examples(self, split: str) -> Dataset:
        """Examples of a split: columns ``tokens`` (lists of strings) and, where there are any, ``tags`` (lists of strings)."""
        if split not in self._examples:
            self._examples[split] = self._read(split)
        return self._examples[split]

    def score(self, split: str, outputs: Outputs) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` of whole entities and ``accuracy`` of words, fractions, by seqeval.

        With ``return_entity_level_metrics`` also ``<type>_precision``, ``_recall``, ``_f1`` and ``_number`` of every type.
        Tags that are none of entities, such as parts of speech, have an accuracy only.
        """
        examples = self.examples(split)
        if "tags" not in examples.column_names:
            raise labels_missing(self.sources.table(split), split)
        true = [list(tags) for tags in examples["tags"]]
        found = self._predicted(split, outputs)
        if not self._entities():
            pairs = [a == b for left, right in zip(true, found, strict=True) for a, b in zip(left, right, strict=True)]
            return {"accuracy": float(np.mean(pairs))}
        metrics: Any = importlib.import_module("seqeval.metrics")  # not annotated
        report = metrics.classification_report(true, found, output_dict=True, zero_division=0)
        total = report["micro avg"]
        scores = {"precision": total["precision"], "recall": total["recall"], "f1": total["f1-score"]}
        scores["accuracy"] = metrics.accuracy_score(true, found)
        if self.settings.return_entity_level_metrics:
            for kind in [name for name in report if not name.endswith(" avg")]:
                entity = report[kind]
                values = (entity["precision"], entity["recall"], entity["f1-score"], entity["support"])
                scores |= {
                    f"{kind}_{key}": v for key, v in zip(("precision", "recall", "f1", "number"), values, strict=True)
                }
        return {name: float(value) for name, value in scores.items()}

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Write ``predictions.txt`` (of validation data ``eval_predictions.txt``): the tags of a sentence on each line."""
        path = Path(folder) / ("predictions.txt" if split.startswith("test") else "eval_predictions.txt")
        lines = [" ".join(tags) for tags in self._predicted(split, outputs)]
        with written(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [path]

    def _predicted(self, split: str, outputs: Outputs) -> list[list[str]]:
        """Predicted tag of every word."""
        (logits,) = logits_of(outputs, "logits")
        self._check_rows(split, len(logits))
        names = self.label_names
        if logits.ndim != 3 or logits.shape[2] != len(names):
            raise GraphPruneError(
                f"logits of shape {list(logits.shape)}; they must be [features, tokens, {len(names)}]"
            )
        classes = logits.argmax(axis=2)
        outside = "O" if "O" in names else names[0]
        found = []
        for row, first in enumerate(self._first_tokens[split]):
            if max(first, default=-1) >= classes.shape[1]:
                raise GraphPruneError(f"logits for {classes.shape[1]} tokens; feature {row} has more")
            found.append([names[classes[row, token]] if token >= 0 else outside for token in first])
        return found

    def _entities(self) -> bool:
        return any(_CHUNK_TAG.fullmatch(name) for name in self.label_names)

    def _labels(self) -> dict[str, int]:
        if self._indices is None:
            splits = self.splits()
            trained = "train" in splits
            names: tuple[str, ...] = ()
            for split in ["train"] if trained else splits:
                examples = self.examples(split)
                if "tags" in examples.column_names:
                    known = self._class_names(split)
                    names = known or sorted_labels(tag for tags in examples["tags"] for tag in tags)
                    break
            if not names:
                raise GraphPruneError(
                    f"no split of the data ({', '.join(splits)}) has tags; give training or validation data"
                )
            self._indices = match_labels(names, self.config, training=trained)
        return self._indices

    def _class_names(self, split: str) -> tuple[str, ...]:
        table = self.sources.table(split)
        return table.class_names.get(self._columns(table)[1] or "", ())

    def _columns(self, table: Table) -> tuple[str, str | None]:
        """Names of the columns of tokens and of tags."""
        text = self.settings.text_column_name or next(
            (name for name in ("tokens", "words") if name in table.columns), ""
        )
        kind = f"{self.settings.task_name or 'ner'}_tags"
        tags = self.settings.label_column_name or next(
            (n for n in (kind, "tags", "labels") if n in table.columns), None
        )
        if not text:
            table.column("tokens", "text_column_name")
        table.column(text, "text_column_name")
        return text, tags if tags in table.columns else None

    def _read(self, split: str) -> Dataset:
        table = self.sources.table(split)
        text, column = self._columns(table)
        if column is None and not split.startswith("test"):
            table.column(self.settings.label_column_name or "ner_tags", "label_column_name")
        tokens = [_words(table, row, text, value) for row, value in enumerate(table.columns[text])]
        columns = {"tokens": tokens}
        if column is not None:
            names = table.class_names.get(column)
            columns["tags"] = [
                _words(table, row, column, [names[tag] for tag in value] if names else value)
                for row, value in enumerate(table.columns[column])
            ]
            for row, (left, right) in enumerate(zip(tokens, columns["tags"], strict=True)):
                if len(left) != len(right):
                    raise GraphPruneError(f"{table.where(row)}: {len(left)} tokens and {len(right)} tags")
        return make_dataset(columns, dict.fromkeys(columns, "texts"))

    def _make_features(self, split: str) -> Dataset:
        examples = self.examples(split)
        indices = self._labels()
        if "tags" in examples.column_names:
            self._check_tags(split, indices)
        inner = {index: indices.get(f"I-{name[2:]}", index) for name, index in indices.items() if name.startswith("B-")}
        everywhere = self.settings.label_all_tokens
        encoding = _Encoding(
            self.tokenizer, self.max_length, self.settings.pad_to_max_length, indices, inner, everywhere
        )
        key = f"{encoding.length} {encoding.pad} {indices} {everywhere} {self.tokenizer!r}"
        made = map_rows(examples, encoding, key=key, processes=self.settings.preprocessing_num_workers)
        self._first_tokens[split] = list(made["first_tokens"])
        cut = sum(encoding.length <= len(ids) and first[-1:] == [-1] for ids, first in self._rows(made))
        if cut:
            _log.warning("%s: %d of %d sentences are cut to %d tokens", split, cut, len(made), encoding.length)
        features: Dataset = made.remove_columns("first_tokens")
        return features

    @staticmethod
    def _rows(made: Dataset) -> Any:
        return zip(made["input_ids"], made["first_tokens"], strict=True)

    def _check_tags(self, split: str, indices: Mapping[str, int]) -> None:
        for row, tags in enumerate(self.examples(split)["tags"]):
            for tag in tags:
                if tag not in indices:
                    where = self.sources.table(split).where(row)
                    whose = "training has" if "train" in self.splits() else "the model and the data have"
                    raise GraphPruneError(
                        f"{where}: the tag {tag!r} is not among those that {whose}: {', '.join(indices)}"
                    )


@dataclass(frozen=True)
class _Encoding:
    """Tokenize sentences of words; called with batches of examples. ``first_tokens`` is -1 for words without a token."""

    tokenizer: Any
    length: int
    pad: bool
    indices: Mapping[str, int]
    inner: Mapping[int, int]
    everywhere: bool

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        encoded = self.tokenizer(
            [list(words) for words in rows["tokens"]],
            is_split_into_words=True,
            truncation=True,
            max_length=self.length,
            padding="max_length" if self.pad else False,
        )
        made: dict[str, Any] = dict(encoded)
        made["first_tokens"] = []
        if "tags" in rows:
            made["labels"] = []
        for row, words in enumerate(rows["tokens"]):
            numbers = encoded.word_ids(row)
            first = [-1] * len(words)
            for place, word in reversed(list(enumerate(numbers))):
                if word is not None:
                    first[word] = place
            made["first_tokens"].append(first)
            if "tags" in rows:
                made["labels"].append(self._labels(numbers, first, [self.indices[tag] for tag in rows["tags"][row]]))
        return {**made, "example_index": list(indices), "feature_index": list(indices)}

    def _labels(self, numbers: Sequence[int | None], first: Sequence[int], tags: Sequence[int]) -> list[int]:
        labels = []
        for place, word in enumerate(numbers):
            if word is None:
                labels.append(-100)
            elif first[word] == place:
                labels.append(tags[word])
            else:
                labels.append(self.inner.get(tags[word], tags[word]) if self.everywhere else -100)
        return labels


def _words(table: Table, row: int, column: str, value: object) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise GraphPruneError(
            f"{table.where(row)}: {column!r} is {value!r:.60}; it must be a list with an entry for each word"
        )
    words = [str(item) if isinstance(item, int) else item for item in value]
    for item in words:
        if not isinstance(item, str):
            raise GraphPruneError(f"{table.where(row)}: {column!r} holds {item!r:.60}; it must hold texts")
    return words
