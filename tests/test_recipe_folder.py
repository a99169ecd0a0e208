"""The recipes in ``recipes/``: each loads, fits its training, and transforms a tiny model of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graphprune as gp
from graphprune.ir.masking import masked_sites, sparsity_of
from graphprune.pipeline.durations import check_durations
from graphprune.pipeline.recipe import Recipe
from tests.sparse_programs import sparse_program

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def model_of(path: Path) -> str:
    if "squad" in path.stem:
        return "distilbert_qa" if "distilbert" in path.stem or "once" in path.stem else "bert_qa"
    return "bert_token" if "conll" in path.stem else "bert_sequence"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    recipe = Recipe.load(path)
    check_durations(recipe)
    assert recipe.target is not None
    assert recipe.target.name == "onnx"
    for stage in recipe.stages:
        assert stage.distillation is not None
        assert stage.training.num_train_epochs is not None
        assert stage.training.per_device_train_batch_size is not None
        program = gp.transform(sparse_program(model_of(path)), stage.passes)
        sites = masked_sites(program)
        assert sites
        if stage.passes[0].name == "lock-masks" and stage.passes[0].options().get("pattern"):
            assert sparsity_of(sites) < 0.9  # whole units only
        elif stage.passes[0].name == "lock-masks":
            assert sparsity_of(sites) == pytest.approx(0.9, abs=0.01)
        else:
            assert {site.decision.pattern for site in sites} == {"2:4" if "2in4" in path.stem else "4x1"}
            assert {site.decision.sparsity for site in sites} == {recipe.variables["sparsity"]}
    assert Recipe.parse(recipe.to_yaml()).stages == recipe.stages


def test_the_table_lists_them_all() -> None:
    listed = re.findall(r"\]\((\S+\.yaml)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in RECIPES]
