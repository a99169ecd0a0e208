"""Rows are scored and written in their order, also where training batches are grouped by length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.task_data import tiny_classifier, write

pytest.importorskip("datasets", reason="fine-tuning needs the extra train")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("order"))


def test_predictions_are_in_order(model: Path, tmp_path: Path) -> None:
    from graphprune.finetuning.run import finetune

    rows = [("the red boat " * (1 + 5 * (at % 3)) + str(at), ("near", "long")[at % 2]) for at in range(24)]
    data = write(tmp_path, "rows.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    found = {}
    for strategy in ("random", "group_by_length"):
        out = tmp_path / strategy
        words = (
            f"--model_name_or_path {model} --validation_file {data} --test_file {data} --do_eval --do_predict --use_cpu "
            f"--per_device_eval_batch_size 4 --train_sampling_strategy {strategy} --output_dir {out}"
        )
        scores = finetune("glue", words.split())
        (predicted,) = out.glob("predict_results*.txt")
        found[strategy] = (scores["eval_loss"], scores["eval_accuracy"], predicted.read_text())
    assert found["random"][1:] == found["group_by_length"][1:]
    assert found["random"][0] == pytest.approx(found["group_by_length"][0], rel=1e-5)
    assert len(set(found["random"][2].split())) > 2  # both classes are predicted, so that another order would be seen


@pytest.mark.parametrize("labels", [True, False])
def test_test_data_of_another_size_is_scored_where_it_has_labels(labels: bool, model: Path, tmp_path: Path) -> None:
    from graphprune.finetuning.run import finetune

    rows = [(f"the red boat {at}", ("near", "long")[at % 2]) for at in range(12)]
    dev = write(tmp_path, "dev.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    wanted = [f"{text},{label}" if labels else text for text, label in rows[:7]]
    test = write(tmp_path, "test.csv", "\n".join(["text,label" if labels else "text", *wanted]) + "\n")
    words = (
        f"--model_name_or_path {model} --validation_file {dev} --test_file {test} --do_eval --do_predict --use_cpu "
        f"--output_dir {tmp_path / 'out'}"
    )
    scores = finetune("glue", words.split())
    (predicted,) = (tmp_path / "out").glob("predict_results*.txt")
    answers = [line.split("\t")[1] for line in predicted.read_text().splitlines()[1:]]
    assert len(answers) == 7
    assert ("predict_accuracy" in scores) is labels
    if labels:
        right = sum(answer == label for answer, (_, label) in zip(answers, rows, strict=False))
        assert scores["predict_accuracy"] == pytest.approx(right / 7)
