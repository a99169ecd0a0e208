"""The snippets of docs/distillation.md run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graphprune as gp
from tests.taught import bert, collate, examples, saved, tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "distillation.md"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_page_runs(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    model, data = bert(num_hidden_layers=2), examples(count=16)
    big = bert(seed=1, hidden_size=24, intermediate_size=48, num_hidden_layers=4)
    scope = {
        "model": model,
        "batches": [collate(data[start : start + 4]) for start in range(0, 16, 4)] * 3,
        "data": data,
        "collate": collate,
        "tokenizer": tokenizer(),
        "out": str(tmp_path / "out"),
        "caches": tmp_path / "caches",
        "teacher_folder": saved(big, tmp_path / "teacher"),
        "__name__": "example",
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    for number, block in enumerate(blocks):
        if number == 1:
            scope["teacher"] = big
        exec(compile(block, f"docs/distillation.md, block {number}", "exec"), scope)
    assert scope["both"].shares == (2 / 3, 1 / 3)
    assert scope["trainer"].state.log_history
    assert scope["cache"].computed == 16


def test_its_recipe_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (stage,) = gp.Recipe.parse(text).stages
    assert stage.distillation is not None
    made = gp.training.Distillation.from_settings(stage.distillation, bert())
    assert made.layers == ((1, 2), (2, 4))
