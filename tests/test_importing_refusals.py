"""What the import of other tools' recipes refuses, with one clear error, and what it lists rather than guess."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import RecipeError
from graphprune.importing import Imported, NotCarried, import_recipe
from graphprune.pipeline.recipe import Recipe

FILES = sorted(path for path in (Path(__file__).parent / "recipes_of_others").glob("*/*") if path.is_file())


def reasons(imported: Imported) -> dict[str, str]:
    return {entry.key: entry.reason for entry in imported.not_carried}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pruning: {approach: !!python/object/apply:os.system ['touch /tmp/x']}",
            "line 1: the tag !!python/object/apply:os.system",
        ),
        ("training_modifiers:\n  - !!python/object:m.C {}\n", "line 2: the tag .* asks for an object"),
        ("? !!python/tuple [a]\n: 1\n", "line 1: a key is a list"),
        ("pruning: !include other.yml\n", "neither a SparseML recipe"),
        ("pruning: {approach: {weight_compression: [}}", "line 1, column .*: no YAML or JSON"),
        ("a: 1\na: 2\n", "line 2: the key 'a' is given twice"),
        ("", "the file is empty"),
        ("c = WeightPruningConfig(target_sparsity=0.5", "line 1: no Python: .* was never closed"),
        ("just some words", "neither a SparseML recipe"),
        ("hello: world\n", "neither a SparseML recipe"),
        ("pipeline: [fold-masks]\n", "a recipe of graphprune already"),
        ("a: &a [*a]\nx_modifiers: []\n", "line 1: an alias"),
        ("[" * 1200, "no YAML or JSON|nested too deeply"),
        ("a: 1\n---\nb: 2\n", "no YAML or JSON"),
        (
            'WeightPruningConfig([], 0.9, "magnitude", "4x1", [], [], None, 0, 0, "global", 1, 0.0, 0.98, "exp", [], 7)',
            "positional",
        ),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        import_recipe(text)
    assert str(caught.value).startswith("text: ")


def test_python_is_parsed_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    imported = import_recipe(
        f"open({str(trap)!r}, 'w').write('x')\n"
        f"c = WeightPruningConfig(pruning_configs=[{{'op_names': open({str(trap)!r}, 'w').write('x')}}], target_sparsity=half)\n"
    )
    assert not trap.exists()
    assert {entry.line for entry in imported.not_carried} == {1, 2}
    assert "worked out by a program" in reasons(imported)["WeightPruningConfig.target_sparsity"]


def test_a_kind_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing in it belongs to a sparseml file"):
        import_recipe('{"target_sparsity": 0.5}', kind="sparseml")
    with pytest.raises(RecipeError, match=r"unknown kind 'spareml'.*did you mean 'sparseml'"):
        import_recipe("{}", kind="spareml")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="cannot read"):
        import_recipe(Path("nowhere.yml"))


def test_expressions_are_safe_and_small_powers_are_written_out() -> None:
    imported = import_recipe(
        "end: 4\nlr: eval(10 ** end)\nx_modifiers:\n"
        "  - !EpochRangeModifier {end_epoch: eval(end ** 2)}\n"
        "  - !SetLearningRateModifier {learning_rate: eval(__import__('os').getpid())}\n"
    )
    assert imported.recipe.stages[0].training.num_train_epochs == 16
    assert "${end * end}" in imported.yaml
    assert {entry.line for entry in imported.not_carried} == {2, 5}


def test_numbers_that_are_none_are_listed() -> None:
    imported = import_recipe(
        '{"target_sparsity": "nan", "start_step": 1e400, "end_step": [1], "pruning_frequency": {}}'
    )
    assert {entry.key for entry in imported.not_carried} == {
        "target_sparsity",
        "start_step",
        "end_step",
        "pruning_frequency",
    }
    assert len(imported.recipe.passes) == 1


_WORDS = (
    "null",
    "[]",
    "{}",
    "-1",
    "2.5",
    "'x'",
    "[1, 2]",
    "{a: b}",
    "eval(no)",
    "eval(1/0)",
    "1e400",
    "!Foo {}",
    "nan",
    "[{}]",
    "0",
)


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from((*_WORDS, ""))), min_size=1, max_size=3),
)
@settings(max_examples=80)
def test_no_file_makes_it_fail_without_a_clear_error(path: Path, changes: list[tuple[int, str]]) -> None:
    lines = path.read_text().splitlines()
    for place, word in changes:
        head, colon, _ = lines[place % len(lines)].partition(":")
        lines[place % len(lines)] = f"{head}: {word}" if colon and word else ""
    try:
        imported = import_recipe("\n".join(lines))
    except RecipeError:
        return
    assert Recipe.parse(imported.yaml) == imported.recipe


def test_entries_print_themselves() -> None:
    assert str(NotCarried(3, "a.b", "no such thing")) == "line 3: a.b: no such thing"
