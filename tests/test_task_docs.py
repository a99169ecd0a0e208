"""The example files of docs/tasks.md are read as the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.glue_tasks import TASKS
from graphprune.tasks.task import make_task
from tests.task_data import tiny_tokenizer, write

for library in ("datasets", "torchmetrics", "seqeval"):
    pytest.importorskip(library, reason="tasks need the extra train")

PAGE = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: (task, text)
    for task, name, text in re.findall(r"<!-- test: (\w+) (\S+) -->\n```\w*\n(.*?)```", PAGE, re.DOTALL)
}
EXPECTED: dict[str, Any] = {
    "squad.json": ["Bergen", "1931"],
    "questions.jsonl": ["Bergen", "boat"],
    "questions.csv": ["Bergen", "boat"],
    "reviews.csv": ("bad", "good"),
    "pairs.jsonl": ("contradiction", "entailment"),
    "ratings.tsv": None,
    "entities.conll": ("B-LOC", "B-PER", "I-LOC", "O"),
    "entities.jsonl": ("B-LOC", "B-PER", "I-LOC", "O"),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_examples_are_read(tmp_path: Path, name: str) -> None:
    kind, text = EXAMPLES[name]
    task = make_task(kind, DataSettings(train_file=write(tmp_path, name, text)), tiny_tokenizer())
    assert len(task.features("train")) == 2
    if kind == "qa":
        assert [row["answers"]["text"][0] for row in task.examples("train")] == EXPECTED[name]  # type: ignore[attr-defined]
    else:
        assert task.label_names == EXPECTED[name]


def test_every_example_is_tested() -> None:
    assert set(EXAMPLES) == set(EXPECTED)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"<!-- test: python -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "reviews.csv", EXAMPLES["reviews.csv"][1])
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    scope: dict[str, Any] = {"folder": tmp_path / "model", "logits": np.eye(2)}
    exec(compile(code, "docs/tasks.md", "exec"), scope)
    assert scope["scores"]["accuracy"] == 1.0


def test_the_table_of_scores_names_every_task() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `glue`:")]
    for name, task in TASKS.items():
        (line,) = [line for line in lines if name in line]
        assert all(f"`{metric}`" in line for metric in task.metrics), line
        assert line.rstrip(" |").endswith(f"`{task.metrics[0]}`")
