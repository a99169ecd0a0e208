"""``graphprune recipe``: import, show, check, new."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.errors import RecipeError
from graphprune.importing import import_recipe, write_inc_config
from graphprune.ir.masking import masked_sites
from graphprune.pipeline.durations import check_durations
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS

OTHERS = Path(__file__).parent / "recipes_of_others"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["recipe", *(str(item) for item in arguments)])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("command", ["import", "show", "check", "new"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_import_prints_the_recipe_and_lists_the_rest_apart() -> None:
    result = run("import", OTHERS / "inc" / "quantization.yml")
    assert result.exit_code == 0, result.stderr
    assert Recipe.parse(result.stdout) == import_recipe(OTHERS / "inc" / "quantization.yml").recipe
    assert "line 10   tuning.accuracy_criterion  graphprune tune" in result.stderr
    assert "line 12   tuning.exit_policy" in result.stderr


def test_what_the_documentation_prints() -> None:
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()

    def block(first: str, after: str) -> str:
        start = text.index(first)
        return textwrap.dedent(text[start : text.index(after, start)])

    grammar = Recipe.parse(block("    version: 1\n    variables: {sparsity: 0.8", "| key | meaning |"))
    assert [stage.name for stage in grammar.stages] == ["prune", "quantize"]
    check_durations(grammar)
    source = block("    num_epochs: 10\n", "the command says")
    printed = block("    # Imported from gmp.yaml", "In Python:")
    assert import_recipe(source).yaml.replace("Imported from text", "Imported from gmp.yaml").strip() == printed.strip()


def test_strict_fails_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    message = refused("import", OTHERS / "inc" / "quantization.yml", "--strict", "-o", out)
    assert "error: " in message
    assert "2 parts cannot be carried" in message
    assert not out.exists()
    whole = run("import", OTHERS / "sparseml" / "transfer_squad.yaml", "--strict", "-o", out)
    assert whole.exit_code == 0, whole.stderr
    assert whole.stdout == ""
    assert "everything was carried" in whole.stderr
    assert len(Recipe.load(out).stages) == 2
    assert "exists already" in refused("import", OTHERS / "inc" / "prune.yml", "-o", out)


def test_import_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("pruning: {approach: !!python/object:os.x {}}")
    assert "other.yaml: line 1: the tag !!python/object:os.x asks for an object" in refused("import", other)
    assert "cannot read" in refused("import", tmp_path / "nowhere.yaml")
    assert "a recipe of graphprune already" in refused(
        "import", Path("recipes/prune-once-for-all-squad.yaml").resolve()
    )


def test_show_puts_variables_in(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "variables: {epochs: 4, half: '${epochs / 2}'}\ntraining: {num_train_epochs: '${epochs}'}\n"
        "pipeline: ['insert-masks{pattern=2:4,sparsity=0.5,cool_down=\"${half} epochs\"}']\ntarget: onnx\n"
    )
    result = run("show", path, "--set", "epochs=6")
    assert result.exit_code == 0, result.stderr
    assert "# epochs = 6\n# half = 3.0  (${epochs / 2})\n" in result.stdout
    assert "cool_down: 3.0 epochs" in result.stdout
    assert Recipe.parse(result.stdout).stages == Recipe.load(path, epochs=6).stages
    assert "did you mean 'epochs'" in refused("show", path, "--set", "epoch=6")


def test_check_says_valid_or_one_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "variables: {epochs: 4}\ntraining: {num_train_epochs: '${epochs}'}\n"
        "pipeline:\n  - insert-masks: {warm_up: 10, end: 3 epochs}\n  - fold-masks\n"
    )
    result = run("check", path)
    assert result.exit_code == 0, result.stderr
    assert "valid; 1 stage (main), 2 passes" in result.stdout
    assert "insert-masks.warm_up=10: training is 4 epochs; it is compared when training starts" in result.stderr
    message = refused("check", path, "--set", "epochs=2")
    assert message.startswith(f"error: {path}: pipeline[0].insert-masks.end='3 epochs' comes after the end of training")
    path.write_text("pipeline: [insert-mask]\n")
    assert "did you mean 'insert-masks'" in refused("check", path)


@pytest.mark.parametrize("task", ["qa", "glue", "ner"])
@pytest.mark.parametrize("pattern", ["4x1", "2:4", "head"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_templates_are_recipes(task: str, pattern: str, target: str) -> None:
    for options in ([], ["--quantize"], ["--distill"], ["--quantize", "--distill"]):
        result = run("new", "--task", task, "--pattern", pattern, "--target", target, *options)
        assert result.exit_code == 0, result.stderr
        recipe = Recipe.parse(result.stdout)
        check_durations(recipe)
        assert recipe.target is not None
        assert recipe.target.name == target
        assert len(recipe.stages) == (2 if "--quantize" in options else 1)
        assert (recipe.stages[0].distillation is not None) == ("--distill" in options)


def test_a_template_transforms_a_model() -> None:
    recipe = Recipe.parse(run("new", "--pattern", "4x1", "--sparsity", "0.6").stdout)
    program = gp.transform(MODELS["bert_sequence"](), recipe)
    assert {site.decision.sparsity for site in masked_sites(program)} == {0.6}


def test_templates_refuse_what_does_not_exist() -> None:
    assert "did you mean 'qa'" in refused("new", "--task", "qaa")
    assert "did you mean '4x1'" in refused("new", "--pattern", "4y1")
    assert "did you mean 'onnx'" in refused("new", "--target", "onx")
    assert "sparsity=1.5 is not in [0, 1)" in refused("new", "--sparsity", "1.5")


def test_what_was_done_is_written_as_optimum_intel_did(tmp_path: Path) -> None:
    path = tmp_path / "inc_config.json"
    recipe = Recipe.parse(
        "distillation: {teacher: t, temperature: 2.0}\ntarget: onnx\n"
        "pipeline: ['insert-masks{pattern=1:4,sparsity=0.75,criterion=magnitude,progressive=2}', insert-fake-quant]\n"
    )
    write_inc_config(recipe, path, sparsity=0.6)
    assert json.loads(path.read_text()) == {
        "quantization": {"is_static": True, "dataset_num_samples": None},
        "pruning": {"approach": "magnitude_progressive", "pattern": "3:4", "sparsity": 60.0},
        "distillation": {"teacher_model_name_or_path": "t", "temperature": 2.0},
        "save_onnx_model": True,
    }
    again = import_recipe(path).recipe
    assert again.stages[0].distillation == recipe.stages[0].distillation
    assert vars(again.passes[0])["pattern"] == "1:4"
    assert [step.name for step in again.passes] == ["insert-masks", "insert-fake-quant"]
    write_inc_config(Recipe.of("lock-masks"), path)
    assert json.loads(path.read_text())["pruning"] == {"approach": "pattern_lock", "pattern": "1x1"}
    with pytest.raises(RecipeError, match="would be empty"):
        write_inc_config(Recipe.of("fold-conv-bn"), path)
