"""Named entities: tokens of words, tags, scores of whole entities and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig

import graphprune as gp
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.ner import NerTask, tokenizer_arguments
from graphprune.tasks.task import make_task
from tests.task_data import real_tokenizer, shared, tiny_tokenizer, write

for library in ("datasets", "torchmetrics", "seqeval"):
    pytest.importorskip(library, reason="tasks need the extra train")

TEXT = "Anna\tB-PER\nwas\tO\nborn\tO\nin\tO\nNew\tB-LOC\nUlm\tI-LOC\n\nthe\tO\nred\tO\nBob\tB-PER\n"
NAMES = ("B-LOC", "B-PER", "I-LOC", "O")


def task(folder: Path, text: Any = TEXT, config: Any = None, *, ending: str = "conll", **settings: Any) -> NerTask:
    path = write(folder, f"train.{ending}", text)
    made = make_task("ner", DataSettings(train_file=path, **settings), tiny_tokenizer(), config)
    assert isinstance(made, NerTask)
    return made


def gold(made: NerTask, split: str) -> np.ndarray:
    labels = made.features(split)["labels"]
    logits = np.zeros((len(labels), max(map(len, labels)), len(made.label_names)), dtype=np.float32)
    for row, values in enumerate(labels):
        for place, value in enumerate(values):
            logits[row, place, max(value, 0)] = 1
    return logits


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert made.label_names == NAMES
    feature = made.features("train")[0]
    tokens = made.tokenizer.convert_ids_to_tokens(feature["input_ids"])
    tagged = [(token, NAMES[label]) for token, label in zip(tokens, feature["labels"], strict=True) if label >= 0]
    assert tagged == [("a", "B-PER"), ("was", "O"), ("born", "O"), ("in", "O"), ("n", "B-LOC"), ("u", "I-LOC")]
    assert feature["labels"][0] == feature["labels"][-1] == -100


def test_all_tokens_may_have_it(tmp_path: Path) -> None:
    made = task(tmp_path, label_all_tokens=True)
    labels = [NAMES[label] for label in made.features("train")[0]["labels"] if label >= 0]
    assert labels[:4] == ["B-PER"] * 4  # there is no I-PER
    assert labels[7:] == ["B-LOC", "I-LOC", "I-LOC", "I-LOC", "I-LOC", "I-LOC"]
    assert made.score("train", gold(made, "train"))["f1"] == 1.0


def test_scores_of_entities(tmp_path: Path) -> None:
    made = task(tmp_path, return_entity_level_metrics=True)
    assert made.main_metric == "f1"
    logits = gold(made, "train")
    scores = made.score("train", (logits,))
    assert {scores[name] for name in ("precision", "recall", "f1", "accuracy", "LOC_f1", "PER_recall")} == {1.0}
    assert (scores["PER_number"], scores["LOC_number"]) == (2, 1)
    last = [place for place, label in enumerate(made.features("train")[0]["labels"]) if label >= 0][-1]
    logits[0, last] = [0, 0, 0, 1]  # half of New Ulm is not the entity
    scores = made.score("train", logits)
    assert (scores["precision"], scores["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores["accuracy"] == pytest.approx(8 / 9)
    assert (scores["LOC_f1"], scores["PER_f1"]) == (0.0, 1.0)
    padded = np.pad(logits, ((0, 0), (0, 9), (0, 0)), constant_values=-100)
    assert made.score("train", padded) == scores
    (path,) = made.write_predictions("train", logits, tmp_path / "out")
    assert path.name == "eval_predictions.txt"
    assert path.read_text() == "B-PER O O O B-LOC O\nO O B-PER\n"


def test_words_that_are_cut_off_count_as_missed(tmp_path: Path) -> None:
    made = task(tmp_path, max_seq_length=9)
    assert {len(ids) for ids in made.features("train")["input_ids"]} <= set(range(10))
    scores = made.score("train", gold(made, "train"))
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["precision"] == 1.0


def test_words_without_tokens_count_as_outside(tmp_path: Path) -> None:
    made = task(tmp_path, "\u200b\tB-PER\nred\tO\n\nred\tB-PER\n")
    assert made.score("train", gold(made, "train"))["recall"] == 0.5


def test_parts_of_speech_have_an_accuracy(tmp_path: Path) -> None:
    made = task(tmp_path, "she PRP O\nlives VBZ O\n", label_column_name="pos_tags")
    assert made.label_names == ("PRP", "VBZ")
    assert made.main_metric == "accuracy"
    assert made.score("train", gold(made, "train")) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"tokens": ["red", "Bob"], "ner_tags": ["O", "B-PER"]}], {}),
        ([{"words": ["red", "Bob"], "labels": ["O", "B-PER"]}], {}),
        ([{"w": ["red", "Bob"], "t": ["O", "B-PER"]}], {"text_column_name": "w", "label_column_name": "t"}),
        ([{"tokens": ["red", "Bob"], "pos_tags": ["O", "B-PER"]}], {"task_name": "pos"}),
    ],
)
def test_json(tmp_path: Path, rows: Any, settings: dict[str, str]) -> None:
    made = task(tmp_path, rows, ending="json", **settings)
    assert made.label_names == ("B-PER", "O")
    assert made.examples("train")[0] == {"tokens": ["red", "Bob"], "tags": ["O", "B-PER"]}


def test_hub_tags_are_numbers_with_names(tmp_path: Path) -> None:
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    kinds = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["red", "Bob"]], "ner_tags": [[0, 1]]}, features=kinds)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "hub")
    made = make_task("ner", DataSettings(dataset_name=str(tmp_path / "hub")), tiny_tokenizer())
    assert made.label_names == ("O", "B-PER", "I-PER")
    assert [label for label in made.features("train")[0]["labels"] if label >= 0] == [0, 1]


def test_a_models_own_order_of_tags_stays(tmp_path: Path) -> None:
    names = ("O", "B-PER", "B-LOC", "I-LOC", "B-MISC")
    config = BertConfig(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    made = task(tmp_path, config=config)
    assert made.label_names == names
    assert made.score("train", gold(made, "train"))["f1"] == 1.0


@pytest.mark.parametrize(
    ("content", "ending", "message"),
    [
        ([{"tokens": ["a", "b"], "ner_tags": ["O"]}], "json", "example 1: 2 tokens and 1 tags"),
        ([{"tokens": "a b", "ner_tags": ["O"]}], "json", "'tokens' is 'a b'; it must be a list"),
        ([{"tokens": [], "ner_tags": []}], "json", r"'tokens' is \[\]; it must be a list"),
        ([{"tokens": ["a", None], "ner_tags": ["O", "O"]}], "json", "'tokens' holds None; it must hold texts"),
        ([{"tokens": ["a"]}], "json", r"no column 'ner_tags'; its columns are 'tokens' \(--label_column_name"),
        ([{"text": ["a"], "ner_tags": ["O"]}], "json", r"no column 'tokens'; .*\(--text_column_name"),
    ],
)
def test_bad_data(tmp_path: Path, content: Any, ending: str, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        task(tmp_path, content, ending=ending).features("train")


def test_a_tag_that_training_has_not(tmp_path: Path) -> None:
    other = write(tmp_path, "other.conll", "red\tO\n\nBob\tB-CAT\n")
    made = task(tmp_path, validation_file=other)
    with pytest.raises(
        gp.GraphPruneError, match=r"other\.conll, line 3: the tag 'B-CAT' is not among those that training has"
    ):
        made.features("validation")


def test_wrong_logits(tmp_path: Path) -> None:
    made = task(tmp_path)
    with pytest.raises(gp.GraphPruneError, match=r"must be \[features, tokens, 4\]"):
        made.score("train", np.zeros((2, 9, 3)))
    with pytest.raises(gp.GraphPruneError, match="logits for 3 tokens; feature 0 has more"):
        made.score("train", np.zeros((2, 3, 4)))


def test_batches_pad_labels(tmp_path: Path) -> None:
    made = task(tmp_path)
    features = made.features("train")
    batch = made.collator()([features[0], features[1]])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert batch["labels"][1, -1] == -100
    assert batch["attention_mask"][1, -1] == 0


def test_byte_level_tokenizers_are_told_to_begin_words_with_a_space() -> None:
    assert tokenizer_arguments("roberta") == {"add_prefix_space": True}
    assert tokenizer_arguments("bert") == {}


def test_real_wnut() -> None:
    files = {
        "validation_file": shared("wnut17/emerging.dev.conll.gz"),
        "test_file": shared("wnut17/emerging.test.annotated.gz"),
    }
    made = make_task("ner", DataSettings(**files, max_predict_samples=100), real_tokenizer())
    assert len(made.label_names) == 13
    assert len(made.features("validation")) == 1009
    scores = made.score("validation", gold(made, "validation"))
    assert (scores["f1"], scores["accuracy"]) == (1.0, 1.0)
    assert made.score("test", gold(made, "test"))["f1"] == 1.0
