"""Question answering: windows, labels, answers against a slow reading of the original's rules, scores and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.qa import QaTask
from graphprune.tasks.qa_answers import choose, find_candidates, n_best_lists
from graphprune.tasks.qa_features import Windows
from graphprune.tasks.qa_scores import best_threshold, squad_scores
from graphprune.tasks.task import make_task
from tests.task_data import real_tokenizer, shared, squad, tiny_tokenizer, write

for library in ("datasets", "torchmetrics", "seqeval"):
    pytest.importorskip(library, reason="tasks need the extra train")

LONG = "the red boat was near the small river in a city . " * 4 + "she was born in the blue city . he live long ."
CONTENT = squad(
    (LONG, [("  where was she born", ["the blue city", "blue city"]), ("who live long", ["he live"])]),
    ("a red boat", [("what", ["red boat"])]),
)
UNANSWERED = squad(
    (LONG, [("where was she born", ["the blue city"]), ("when", [])]), ("a boat", [("what", [])]), version="v2.0"
)


def task(folder: Path, content: Any = CONTENT, split: str = "validation", **settings: Any) -> QaTask:
    path = write(folder, f"{split}.json", content)
    given = {"max_seq_length": 24, "doc_stride": 8, f"{split}_file": path, **settings}
    made = make_task("qa", DataSettings(**given), tiny_tokenizer())
    assert isinstance(made, QaTask)
    return made


def gold(made: QaTask, split: str = "validation", width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits that say the labelled positions; windows without the answer are less sure of their null than others of it."""
    features = made.features(split)
    width = width or max(map(len, features["input_ids"]))
    start, end = np.zeros((2, len(features), width), dtype=np.float32)
    for row, feature in enumerate(features):
        first, last = feature["start_positions"], feature["end_positions"]
        start[row, first], end[row, last] = (9, 9) if first else (4, 4)
    return start, end


def test_features_are_windows_with_positions(tmp_path: Path) -> None:
    made = task(tmp_path, split="train")
    features = made.features("train")
    assert features.column_names[-2:] == ["end_positions", "feature_index"]
    assert features["feature_index"][:] == list(range(len(features)))
    assert set(features["example_index"]) == {0, 1, 2}
    assert len(features) > 6
    answered = set()
    for feature in features:
        ids = feature["input_ids"]
        assert len(ids) <= 24
        span = ids[feature["start_positions"] : feature["end_positions"] + 1]
        text = made.tokenizer.decode(span)
        expected = ["the blue city", "he live", "red boat"][feature["example_index"]]
        assert text in (expected, "[CLS]")
        answered |= {feature["example_index"]} if text == expected else set()
    assert answered == {0, 1, 2}
    assert len(made.windows("train").example) == len(features)


def test_windows_share_the_stride(tmp_path: Path) -> None:
    made = task(tmp_path)
    windows = made.windows("validation")
    first, second = windows.starts[0], windows.starts[1]
    shared_tokens = set(first[first >= 0]) & set(second[second >= 0])
    assert len(shared_tokens) == 8


@pytest.mark.parametrize("pad", [False, True])
def test_gold_logits_give_full_marks(tmp_path: Path, pad: bool) -> None:
    made = task(tmp_path, pad_to_max_length=pad)
    assert made.score("validation", gold(made)) == {"exact_match": 100.0, "f1": 100.0}
    start, end = gold(made, width=40)
    assert made.score("validation", {"start_logits": start, "end_logits": end, "hidden": None})["f1"] == 100.0


def test_predictions_are_written_as_the_original_does(tmp_path: Path) -> None:
    made = task(tmp_path)
    paths = made.write_predictions("validation", gold(made), tmp_path / "out")
    assert [path.name for path in paths] == ["eval_predictions.json", "eval_nbest_predictions.json"]
    assert json.loads(paths[0].read_text()) == {"0.0": "the blue city", "0.1": "he live", "1.0": "red boat"}
    listed = json.loads(paths[1].read_text())["0.1"]
    assert set(listed[0]) == {"text", "start_logit", "end_logit", "probability"}
    assert sum(item["probability"] for item in listed) == pytest.approx(1)


