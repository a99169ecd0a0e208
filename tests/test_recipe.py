"""Recipes: three writings of one thing, and refusals that say where."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphprune.passes
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.passes import FindPrunable, FoldMasks, InsertFakeQuant, InsertMasks, KeepOutputs
from graphprune.pipeline import registry
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.registry import known_passes, known_targets, make_pass
from graphprune.pipeline.text import format_pass, parse_pipeline

YAML = """
version: 1
variables:
  target: 0.8
  half: ${target / 2}
  where: encoder
pipeline:
  - find-prunable:
      exclude: ["*.${where}_0", pooler]
  - insert-masks: {pattern: 2:4, sparsity: "${min(half, 0.5)}", warm_up: 1e-1, select: ["${where}.*"]}
  - fold-masks
"""
PASSES = (
    FindPrunable(exclude=("*.encoder_0", "pooler")),
    InsertMasks("2:4", 0.4, warm_up=0.1, select=("encoder.*",)),
    FoldMasks(),
)
TEXT = "find-prunable{exclude=[*.encoder_0,pooler]},insert-masks{pattern=2:4,sparsity=0.4,warm_up=0.1,select=[encoder.*]},fold-masks"


def test_three_writings_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    for recipe in (
        Recipe.of(path),
        Recipe.load(path),
        Recipe.parse(YAML),
        Recipe.of(TEXT),
        Recipe.of(PASSES),
        Recipe.of([PASSES[0], "insert-masks{pattern=2:4,sparsity=0.4,warm_up=0.1,select=encoder.*},fold-masks"]),
        Recipe.of([{"find-prunable": {"exclude": ["*.encoder_0", "pooler"]}}, str(PASSES[1]), {"fold-masks": {}}]),
        Recipe.of({"pipeline": TEXT}),
        Recipe.of(Recipe.of(TEXT)),
    ):
        assert recipe.passes == PASSES
        assert recipe.text() == str(recipe) == TEXT
        assert Recipe.parse(recipe.to_yaml()).passes == PASSES


def test_one_pass_is_a_recipe() -> None:
    assert Recipe.of(FoldMasks()).passes == Recipe.of("fold-masks").passes == (FoldMasks(),)
    assert Recipe.of(()).passes == Recipe.of("").passes == ()


def test_numbers_are_read_as_yaml_1_2_does() -> None:
    def read(text: str) -> Pass:
        return Recipe.parse(f"pipeline:\n  - insert-masks: {{{text}}}").passes[0]

    assert read("pattern: 2:4, sparsity: 5e-1") == InsertMasks("2:4", 0.5)
    assert read("pattern: 1:4, sparsity: .5") == InsertMasks("1:4", 0.5)
    assert read("warm_up: 010, frequency: 3") == InsertMasks(warm_up=10, frequency=3)


# -- properties -------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.floats(allow_nan=False), st.text(max_size=12)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
words = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)


@given(st.lists(st.tuples(words, st.dictionaries(words, values, max_size=3)), max_size=4))
def test_any_pipeline_text_reads_back(passes: list[tuple[str, dict[str, object]]]) -> None:
    text = " , ".join(format_pass(name, options) for name, options in passes)
    assert parse_pipeline(text) == passes


def _strategy(cls: type[Pass]) -> st.SearchStrategy[Pass]:
    """Passes of a class with values that its options take."""
    texts = st.lists(st.text(min_size=1, max_size=8), max_size=2).map(tuple)
    options: dict[str, st.SearchStrategy[Any]] = {
        "select": texts,
        "exclude": texts,
        "ops": st.lists(st.sampled_from(["linear", "conv2d", "embedding"]), max_size=2).map(tuple),
        "include_last": st.booleans(),
        "allow_unfinished": st.booleans(),
        "names": st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3).map(tuple),
        "momentum": st.floats(0, 1, exclude_min=True),
        "sparsity": st.floats(0, 0.9),
        "max_sparsity": st.floats(0.9, 1),
        "pattern": st.sampled_from(["2:4", "4x1", "unstructured", "channelx1"]),
        "criterion": st.sampled_from(["magnitude", "snip_momentum"]),
        "schedule": st.sampled_from(["cubic", "linear", "one-shot"]),
        "frequency": st.integers(1, 10**9),
        "warm_up": st.one_of(st.integers(0, 10**9), st.floats(0, 1, exclude_max=True)),
    }
    fields = {key for key in cls.__dataclass_fields__ if key in options}
    return st.fixed_dictionaries({key: options[key] for key in fields}).map(lambda chosen: cls(**chosen))


every_pass = st.one_of([_strategy(cls) for cls in known_passes().values()])


@given(st.lists(every_pass, max_size=4))
def test_parse_of_format_is_the_same_for_every_pass(passes: list[Pass]) -> None:
    recipe = Recipe.of(passes)
    assert Recipe.of(recipe.text()) == recipe
    assert Recipe.parse(recipe.to_yaml()) == recipe


# -- variables --------------------------------------------------------------------------------------------------------


def sparsity_of(expression: str, variables: str = "{a: 0.5, b: 2, c: '${a}', n: four}", **overrides: object) -> object:
    text = f"variables: {variables}\npipeline:\n  - insert-masks: {{sparsity: '{expression}'}}"
    step = Recipe.parse(text, **overrides).passes[0]
    assert isinstance(step, InsertMasks)
    return step.sparsity


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${a}", 0.5),
        ("${ c }", 0.5),
        ("${a / b}", 0.25),
        ("${max(a, 0.75) - a}", 0.25),
        ("${round(a * 1.5, 1)}", 0.8),
        ("${-a + 1}", 0.5),
        ("${(b + 1) % 2 / 2}", 0.5),
        ("${float(b // 4)}", 0.0),
    ],
)
def test_expressions(expression: str, value: float) -> None:
    assert sparsity_of(expression) == pytest.approx(value)


def test_overrides() -> None:
    assert sparsity_of("${c}", a=0.25) == 0.25
    assert Recipe.parse(YAML, where="decoder").passes[0] == FindPrunable(exclude=("*.decoder_0", "pooler"))
    with pytest.raises(RecipeError, match="variable 'targt' is not in the recipe; did you mean 'target'"):
        Recipe.parse(YAML, targt=0.5)
    with pytest.raises(RecipeError, match="variable 'target' cannot be set: only a recipe file or mapping"):
        Recipe.of(TEXT, target=0.5)


def test_variables_inside_longer_texts_and_in_each_other() -> None:
    text = (
        "variables: {part: encoder, layer: '${part}.layer.${n}', n: 3}\npipeline: 'find-prunable{select=[${layer}.*]}'"
    )
    assert Recipe.parse(text).passes == (FindPrunable(select=("encoder.layer.3.*",)),)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("${d}", r"pipeline\[0\]\.insert-masks\.sparsity: unknown variable 'd'"),
        ("${a.real}", r"'a\.real' is not allowed"),
        ("${__import__(1)}", r"'__import__\(1\)' is not allowed"),
        ("${(1).__class__}", r"is not allowed"),
        ("${a ** b}", r"'a \*\* b' is not allowed"),
        ("${[1][0]}", r"is not allowed"),
        ("${a if b else c}", r"is not allowed"),
        ("${min(a, key=b)}", r"is not allowed"),
        ("${True}", r"'True' is not allowed"),
        ('${"x"}', r"is not allowed"),
        ("${a +}", r"is no expression"),
        ("${}", r"is no expression"),
        ("${a / 0}", r"'a / 0' cannot be computed: .*division by zero"),
        ("${n * 1000}", r"'n \* 1000' cannot be computed: 'four' is no number"),
        ("${min()}", r"cannot be computed"),
    ],
)
def test_what_an_expression_may_not_be(expression: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sparsity_of(expression)


@pytest.mark.parametrize("variables", ["{a: '${b}', b: '${a}'}", "{a: 'x${a}'}", "{a: '${b + 1}', b: 'x ${a}'}"])
def test_circles(variables: str) -> None:
    with pytest.raises(RecipeError, match=r"variables refer to each other in a circle: a -> "):
        sparsity_of("${a}", variables)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline:\n\t- fold-masks", r"line 2, column 1: .*indent with spaces"),
        ("pipeline: !!python/object/apply:os.system [ls]", r"line 1, column 11: .*tags are not allowed"),
        ("pipeline: fold-masks\npipeline: fold-masks", r"line 2, column 1: key 'pipeline' is given twice"),
        ("pipeline:\n  - insert-masks: {sparsity: 0.5, sparsity: 0.6}", "key 'sparsity' is given twice"),
        ("? [pipeline]\n: fold-masks", "a key is a list or mapping"),
        ("pipeline: [fold-masks", "line 1"),
        ("- fold-masks", "a recipe is a mapping with the key 'pipeline', not list"),
        ("", "a recipe is a mapping with the key 'pipeline', not NoneType"),
        ("{}", "either a pipeline or stages; this one has neither"),
        ("pipelin: fold-masks", "unknown key 'pipelin'; did you mean 'pipeline'"),
        ("pipeline: fold-masks\ntarge: onnx", "unknown key 'targe'; did you mean 'target'"),
        ("pipeline: 3", "pipeline: .*not 3"),
        ("pipeline: [3]", r"pipeline\[0\]: .*not 3"),
        ("version: 2\npipeline: fold-masks", "recipe version 1, not 2"),
        ("version: one\npipeline: fold-masks", "version: .*not 'one'"),
        ("variables: {a: [1]}\npipeline: fold-masks", r"variables\.a: .*not \[1\]"),
        ("pipeline: [{fold-masks: {}, find-prunable: {}}]", r"pipeline\[0\]: a step is a pass"),
        ("pipeline: [fold-mask]", r"pipeline\[0\]: unknown pass 'fold-mask'; did you mean 'fold-masks'"),
        (
            "pipeline: [find-prunable, insert-masks: {sparsty: 0.5}]",
            r"pipeline\[1\]\.insert-masks: unknown option 'sparsty'; did you mean 'sparsity'",
        ),
        (
            "pipeline: [find-prunable, insert-masks: {sparsity: high}]",
            r"pipeline\[1\]\.insert-masks\.sparsity: .*valid number, not 'high'",
        ),
        ("pipeline: [insert-masks: {sparsity: '0.5'}]", r"pipeline\[0\]\.insert-masks\.sparsity: .*not '0.5'"),
        ("pipeline: [insert-masks: {sparsity: true}]", r"pipeline\[0\]\.insert-masks\.sparsity: .*not True"),
        ("pipeline: [insert-masks: {frequency: 1.5}]", r"pipeline\[0\]\.insert-masks: frequency=1.5 is no length"),
        ("pipeline: [insert-masks: {pattern: 4}]", r"pipeline\[0\]\.insert-masks\.pattern: .*not 4"),
        ("pipeline: [insert-masks: {select: [1]}]", r"pipeline\[0\]\.insert-masks\.select: .*not 1"),
        ("pipeline: [fold-masks: {allow_unfinished: 1}]", r"allow_unfinished: .*not 1"),
        ("pipeline: [insert-masks: {sparsity: 80}]", r"pipeline\[0\]\.insert-masks: sparsity=80.* is not in \[0, 1\)"),
        ("pipeline: [insert-masks: {pattern: 4y1}]", r"pipeline\[0\]\.insert-masks: .*4y1"),
        ("pipeline: [insert-masks: {schedule: cubc}]", r"pipeline\[0\]\.insert-masks: .*did you mean .*cubic"),
        ("pipeline: fold-masks\ntarget: onx", "target: unknown target 'onx'; did you mean 'onnx'"),
        ("pipeline: fold-masks\ntarget: {nam: onnx}", r"unknown key 'target\.nam'; did you mean 'name'"),
        ("pipeline: fold-masks\ntarget: {name: onnx, options: {opse: 18}}", r"target\.onnx: unknown option 'opse'"),
        ("pipeline: fold-masks\ntarget: {name: onnx, options: {opset: new}}", r"target\.onnx\.opset: .*not 'new'"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*missing\.yaml"):
        Recipe.load(tmp_path / "missing.yaml")
    path = tmp_path / "wrong.yaml"
    path.write_text("pipeline: fold-mask")
    with pytest.raises(RecipeError, match=r"wrong\.yaml: pipeline\[0\]: unknown pass"):
        Recipe.load(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-masks{", "expected the name of an option, found 'the end'"),
        ("fold-masks fold-masks", "expected ','"),
        ("fold-masks,", "expected the name of a pass"),
        ("insert-masks{sparsity}", "expected '='"),
        ("insert-masks{sparsity=}", "expected a value"),
        ("insert-masks{sparsity=0.5,sparsity=0.6}", "option 'sparsity' is given twice"),
        ('insert-masks{pattern="2:4}', "expected a closing quote"),
        (r'insert-masks{pattern="\q"}', "is no JSON string"),
        ("insert-masks{select=[a,b}", "expected ','"),
        ("{}", "column 1: expected the name of a pass"),
    ],
)
def test_wrong_pipeline_text(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of(text)


def test_special_numbers() -> None:
    ((_, options),) = parse_pipeline("a{x=inf,y=-inf,z=nan,w=1e400}")
    assert (options["x"], options["y"], options["w"]) == (math.inf, -math.inf, math.inf)
    assert isinstance(options["z"], float)
    assert math.isnan(options["z"])


# -- registry ---------------------------------------------------------------------------------------------------------


def test_entry_points_find_every_pass() -> None:
    assert {cls.__name__ for cls in known_passes().values()} == set(graphprune.passes.__all__)
    assert all(name == cls.name for name, cls in known_passes().items())
    assert "onnx" in known_targets()


def test_make_pass() -> None:
    assert make_pass("insert-fake-quant", {"select": "encoder"}) == InsertFakeQuant(select=("encoder",))
    assert make_pass("keep-outputs", {"names": ["a", "b"]}) == KeepOutputs(("a", "b"))
    with pytest.raises(RecipeError, match=r"^unknown pass 'x'"):
        make_pass("x", {})


def test_passes_of_third_parties_and_name_clashes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(FoldMasks):
        """Another pass of the same name."""

    class Point:
        def __init__(self, cls: type[Pass]) -> None:
            self.package = ModuleType("third_party")
            self.package.__all__ = [cls.__name__]  # type: ignore[attr-defined]
            setattr(self.package, cls.__name__, cls)

        def load(self) -> ModuleType:
            return self.package

    load = registry._load.__wrapped__
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(FoldMasks)])
    assert load("graphprune.passes", Pass) == {"fold-masks": FoldMasks}
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(FoldMasks), Point(Other)])
    with pytest.raises(GraphPruneError, match="two packages offer 'fold-masks'"):
        load("graphprune.passes", Pass)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(GraphPruneError, match=r"no entry points graphprune\.passes are installed"):
        load("graphprune.passes", Pass)
