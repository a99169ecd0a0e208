"""Which data a fine-tuning command reads and how it becomes features: one dataclass, its fields the flags' names.

The names are those of transformers' ``run_qa.py``, ``run_glue.py`` and ``run_ner.py``, so that commands written for them
keep their meaning; ``HfArgumentParser(DataSettings)`` makes the flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from graphprune.errors import RecipeError

_POSITIVE = (
    "max_seq_length",
    "max_train_samples",
    "max_eval_samples",
    "max_predict_samples",
    "preprocessing_num_workers",
    "n_best_size",
    "max_answer_length",
)


def flag(default: Any, text: str) -> Any:
    """A field that ``HfArgumentParser`` makes a flag of, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataSettings:
    """Sources, columns, sizes and the options of question answering and named entities.

    Raises:
        RecipeError: A value is out of its range, or two exclude each other.
    """

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = flag(None, "A dataset of the hub, or a folder that datasets can load.")
    dataset_config_name: str | None = flag(None, "Its configuration.")
    task_name: str | None = flag(
        None, "A task of GLUE (sst2, mrpc, qqp, mnli, qnli, rte, cola, stsb, wnli): columns, labels and metrics."
    )
    train_file: str | None = flag(None, "Training data: .json, .jsonl, .csv, .tsv or CoNLL columns, plain or .gz.")
    validation_file: str | None = flag(None, "Data to evaluate on, of the same formats.")
    test_file: str | None = flag(None, "Data to predict, of the same formats; it may lack labels.")
    validation_split_percentage: int | None = flag(
        None,
        "Where there is no validation data, hold back this many percent of the training data, drawn with a fixed seed.",
    )

    question_column_name: str = flag("question", "Question answering: column of the question.")
    context_column_name: str = flag("context", "Question answering: column of the text that holds the answer.")
    answer_column_name: str = flag("answers", "Question answering: column of the answers.")
    text_column_name: str | None = flag(
        None, "Column of the text, or two as first,second; of the tokens for named entities. Found where not given."
    )
    label_column_name: str | None = flag(None, "Column of the label, or of the tags. Found where not given.")

    max_seq_length: int | None = flag(
        None, "Most tokens of a feature, special ones included; 384 for question answering, 128 for other tasks."
    )
    pad_to_max_length: bool = flag(False, "Pad every feature to max_seq_length, instead of a batch to its longest.")
    max_train_samples: int | None = flag(None, "Use this many training examples, the first ones.")
    max_eval_samples: int | None = flag(None, "Use this many validation examples, the first ones.")
    max_predict_samples: int | None = flag(None, "Use this many test examples, the first ones.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize.")
    overwrite_cache: bool = flag(
        False, "Accepted for older commands: features are made anew in memory at every run and never cached."
    )

    doc_stride: int = flag(128, "Question answering: tokens that two windows of a long context share.")
    version_2_with_negative: bool = flag(False, "Some questions have no answer, as in SQuAD 2.0.")
    null_score_diff_threshold: float = flag(
        0.0, "Give no answer where its score exceeds that of the best answer by more than this."
    )
    n_best_size: int = flag(20, "Start and end positions to combine, and answers to keep, for a question.")
    max_answer_length: int = flag(30, "Most tokens of an answer.")

    label_all_tokens: bool = flag(False, "Named entities: label all tokens of a word, not only its first.")
    return_entity_level_metrics: bool = flag(False, "Named entities: also the scores of every entity type.")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._at_least(name, 1)
        self._at_least("doc_stride", 0)
        percent = self.validation_split_percentage
        if percent is not None and not 0 < percent < 100:
            raise RecipeError(f"validation_split_percentage is {percent}; it must lie between 1 and 99")
        if self.dataset_name and (self.train_file or self.validation_file or self.test_file):
            raise RecipeError(
                "dataset_name and train_file, validation_file or test_file were given; the data comes from one or the other"
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise RecipeError(f"{name} is {value}; it must be at least {least}")

    def limit(self, split: str) -> int | None:
        """Most examples to use of a split (``train``, ``validation...``, ``test...``); None for all."""
        kind = split.split("_")[0]
        return {"train": self.max_train_samples, "validation": self.max_eval_samples}.get(
            kind, self.max_predict_samples
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all fields."""
        return tuple(item.name for item in fields(cls))
