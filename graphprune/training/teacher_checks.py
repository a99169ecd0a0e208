"""Checks before training: whether a student can learn from a teacher at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from graphprune.errors import GraphPruneError

_GENERIC = re.compile(r"LABEL_\d+")
PROBE = "The Quick brown fox (Zürich, 1987) can't jump over 13 lazy dogs!"
"""A text that tokenizers of other kinds split in other ways."""
_NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30
_RESERVED = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2, "longformer": 2, "xlm-roberta-xl": 2}
"""Positions that are never a token's: numbering starts after the padding index."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    model_max_length: int

    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102

    def encode(self, text: str) -> list[int]: ...  # noqa: D102


def check_teacher(
    student: object,
    teacher: object,
    *,
    tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
) -> None:
    """Compare what a student and its teacher take and give.

    Args:
        student: The model, or its config.
        teacher: The model, its config, or its cache.
        tokenizer: The student's, by which the data are tokenized.
        teacher_tokenizer: The teacher's.
        max_length: Longest sequence of the data, in tokens.

    Raises:
        GraphPruneError: Tokenizers or labels differ, or the teacher takes no sequence of this length.
    """
    configs = [getattr(item, "config", item) for item in (student, teacher)]
    if not all(_answers_questions(item) for item in (student, teacher)):
        label_order(*configs)
    if tokenizer is not None and teacher_tokenizer is not None:
        check_tokenizers(tokenizer, teacher_tokenizer)
    if max_length is not None:
        check_length(configs[1], max_length, teacher_tokenizer)


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise GraphPruneError where two tokenizers give one text other numbers."""
    own, other = student.get_vocab(), teacher.get_vocab()
    differing = sorted(word for word in own.keys() | other.keys() if own.get(word) != other.get(word))
    if differing:
        word = differing[0]
        raise GraphPruneError(
            f"student and teacher have other tokenizers: {len(differing)} of {len(own.keys() | other.keys())} entries differ, for "
            f"example {word!r} is {own.get(word, 'missing')} for the student and {other.get(word, 'missing')} for the teacher; "
            f"choose a teacher with the student's vocabulary"
        )
    if student.encode(PROBE) != teacher.encode(PROBE):
        raise GraphPruneError(
            "student and teacher have one vocabulary, and split a text in other ways (upper case, accents or special tokens); "
            "save the student's tokenizer with the teacher if it was trained with that one, or choose another teacher"
        )


def check_length(teacher: object, max_length: int, tokenizer: Tokenizer | None = None) -> None:
    """Raise GraphPruneError where a teacher takes no sequence of ``max_length`` tokens.

    Args:
        teacher: Its config.
        max_length: In tokens.
        tokenizer: Its tokenizer, which may know a smaller limit.
    """
    limits = []
    positions = getattr(teacher, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - _RESERVED.get(str(getattr(teacher, "model_type", "")), 0))
    if tokenizer is not None and 0 < tokenizer.model_max_length < _NO_LIMIT:
        limits.append(tokenizer.model_max_length)
    if limits and max_length > min(limits):
        raise GraphPruneError(
            f"the data have sequences of up to {max_length} tokens, and the teacher takes {min(limits)}; set max_seq_length="
            f"{min(limits)}, or choose a teacher for longer sequences"
        )


def label_order(student: object, teacher: object) -> tuple[int, ...] | None:
    """Where a teacher keeps the student's labels.

    Args:
        student: Config with ``id2label``; one without says nothing, and all fits.
        teacher: Likewise.

    Returns:
        For each label of the student, the teacher's index of it; None where the order is the same, or where one of them has
        no names but ``LABEL_0`` and so on: then labels are taken by their numbers.

    Raises:
        GraphPruneError: Their numbers or their names differ.
    """
    own, other = _labels(student), _labels(teacher)
    if own is None or other is None:
        return None
    if len(own) != len(other):
        raise GraphPruneError(
            f"the student has {len(own)} labels ({_shown(own)}), the teacher {len(other)} ({_shown(other)}); choose a teacher of "
            f"the same task"
        )
    if own == other or _generic(own) or _generic(other):
        return None
    lowered = [label.casefold() for label in other]
    if sorted(label.casefold() for label in own) != sorted(lowered) or len(set(lowered)) != len(lowered):
        raise GraphPruneError(
            f"the student's labels are {_shown(own)}, the teacher's {_shown(other)}; choose a teacher of the same task, or give both "
            f"the same names in id2label"
        )
    order = tuple(lowered.index(label.casefold()) for label in own)
    return None if order == tuple(range(len(order))) else order


def _labels(config: object) -> list[str] | None:
    names: Mapping[Any, str] | None = getattr(config, "id2label", None)
    return None if not names else [str(names[key]) for key in sorted(names, key=int)]


def _generic(labels: list[str]) -> bool:
    return all(_GENERIC.fullmatch(label) for label in labels)


def _shown(labels: list[str]) -> str:
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")


def _answers_questions(model: object) -> bool:
    """Whether a model has start and end logits in place of labels; its ``id2label`` is a default then."""
    kinds = [type(model).__name__, *(getattr(getattr(model, "config", model), "architectures", None) or [])]
    return any("QuestionAnswering" in kind for kind in kinds)