def test_unanswerable_questions(tmp_path: Path) -> None:
    made = task(tmp_path, UNANSWERED, version_2_with_negative=True)
    scores = made.score("validation", gold(made))
    assert scores["exact"] == scores["f1"] == scores["NoAns_f1"] == scores["HasAns_exact"] == scores["best_f1"] == 100.0
    assert (scores["total"], scores["HasAns_total"], scores["NoAns_total"]) == (3, 1, 2)
    strict = replace(made.settings, null_score_diff_threshold=-100.0)
    silent = QaTask(strict, made.tokenizer).score("validation", gold(made))
    assert (silent["HasAns_f1"], silent["NoAns_f1"], silent["best_f1"]) == (0.0, 100.0, 100.0)
    paths = made.write_predictions("validation", gold(made), tmp_path / "out")
    assert paths[2].name == "eval_null_odds.json"
    odds = json.loads(paths[2].read_text())
    assert odds["0.0"] < 0 < odds["0.1"]
    assert json.loads(paths[0].read_text())["0.1"] == ""


def test_a_test_set_without_answers_is_predicted_only(tmp_path: Path) -> None:
    rows = [{"question": "what", "context": "a red boat"}, {"question": "who", "context": "she was born"}]
    made = task(tmp_path, rows, split="test")
    features = made.features("test")
    assert "start_positions" not in features.column_names
    logits = np.random.default_rng(0).standard_normal((2, len(features), 24), dtype=np.float32)
    (path, _) = made.write_predictions("test", tuple(logits), tmp_path)
    assert path.name == "predict_predictions.json"
    assert set(json.loads(path.read_text())) == {"0", "1"}
    with pytest.raises(gp.GraphPruneError, match="has no labels; split test can be predicted but not scored"):
        made.score("test", tuple(logits))


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "what", "context": "a red boat", "answers": {"text": ["boat"], "answer_start": [6]}}],
        [{"question": "what", "context": "a red boat", "answers": [{"text": "boat", "answer_start": 6}]}],
        [{"question": "what", "context": "a red boat", "answers": "boat"}],
        [{"question": "what", "context": "a boat boat", "answers": "boat", "answer_start": 7}],
        'question,context,answers\nwhat,a red boat,"{""text"": [""boat""], ""answer_start"": [6]}"\n',
        "question,context,answers,answer_start\nwhat,a red boat,boat,6\n",
        "question,context,answers\nwhat,a red boat,boat\n",
    ],
)
def test_answers_in_every_writing(tmp_path: Path, rows: Any) -> None:
    name = "a.csv" if isinstance(rows, str) else "a.json"
    made = task(tmp_path, train_file=write(tmp_path, name, rows))
    (example,) = made.examples("train")
    assert example["answers"]["text"] == ["boat"]
    start = example["answers"]["answer_start"][0]
    assert example["context"][start:] == "boat"


