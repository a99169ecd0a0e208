"""Question answering: SQuAD 1.1, SQuAD 2.0 and data of their form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.artifact.files import written
from graphprune.tasks.collation import Collator
from graphprune.tasks.in_memory import add_numbers, map_rows
from graphprune.tasks.qa_answers import Candidates, choose, find_candidates, n_best_lists
from graphprune.tasks.qa_examples import qa_examples
from graphprune.tasks.qa_features import WINDOW_COLUMNS, Windowing, Windows, windows_of
from graphprune.tasks.qa_scores import squad_scores, summary_v1, summary_v2
from graphprune.tasks.task import Outputs, Task, labels_missing, logits_of

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset


class QaTask(Task):
    """Answers are spans of their contexts, found by a start and an end logit for each token.

    Features have ``start_positions`` and ``end_positions`` (of the first answer) where the split has answers. A model's
    outputs are ``start_logits`` and ``end_logits``, each ``[features, tokens]``.
    """

    name = "qa"
    auto_class = "AutoModelForQuestionAnswering"
    label_columns: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    default_length = 384
    needs_offsets = True

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._windowing(labels=False, windows=False).check()
        self._examples: dict[str, Dataset] = {}
        self._windows: dict[str, Windows] = {}

    @property
    def main_metric(self) -> str:
        """``f1``."""
        return "f1"

    @property
    def label_names(self) -> None:
        """None: there are no classes."""
        return None

    def examples(self, split: str) -> Dataset:
        """Examples of a split, one row a question; see :func:`~graphprune.tasks.qa_examples.qa_examples`."""
        if split not in self._examples:
            needed = not split.startswith("test")
            self._examples[split] = qa_examples(self.sources.table(split), self.settings, answers_needed=needed)
        return self._examples[split]

    def windows(self, split: str) -> Windows:
        """Where the tokens of a split's features lie in their contexts."""
        if split not in self._windows:
            self.features(split)
            if split not in self._windows:  # of training data they are made when they are asked for
                self._windows[split] = windows_of(self._tokenized(split, windows=True))
        return self._windows[split]

    def score(self, split: str, outputs: Outputs) -> dict[str, float]:
        """Exact match and F1, in percent as SQuAD's scripts print them.

        Returns:
            ``exact_match`` and ``f1``; with ``version_2_with_negative`` those of
            :func:`~graphprune.tasks.qa_scores.summary_v2`.

        Raises:
            GraphPruneError: The split has no answers, or the logits do not fit its features.
        """
        truths = [answers["text"] for answers in self.examples(split)["answers"]]
        if split.startswith("test") and not any(truths):
            raise labels_missing(self.sources.table(split), split)
        chosen = choose(self._candidates(split, outputs), self._contexts(split), threshold=self._threshold())
        if self._threshold() is None:
            return summary_v1(*squad_scores(chosen.texts, truths))
        return summary_v2(chosen.texts, truths, chosen.non_null, chosen.null_odds)

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Write ``<eval or predict>_predictions.json``, ``..._nbest_predictions.json`` and ``..._null_odds.json``.

        The first maps ids to answers, the form that SQuAD's scripts read; the last is written with
        ``version_2_with_negative`` only.
        """
        ids = list(self.examples(split)["id"])
        contexts = self._contexts(split)
        found = self._candidates(split, outputs)
        threshold = self._threshold()
        chosen = choose(found, contexts, threshold=threshold)
        listed = n_best_lists(found, contexts, self.settings.n_best_size, with_null=threshold is not None)
        contents: dict[str, list[Any]] = {"predictions": chosen.texts, "nbest_predictions": listed}
        if threshold is not None:
            contents["null_odds"] = [float(value) for value in chosen.null_odds]
        paths = []
        for name, values in contents.items():
            path = Path(folder) / f"{'predict' if split.startswith('test') else 'eval'}_{name}.json"
            with written(path) as temporary:
                content = json.dumps(dict(zip(ids, values, strict=True)), indent=4)
                temporary.write_text(content + "\n", encoding="utf-8")
            paths.append(path)
        return paths

    def collator(self, *, keep: Sequence[str] = (), multiple: int | None = None) -> Collator:
        """As of every task; padding always goes behind the tokens, so that positions hold."""
        return replace(super().collator(keep=keep, multiple=multiple), left=False)

    def _threshold(self) -> float | None:
        return self.settings.null_score_diff_threshold if self.settings.version_2_with_negative else None

    def _contexts(self, split: str) -> list[str]:
        return list(self.examples(split)["context"])

    def _candidates(self, split: str, outputs: Outputs) -> Candidates:
        start, end = logits_of(outputs, "start_logits", "end_logits")
        self._check_rows(split, len(start))
        return find_candidates(
            self.windows(split),
            len(self.examples(split)),
            start,
            end,
            n_best=self.settings.n_best_size,
            max_answer_length=self.settings.max_answer_length,
        )

    def _make_features(self, split: str) -> Dataset:
        made = self._tokenized(split, windows=split != "train")
        if split != "train":
            self._windows[split] = windows_of(made)
            made = made.remove_columns(list(WINDOW_COLUMNS))
        return add_numbers(made, "feature_index")

    def _tokenized(self, split: str, *, windows: bool) -> Dataset:
        examples = self.examples(split)
        labels = any(answers["text"] for answers in examples["answers"])
        windowing = self._windowing(labels=labels, windows=windows)
        key = f"{windowing.length} {windowing.stride} {windowing.pad} {labels} {windows} {self.tokenizer!r}"
        return map_rows(examples, windowing, key=key, processes=self.settings.preprocessing_num_workers)

    def _windowing(self, *, labels: bool, windows: bool) -> Windowing:
        pad = self.settings.pad_to_max_length or self.tokenizer.padding_side == "left"  # positions must not move
        return Windowing(self.tokenizer, self.max_length, self.settings.doc_stride, pad, labels, windows)
