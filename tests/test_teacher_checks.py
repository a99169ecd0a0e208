"""What is compared before training: tokenizers, labels, lengths."""

from __future__ import annotations

import pytest
from transformers import BertConfig, RobertaConfig

import graphprune as gp
from graphprune.training import check_teacher
from graphprune.training.teacher_checks import label_order
from tests.taught import WORDS, bert, tokenizer


def config(*names: str) -> BertConfig:
    return BertConfig(num_labels=len(names), id2label=dict(enumerate(names)))


def test_what_fits_passes() -> None:
    check_teacher(bert(), bert(seed=1), tokenizer=tokenizer(), teacher_tokenizer=tokenizer(), max_length=32)
    check_teacher(bert("qa"), bert("qa", num_labels=3))  # labels of question answering mean nothing
    check_teacher(object(), object())


@pytest.mark.parametrize(
    ("student", "teacher", "order"),
    [
        (config("a", "b"), config("a", "b"), None),
        (config("a", "b", "c"), config("C", "a", "B"), (1, 2, 0)),
        (config("NEGATIVE", "POSITIVE"), config("negative", "positive"), None),
        (config("LABEL_0", "LABEL_1"), config("no", "yes"), None),
        (object(), config("no", "yes"), None),
    ],
)
def test_order_of_labels(student: object, teacher: object, order: object) -> None:
    assert label_order(student, teacher) == order


def test_refusals() -> None:
    with pytest.raises(gp.GraphPruneError, match=r"the student has 2 labels \(a, b\), the teacher 3 \(a, b, c\)"):
        check_teacher(config("a", "b"), config("a", "b", "c"))
    with pytest.raises(gp.GraphPruneError, match="labels are a, b, the teacher's a, x"):
        check_teacher(config("a", "b"), config("a", "x"))
    with pytest.raises(
        gp.GraphPruneError, match=r"2 of 99 entries differ, for example 'w93' is 97 for the student and 98"
    ):
        check_teacher(
            bert(), bert(), tokenizer=tokenizer(), teacher_tokenizer=tokenizer((*WORDS[:-2], WORDS[-1], WORDS[-2]))
        )
    other = tokenizer()
    other.backend_tokenizer.post_processor = type(other.backend_tokenizer.post_processor)(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    with pytest.raises(gp.GraphPruneError, match="one vocabulary, and split a text in other ways"):
        check_teacher(bert(), bert(), tokenizer=tokenizer(), teacher_tokenizer=other)
    with pytest.raises(gp.GraphPruneError, match="up to 33 tokens, and the teacher takes 32; set max_seq_length=32"):
        check_teacher(bert(), bert(), max_length=33)
    with pytest.raises(gp.GraphPruneError, match="the teacher takes 512"):
        check_teacher(bert(), RobertaConfig(max_position_embeddings=514), max_length=513)
    check_teacher(bert(), RobertaConfig(max_position_embeddings=514), max_length=512)