def answered(text: str, start: Any, context: str = "a red boat") -> list[dict[str, Any]]:
    good = {"question": "what", "context": "a red boat", "answers": {"text": ["red"], "answer_start": [2]}}
    return [good, {**good, "context": context, "answers": {"text": [text], "answer_start": [start]}}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            answered("boat", 5),
            r"example 2: the answer 'boat' does not lie at character 5.*where ' boa' is; it begins at 6",
        ),
        (answered("ship", 6), r"does not lie at character 6.*where 'boat' is; it does not occur in it"),
        (answered("a", -1), "does not lie at character -1"),
        (answered("boat", "x"), "answer_start is 'x'; it must be a whole number"),
        (answered("boat", None, "boat boat"), "occurs more than once in its context; give its answer_start"),
        (answered("ship", None), "the answer 'ship' does not occur in its context"),
        (
            [{"question": "q", "context": "c"}],
            r"no column 'answers'; its columns are 'question', 'context' \(--answer_column",
        ),
        ([{"question": "q", "context": "c", "answers": 3}], "example 1: the answers are 3"),
        ([{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": []}}], "1 answers and 0 values"),
        (
            [{"id": 1, "question": "q", "context": "c", "answers": "c"}] * 2,
            "example 2: id '1' is that of example 1 too",
        ),
        (
            UNANSWERED,
            r"2 of 3 questions.*first at data\[0\]\.paragraphs\[0\]\.qas\[1\].*pass --version_2_with_negative",
        ),
    ],
)
def test_bad_examples_say_where(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        task(tmp_path, content).features("validation")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match=r"doc_stride is 20 and max_seq_length 24.*at most 19"):
        task(tmp_path, doc_stride=20)
    with pytest.raises(gp.GraphPruneError, match="max_seq_length is 600, but the tokenizer's model_max_length is 512"):
        task(tmp_path, max_seq_length=600)
    slow = type("Slow", (), {"is_fast": False, "model_max_length": 512})()
    with pytest.raises(gp.GraphPruneError, match=r"Slow does not say where.*fast tokenizer"):
        make_task("qa", DataSettings(train_file="x.json"), slow)
    made = task(tmp_path)
    start, end = gold(made)
    with pytest.raises(gp.GraphPruneError, match=r"outputs of 2 features for split validation, which has \d+"):
        made.score("validation", (start[:2], end[:2]))
    with pytest.raises(gp.GraphPruneError, match="logits for 7 tokens; the longest feature has"):
        made.score("validation", (start[:, :7], end[:, :7]))
    with pytest.raises(gp.GraphPruneError, match="start_logits of the model hold NaN"):
        made.score("validation", (start * np.nan, end))
    with pytest.raises(gp.GraphPruneError, match="outputs have no 'end_logits'"):
        made.score("validation", {"start_logits": start})
    with pytest.raises(gp.GraphPruneError, match="no split 'test'"):
        made.features("test")


def test_a_question_longer_than_a_window_is_cut(tmp_path: Path) -> None:
    long = [{"question": "who " * 60, "context": "a red boat", "answers": "boat"}]
    made = task(tmp_path, long)
    assert made.score("validation", gold(made))["f1"] == 100.0


def test_tokenizers_that_pad_on_the_left(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]", cls_token="[CLS]", padding_side="left"
    )
    settings = DataSettings(validation_file=write(tmp_path, "a.json", CONTENT), max_seq_length=24, doc_stride=8)
    made = QaTask(settings, tokenizer)
    features = made.features("validation")
    assert {len(ids) for ids in features["input_ids"]} == {24}
    assert features[-1]["input_ids"][0] == tokenizer.pad_token_id
    assert made.windows("validation").null_position[-1] > 0
    assert made.score("validation", gold(made))["exact_match"] == 100.0


def test_batches_are_padded_and_keep_no_index(tmp_path: Path) -> None:
    made = task(tmp_path)
    features = made.features("validation").shuffle(seed=1)
    batch = made.collator()([features[0], features[1], features[2]])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    kept = made.collator(keep=["feature_index"], multiple=8)([features[0], features[1]])
    assert kept["feature_index"].tolist() == features["feature_index"][:2]
    assert kept["input_ids"].shape[1] % 8 == 0
    with pytest.raises(gp.GraphPruneError, match="no index column 'feature'; did you mean 'feature_index'"):
        made.collator(keep=["feature"])


