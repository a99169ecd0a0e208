"""Classification and regression: columns, labels, the model's own order of them, scores and refusals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertConfig

import graphprune as gp
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.glue import GlueTask
from graphprune.tasks.glue_tasks import TASKS, class_scores, find_task, number_scores
from graphprune.tasks.task import make_task
from tests.task_data import real_tokenizer, shared, tiny_tokenizer, write

for library in ("datasets", "torchmetrics", "seqeval"):
    pytest.importorskip(library, reason="tasks need the extra train")


def table(columns: str, *rows: tuple[Any, ...], dialect: str = "excel") -> str:
    text = io.StringIO()
    csv.writer(text, dialect).writerows([columns.split(","), *rows])
    return text.getvalue()


def task(
    folder: Path, config: Any = None, *, name: str = "csv", settings: dict[str, Any] | None = None, **files: Any
) -> GlueTask:
    paths = {f"{split}_file": write(folder, f"{split}.{name}", content) for split, content in files.items()}
    made = make_task("glue", DataSettings(**paths, **(settings or {})), tiny_tokenizer(), config)
    assert isinstance(made, GlueTask)
    return made


def named(*names: str) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})


MOODS = table("text,label", ("red boat", "good"), ("blue boat", "bad"), ("boat", "good"))


def test_own_classes(tmp_path: Path) -> None:
    made = task(tmp_path, train=MOODS, validation=MOODS, test=table("text", ("boat",)))
    assert made.splits() == ("train", "validation", "test")
    assert made.label_names == ("bad", "good")
    assert made.main_metric == "accuracy"
    assert made.config_changes() == {
        "num_labels": 2,
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
        "problem_type": "single_label_classification",
    }
    assert made.features("train")["labels"][:] == [1, 0, 1]
    assert "labels" not in made.features("test").column_names
    logits = np.array([[0, 1], [0, 1], [0, 1]], dtype=np.float32)
    scores = made.score("validation", logits)
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}
    assert made.score("validation", (logits, "hidden")) == scores
    (path,) = made.write_predictions("test", {"logits": logits[:1]}, tmp_path / "out")
    assert (path.name, path.read_text()) == ("predict_results_own.txt", "index\tprediction\n0\tgood\n")
    with pytest.raises(gp.GraphPruneError, match="has no labels; split test can be predicted but not scored"):
        made.score("test", logits[:1])


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        ([1, 0, 2], ("0", "1", "2"), [1, 0, 2]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        ([1.0, 0.0, 0.5], None, [1.0, 0.0, 0.5]),
        (["1.5", "2", "-3e-1"], None, [1.5, 2.0, -0.3]),
        (["1.5", "2", "x"], ("1.5", "2", "x"), [0, 1, 2]),
    ],
)
def test_kinds_of_labels(tmp_path: Path, labels: list[Any], names: Any, indices: list[float]) -> None:
    rows = [{"sentence": "boat", "label": label} for label in labels]
    made = task(tmp_path, name="json", train=rows)
    assert made.label_names == names
    assert made.features("train")["labels"][:] == pytest.approx(indices)
    batch = made.collator()([made.features("train")[row] for row in range(3)])
    assert batch["labels"].dtype == (torch.int64 if names else torch.float32)
    if names is None:
        assert made.config_changes() == {"num_labels": 1, "problem_type": "regression"}
        assert made.main_metric == "pearson"


def test_regression(tmp_path: Path) -> None:
    rows = table("sentence1,sentence2,score", ("boat", "red boat", 4.5), ("a", "b", 0), ("river", "city", 2))
    made = task(tmp_path, settings={"task_name": "STS-B"}, train=rows, validation=rows)
    logits = np.array([[3.0], [1.0], [2.5]], dtype=np.float32)
    scores = made.score("validation", logits)
    assert scores["pearson"] == pytest.approx(pearsonr([3, 1, 2.5], [4.5, 0, 2])[0])
    assert scores["spearmanr"] == pytest.approx(spearmanr([3, 1, 2.5], [4.5, 0, 2])[0], abs=1e-5)
    assert scores["combined_score"] == pytest.approx((scores["pearson"] + scores["spearmanr"]) / 2)
    assert scores["mse"] == pytest.approx((1.5**2 + 1 + 0.5**2) / 3)
    (path,) = made.write_predictions("validation", logits, tmp_path)
    assert (path.name, path.read_text().split("\n")[1]) == ("eval_predictions_STS-B.txt", "0\t3.000")
    assert number_scores(np.ones(3), np.arange(3.0))["pearson"] == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_classes(seed: int, classes: int) -> None:
    generator = np.random.default_rng(seed)
    chosen, true = generator.integers(classes, size=(2, 50))
    scores = class_scores(chosen, true, classes, ("accuracy", "f1", "matthews_correlation"))
    assert scores["accuracy"] == pytest.approx((chosen == true).mean())
    assert scores["f1"] == pytest.approx(f1_score(true, chosen, average="binary" if classes == 2 else "macro"))
    assert scores["matthews_correlation"] == pytest.approx(matthews_corrcoef(true, chosen), abs=1e-6)


FILES = {
    "sst2": table("sentence,label", ("boat", 1), ("red", 0)),
    "cola": "gj04\t1\t\tthe boat .\ngj04\t0\t*\tboat the .\n",
    "mrpc": table(
        "Quality,#1 ID,#2 ID,#1 String,#2 String", (1, 7, 8, "boat", "a"), (0, 8, 9, "b", "c"), dialect="excel-tab"
    ),
    "qqp": table("id,question1,question2,is_duplicate", (0, "a", "b", 1), (0, "c", "d", 0), dialect="excel-tab"),
    "mnli": table(
        "sentence1,sentence2,gold_label", ("a", "b", "neutral"), ("c", "d", "entailment"), dialect="excel-tab"
    ),
    "qnli": table("index,question,sentence,label", (0, "a", "b", "not_entailment"), (1, "c", "d", "entailment")),
    "rte": table("sentence1,sentence2,label", ("a", "b", "not_entailment"), ("c", "d", "entailment")),
    "wnli": table("sentence1,sentence2,label", ("a", "b", 1), ("c", "d", 0)),
    "stsb": table("sentence1,sentence2,score", ("a", "b", 5), ("c", "d", 1.5)),
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_of_glue_from_their_files(tmp_path: Path, name: str) -> None:
    kind = "tsv" if name in ("cola", "mrpc", "qqp", "mnli") else "csv"
    made = task(tmp_path, name=kind, settings={"task_name": name}, train=FILES[name])
    assert made.label_names == (TASKS[name].names or None)
    assert made.features("train")["labels"][:] == ([5.0, 1.5] if name == "stsb" else [1, 0])
    pair = "second" in made.examples("train").column_names
    assert pair == (name not in ("sst2", "cola"))
    assert max(made.features("train")["token_type_ids"][0]) == pair


def test_names_of_tasks() -> None:
    assert find_task("SST-2") is TASKS["sst2"]
    with pytest.raises(gp.RecipeError, match="task_name 'mrcp' is no task of GLUE; did you mean 'mrpc'"):
        find_task("mrcp")


@pytest.mark.parametrize(
    ("columns", "settings", "texts"),
    [
        ("premise,hypothesis,label", {}, ["a", "b"]),
        ("hypothesis,label,premise", {}, ["c", "a"]),
        ("idx,review,label", {}, ["b"]),
        ("title,body,label", {}, ["a", "b"]),
        ("title,body,label", {"text_column_name": "body"}, ["b"]),
        ("title,label,body", {"text_column_name": "body, title"}, ["c", "a"]),
        ("text,mood,more", {"label_column_name": "mood"}, ["a"]),
        ("one,mood,more", {"label_column_name": "mood"}, ["a", "c"]),
    ],
)
def test_columns_are_found_or_named(tmp_path: Path, columns: str, settings: dict[str, Any], texts: list[str]) -> None:
    made = task(tmp_path, settings=settings, train=table(columns, ("a", "b", "c")))
    example = made.examples("train")[0]
    assert [example[name] for name in ("first", "second") if name in example] == texts


@pytest.mark.parametrize(
    ("config", "names", "indices"),
    [
        (named("good", "bad"), ("good", "bad"), [0, 1, 0]),
        (named("GOOD", "neutral", "BAD"), ("GOOD", "neutral", "BAD"), [0, 2, 0]),
        (named("LABEL_0", "LABEL_1"), ("bad", "good"), [1, 0, 1]),
        (BertConfig(num_labels=5), ("bad", "good"), [1, 0, 1]),
        (named("B-PER", "O"), ("bad", "good"), [1, 0, 1]),
    ],
)
def test_a_models_own_order_of_labels_stays(
    tmp_path: Path, config: Any, names: tuple[str, ...], indices: list[int]
) -> None:
    made = task(tmp_path, config, train=MOODS)
    assert made.label_names == names
    assert made.features("train")["labels"][:] == indices


def test_numbered_labels_are_the_models_by_number(tmp_path: Path) -> None:
    rows = table("text,label", ("red boat", 1), ("boat", 0))
    made = task(tmp_path, named("negative", "positive"), validation=rows)
    assert made.label_names == ("negative", "positive")
    assert made.features("validation")["labels"][:] == [1, 0]


def test_mnli_in_the_order_of_a_fine_tuned_model(tmp_path: Path) -> None:
    config = named("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    made = task(tmp_path, config, name="tsv", settings={"task_name": "mnli"}, validation=FILES["mnli"])
    assert made.label_names == ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    assert made.features("validation")["labels"][:] == [1, 2]
    assert made.score("validation", np.eye(3)[[1, 2]])["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (
            {"train": MOODS, "validation": table("text,label", ("a", "good"), ("b", "awful"))},
            {},
            r"validation\.csv, line 3: the label 'awful' is not among those that training has: 'bad', 'good'",
        ),
        ({"validation": table("text,label", ("a", "2"))}, {"task_name": "rte"}, r"has no column 'sentence1'"),
        (
            {"validation": table("sentence,label", ("a", "2"))},
            {"task_name": "sst2"},
            r"line 2: the label '2'.* sst2 has",
        ),
        ({"validation": table("text,lable", ("a", "2"))}, {}, "no column 'label'; did you mean 'lable'"),
        (
            {"validation": table("a,b,c,d", (1, 2, 3, 4))},
            {"label_column_name": "d"},
            "no telling which of the columns 'a', 'b'",
        ),
        ({"validation": table("text,label", ("a", "x"))}, {"text_column_name": "body"}, "no column 'body'"),
        (
            {"train": table("text,label", ("a", "1.5")), "validation": table("text,label", ("a", "x"))},
            {},
            r"line 2: the label 'x' is no number, and this is a regression",
        ),
        ({"test": table("text", ("a",))}, {}, r"no split of the data \(test\) has labels"),
    ],
)
def test_bad_data(tmp_path: Path, files: dict[str, str], settings: dict[str, Any], message: str) -> None:
    made = task(tmp_path, settings=settings, **files)
    with pytest.raises(gp.GraphPruneError, match=message):
        [(made.features(split), made.label_names) for split in made.splits()]


def test_json_with_bad_values(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": 3, "label": "x"}]
    with pytest.raises(gp.GraphPruneError, match="example 2: 'text' is 3 \\(int\\); it must be a text"):
        task(tmp_path, name="json", train=rows).features("train")
    rows = [{"text": "a", "label": ["x"]}]
    with pytest.raises(gp.GraphPruneError, match="example 1: the label \\['x'\\] is neither text nor number"):
        task(tmp_path, name="json", train=rows).features("train")


def test_evaluating_a_model_of_other_labels_is_refused(tmp_path: Path) -> None:
    made = task(tmp_path, named("LOC", "PER"), validation=MOODS)
    with pytest.raises(
        gp.GraphPruneError, match="the model's labels are LOC, PER and the data's are bad, good; evaluate it on"
    ):
        made.features("validation")


def test_wrong_logits(tmp_path: Path) -> None:
    made = task(tmp_path, train=MOODS)
    with pytest.raises(gp.GraphPruneError, match=r"logits of shape \[3, 4\]; they must be \[features, 2\]"):
        made.score("train", np.zeros((3, 4)))


def test_hub_datasets_and_folders(tmp_path: Path) -> None:
    import datasets

    kind = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {
        "train": {"text": ["a", "b"], "label": [1, 0]},
        "validation_matched": {"text": ["c"], "label": [1]},
        "validation_mismatched": {"text": ["d"], "label": [0]},
        "test_matched": {"text": ["e"], "label": [-1]},
    }
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows, features=kind) for name, rows in parts.items()}
    )
    saved.save_to_disk(tmp_path / "hub")
    made = make_task("glue", DataSettings(dataset_name=str(tmp_path / "hub")), tiny_tokenizer())
    assert made.splits() == ("train", "validation", "validation_mismatched", "test")
    assert made.label_names == ("no", "yes")
    assert made.features("train")["labels"][:] == [1, 0]
    assert "labels" not in made.features("test").column_names
    (path,) = made.write_predictions("validation_mismatched", np.zeros((1, 2)), tmp_path)
    assert path.name == "eval_predictions_own-mm.txt"


def test_sources_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(gp.RecipeError, match="no data: give --dataset_name"):
        make_task("glue", DataSettings(), tiny_tokenizer())
    with pytest.raises(gp.RecipeError, match="the data comes from one or the other"):
        DataSettings(dataset_name="x", train_file="y")
    with pytest.raises(gp.RecipeError, match="n_best_size is 0; it must be at least 1"):
        DataSettings(n_best_size=0)
    with pytest.raises(gp.RecipeError, match="unknown task 'nre'; did you mean 'ner'"):
        make_task("nre", DataSettings(train_file="x.csv"), tiny_tokenizer())
    made = make_task("glue", DataSettings(dataset_name=str(tmp_path / "none")), tiny_tokenizer())
    with pytest.raises(gp.GraphPruneError, match=r"dataset .*none cannot be loaded: .*give files with --train_file"):
        made.splits()


def test_a_held_back_part_and_limits(tmp_path: Path) -> None:
    rows = table("text,label", *((f"boat {number}", number % 2) for number in range(50)))
    made = task(
        tmp_path,
        settings={"validation_split_percentage": 20, "max_train_samples": 30, "max_eval_samples": 4},
        train=rows,
    )
    assert made.splits() == ("train", "validation")
    train, held = (made.examples(split)["first"][:] for split in made.splits())
    assert (len(train), len(held)) == (30, 4)
    assert not set(train) & set(held)


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    alone, both = (
        task(tmp_path, settings={"preprocessing_num_workers": workers}, train=MOODS) for workers in (None, 2)
    )
    assert alone.fingerprint("train") == both.fingerprint("train")


def test_flags_parse() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(DataSettings)
    assert "percent" in parser.format_help()
    (settings,) = parser.parse_args_into_dataclasses(
        ["--task_name", "mrpc", "--pad_to_max_length", "--max_seq_length", "64", "--null_score_diff_threshold", "-1.5"]
    )
    expected = DataSettings(task_name="mrpc", pad_to_max_length=True, max_seq_length=64, null_score_diff_threshold=-1.5)
    assert settings == expected
    assert json.dumps(DataSettings.names())


@pytest.mark.parametrize(("name", "folder"), [("sst2", "SST-2"), ("mrpc", "MRPC")])
def test_real_glue(name: str, folder: str) -> None:
    files = {
        f"{split}_file": shared(f"glue/{folder}/{part}.tsv.gz")
        for split, part in (("validation", "dev"), ("test", "test"))
    }
    made = make_task("glue", DataSettings(task_name=name, **files, max_predict_samples=20), real_tokenizer())
    labels = np.asarray(made.features("validation")["labels"])
    assert len(labels) == {"sst2": 872, "mrpc": 408}[name]
    assert int(labels.sum()) == {"sst2": 444, "mrpc": 279}[name]
    assert set(made.score("validation", np.eye(2)[labels]).values()) == {1.0}
    assert "labels" not in made.features("test").column_names
