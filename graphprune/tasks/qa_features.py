"""Windows of long contexts: tokens, the places of tokens in the text, and answers as token positions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import RecipeError

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_log = logging.getLogger(__name__)
WINDOW_COLUMNS = ("starts", "ends", "null_position")


@dataclass(frozen=True)
class Windows:
    """Where the tokens of a split's features lie in their contexts.

    Attributes:
        example: Row of the example of each feature, int64 ``[features]``, not decreasing.
        starts: First character of each token of the context, int32 ``[features, tokens]``; -1 for other tokens.
        ends: One past its last character.
        null_position: Token that stands for "no answer", int64 ``[features]``: the first of class, 0 where there is none.
    """

    example: NDArray[np.int64]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    null_position: NDArray[np.int64]


@dataclass(frozen=True)
class Windowing:
    """Tokenize questions with their contexts into windows; called with batches of examples.

    Where a tokenizer pads on the left, the context comes first, as in transformers' example.

    Attributes:
        tokenizer: A fast one.
        length: Tokens of a window.
        stride: Tokens that two windows of a context share.
        pad: Whether to pad every window to ``length``.
        labels: Whether to add ``start_positions`` and ``end_positions``, of the first answer; the null position where the
            window does not hold all of it.
        windows: Whether to add the columns of :class:`Windows`.
    """

    tokenizer: Any
    length: int
    stride: int
    pad: bool
    labels: bool
    windows: bool

    def check(self) -> None:
        """Check that windows advance.

        Raises:
            RecipeError: ``stride`` leaves no room beside the special tokens and a question of at least one token.
        """
        special = int(self.tokenizer.num_special_tokens_to_add(pair=True))
        if self.stride + special + 2 > self.length:
            raise RecipeError(
                f"doc_stride is {self.stride} and max_seq_length {self.length}, of which {special} tokens are special: windows "
                f"cannot advance; give a doc_stride of at most {max(self.length - special - 2, 0)} or a larger max_seq_length"
            )

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Tokenize examples ``indices`` with columns ``question``, ``context`` and ``answers``."""
        first = self.tokenizer.padding_side != "left"
        questions = self._short([text.lstrip() for text in rows["question"]])
        contexts = list(rows["context"])
        encoded = self.tokenizer(
            questions if first else contexts,
            contexts if first else questions,
            truncation="only_second" if first else "only_first",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if self.pad else False,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        made: dict[str, list[Any]] = {name: list(values) for name, values in encoded.items()}
        made["example_index"] = [indices[owner] for owner in owners]
        for name in ("start_positions", "end_positions") if self.labels else ():
            made[name] = []
        for name in WINDOW_COLUMNS if self.windows else ():
            made[name] = []
        for row, owner in enumerate(owners):
            null = self._null(made["input_ids"][row])
            context = np.array([part == (1 if first else 0) for part in encoded.sequence_ids(row)])
            places = np.where(context[:, None], np.asarray(offsets[row], dtype=np.int32), -1)
            if self.labels:
                start, end = _positions(context, places, rows["answers"][owner], null)
                made["start_positions"].append(start)
                made["end_positions"].append(end)
            if self.windows:
                made["starts"].append(places[:, 0])
                made["ends"].append(places[:, 1])
                made["null_position"].append(null)
        return made

    def _null(self, ids: list[int]) -> int:
        for token in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if token is not None and token in ids:
                return ids.index(token)
        return 0

    def _short(self, questions: list[str]) -> list[str]:
        """Cut questions that leave no room for a context; a tokenizer would refuse them."""
        special = int(self.tokenizer.num_special_tokens_to_add(pair=True))
        most = self.length - special - self.stride - 1
        long = [row for row, text in enumerate(questions) if len(text) > most]  # a token holds at least a character
        if not long:
            return questions
        encoded = self.tokenizer(
            [questions[row] for row in long], add_special_tokens=False, return_offsets_mapping=True
        )
        for row, offsets in zip(long, encoded["offset_mapping"], strict=True):
            if len(offsets) > most:
                _log.warning("a question of %d tokens is cut to %d: %.60s...", len(offsets), most, questions[row])
                questions[row] = questions[row][: offsets[most][0]]
        return questions


def _positions(
    context: NDArray[np.bool_], places: NDArray[np.int32], answers: Mapping[str, Sequence[Any]], null: int
) -> tuple[int, int]:
    """First and last token of the first answer; the null position twice where the window does not hold all of it."""
    tokens = np.flatnonzero(context)
    if not len(answers["text"]) or not len(tokens):
        return null, null
    start = int(answers["answer_start"][0])
    end = start + len(answers["text"][0])
    starts, ends = places[tokens, 0], places[tokens, 1]
    if starts[0] > start or ends[-1] < end:
        return null, null
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(ends, end, side="left"))
    return int(tokens[first]), int(tokens[last])


def windows_of(features: Dataset) -> Windows:
    """Take the columns of :class:`Windows` out of tokenized features; rows are padded with -1 to the longest."""
    rows = features.with_format("numpy")
    starts, ends = (_stacked(features, name) for name in WINDOW_COLUMNS[:2])
    null = np.asarray(rows["null_position"][:], dtype=np.int64)
    return Windows(np.asarray(rows["example_index"][:], dtype=np.int64), starts, ends, null)


def _stacked(features: Dataset, name: str) -> NDArray[np.int32]:
    column = features.with_format("arrow")[:].column(name).combine_chunks()
    lengths = np.asarray(column.value_lengths(), dtype=np.int64)
    values = np.asarray(column.flatten(), dtype=np.int32)
    stacked = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int32)
    stacked[np.arange(stacked.shape[1]) < lengths[:, None]] = values
    return stacked