def test_fingerprints_tell_inputs_apart(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert made.fingerprint("validation") == task(tmp_path, preprocessing_num_workers=1).fingerprint("validation")
    assert made.features("validation")._fingerprint == task(tmp_path).features("validation")._fingerprint
    assert made.fingerprint("validation") != task(tmp_path, doc_stride=7).fingerprint("validation")
    assert made.fingerprint("validation") != task(tmp_path, max_eval_samples=2).fingerprint("validation")


def reference(
    windows: Windows,
    contexts: list[str],
    start: np.ndarray,
    end: np.ndarray,
    n_best: int,
    longest: int,
    threshold: float | None,
) -> tuple[list[str], list[list[dict[str, Any]]], list[float]]:
    """The original's rules, read slowly: one window, one pair and one question at a time."""
    texts, listed, odds = [], [], []
    for question, context in enumerate(contexts):
        spans: list[dict[str, Any]] = []
        null: dict[str, Any] = {}
        for feature in np.flatnonzero(windows.example == question):
            at = windows.null_position[feature]
            score = start[feature, at] + end[feature, at]
            if not null or null["score"] > score:
                null = {"span": (0, 0), "score": score, "logits": (start[feature, at], end[feature, at])}
            for i in sorted(range(start.shape[1]), key=lambda k: -start[feature, k])[:n_best]:
                for j in sorted(range(end.shape[1]), key=lambda k: -end[feature, k])[:n_best]:
                    inside = windows.starts[feature, i] >= 0 and windows.starts[feature, j] >= 0
                    if inside and i <= j < i + longest:
                        span = (int(windows.starts[feature, i]), int(windows.ends[feature, j]))
                        logits = (start[feature, i], end[feature, j])
                        spans.append({"span": span, "score": logits[0] + logits[1], "logits": logits})
        if threshold is not None:
            spans.append(null)
        spans = sorted(spans, key=lambda item: item["score"], reverse=True)[:n_best]
        if threshold is not None and all(item["span"] != (0, 0) for item in spans):
            spans.append(null)
        found = [{**item, "text": context[slice(*item["span"])]} for item in spans]
        if not found or [item["text"] for item in found] == [""]:
            found.insert(0, {"text": "empty", "score": 0.0, "logits": (0.0, 0.0)})
        shares = np.exp([item["score"] - max(item["score"] for item in found) for item in found])
        listed.append(
            [
                {"text": i["text"], "start_logit": i["logits"][0], "end_logit": i["logits"][1], "probability": share}
                for i, share in zip(found, shares / shares.sum(), strict=True)
            ]
        )
        best = next(item for item in found if item["text"])
        odds.append(float(null["score"] - best["logits"][0] - best["logits"][1]))
        texts.append(found[0]["text"] if threshold is None else "" if odds[-1] > threshold else best["text"])
    return texts, listed, odds


@given(
    seed=st.integers(0, 10_000),
    n_best=st.sampled_from([2, 5, 20]),
    longest=st.sampled_from([1, 4, 30]),
    threshold=st.sampled_from([None, 0.0, -1.0]),
)
def test_answers_are_those_of_the_slow_reference(seed: int, n_best: int, longest: int, threshold: float | None) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 4, size=5)
    example = np.repeat(np.arange(5), counts)
    tokens = 12
    starts = np.full((len(example), tokens), -1, dtype=np.int32)
    ends = starts.copy()
    for row in range(len(example)):
        context = int(generator.integers(1, tokens - 2))  # question before, padding behind
        first = int(generator.integers(1, tokens - context))
        starts[row, first : first + context] = 3 * np.arange(context) + 6 * generator.integers(3)
        ends[row, first : first + context] = starts[row, first : first + context] + 2
    windows = Windows(example, starts, ends, np.zeros(len(example), dtype=np.int64))
    contexts = ["".join(generator.choice(list("abcdef "), size=60)) for _ in range(5)]
    start, end = generator.standard_normal((2, len(example), tokens)).astype(np.float32)
    texts, listed, odds = reference(windows, contexts, start, end, n_best, longest, threshold)
    found = find_candidates(windows, 5, start, end, n_best=n_best, max_answer_length=longest)
    chosen = choose(found, contexts, threshold=threshold)
    assert chosen.texts == texts
    assert chosen.null_odds == pytest.approx(odds, abs=1e-5)
    made = n_best_lists(found, contexts, n_best, with_null=threshold is not None)
    for mine, theirs in zip(made, listed, strict=True):
        assert [item["text"] for item in mine] == [item["text"] for item in theirs]
        for key in ("start_logit", "end_logit", "probability"):
            assert [item[key] for item in mine] == pytest.approx([item[key] for item in theirs], abs=1e-6)


def test_questions_without_a_span_answer_empty() -> None:
    starts = np.full((2, 4), -1, dtype=np.int32)
    windows = Windows(np.array([0, 1]), starts, starts, np.zeros(2, dtype=np.int64))
    logits = np.ones((2, 4), dtype=np.float32)
    found = find_candidates(windows, 2, logits, logits)
    assert choose(found, ["x", "y"], threshold=None).texts == ["empty", "empty"]
    assert choose(found, ["x", "y"], threshold=0.0).texts == ["", ""]
    assert n_best_lists(found, ["x", "y"], 20, with_null=False)[0][0]["text"] == "empty"
    assert [item["text"] for item in n_best_lists(found, ["x", "y"], 20, with_null=True)[1]] == ["empty", ""]


def test_scores_of_answers() -> None:
    exact, f1 = squad_scores(
        ["The red boat!", "a red ship", "", "boat", ""], [["red boat"], ["red boat", "x"], [], [], ["x"]]
    )
    assert exact.tolist() == [1, 0, 1, 0, 0]
    assert f1.tolist() == pytest.approx([1, 0.5, 1, 0, 0])


def test_the_best_threshold_answers_questions_of_equal_odds_together() -> None:
    each, has = np.array([1.0, 0.0, 1.0, 1.0]), np.array([True, False, True, True])
    assert best_threshold(each, has, np.array([-2.0, 0.0, -1.0, 0.0])) == (75.0, -1.0)
    assert best_threshold(each, has, np.array([-2.0, 5.0, -1.0, 0.0])) == (100.0, 0.0)
    assert best_threshold(each, ~has, np.array([-2.0, 5.0, -1.0, 0.0])) == (75.0, 0.0)


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (96, 32)])
def test_real_squad(tmp_path: Path, length: int, stride: int) -> None:
    """Four first answers are parts of words, such as the "gold" of "golden"; all others come out as they went in."""
    name = shared("squad/dev-v1.1.json.gz")
    settings = DataSettings(validation_file=name, max_eval_samples=50, max_seq_length=length, doc_stride=stride)
    made = QaTask(settings, real_tokenizer())
    assert len(made.features("validation")) >= (50 if length == 384 else 100)
    (path, _) = made.write_predictions("validation", gold(made), tmp_path)
    answers = {row["id"]: row["answers"]["text"] for row in made.examples("validation")}
    other = {text: answers[key][0] for key, text in json.loads(path.read_text()).items() if text not in answers[key]}
    assert other == {"golden": "gold", "18": "8", "49": "4", "12": "2"}
    assert made.score("validation", gold(made)) == {"exact_match": 92.0, "f1": 92.0}


def test_real_squad_2(tmp_path: Path) -> None:
    name = shared("squad/dev-v2.0-first5articles.json.gz")
    settings = DataSettings(validation_file=name, max_eval_samples=60, version_2_with_negative=True)
    made = QaTask(settings, real_tokenizer())
    scores = made.score("validation", gold(made))
    assert scores["exact"] == scores["NoAns_exact"] == scores["HasAns_f1"] == 100.0
    assert scores["NoAns_total"] > 10
    with pytest.raises(gp.GraphPruneError, match=r"of 60 questions of .*pass --version_2_with_negative"):
        QaTask(replace(settings, version_2_with_negative=False), real_tokenizer()).features("validation")
