"""The manager: order, bad passes, reproducers, instruments."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from graphprune.errors import PassError, SparsityError
from graphprune.ir import ops
from graphprune.ir.printer import print_program
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.passes import FindPrunable, FoldMasks, FreezeQuant, InsertFakeQuant, InsertMasks, RemoveDead
from graphprune.pipeline.base import Pass, PassResult
from graphprune.pipeline.instruments import Diff, Dump, PrintAfter, ReportCoverage, ShowProgress, Timing
from graphprune.pipeline.manager import PassManager, Pipeline
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.transform import transform
from tests.models import MODELS, example
from tests.traced import answer, run_passes, traced


class Raises(Pass):
    """A pass that fails with an error of Python's."""

    name = "raises"

    def run(self, program: Program) -> PassResult:
        raise KeyError("no such thing")


class Refuses(Pass):
    """A pass that fails with one of graphprune's errors."""

    name = "refuses"

    def run(self, program: Program) -> PassResult:
        raise SparsityError("too sparse")


class LeavesInvalid(Pass):
    """A pass that takes a buffer away which the graph uses."""

    name = "leaves-invalid"

    def run(self, program: Program) -> PassResult:
        del program.get_submodule("first").weight
        return PassResult(program, changed=True)


class Lies(Pass):
    """A pass that rewrites the graph and says that it did not."""

    name = "lies"

    def run(self, program: Program) -> PassResult:
        for node in program.calls(torch.ops.aten.relu.default):
            node.target = torch.ops.aten.tanh.default
        return PassResult(program, changed=False)


class LiesAboutAnnotations(Pass):
    """A pass that annotates and says that it did not."""

    name = "lies-about-annotations"

    def run(self, program: Program) -> PassResult:
        return dataclasses.replace(FindPrunable().run(program), changed=False)


class Exaggerates(Pass):
    """A pass that does nothing and says that it did."""

    name = "exaggerates"

    def run(self, program: Program) -> PassResult:
        return PassResult(program, changed=True)


MASKS = InsertMasks(sparsity=0.5, schedule="one-shot", criterion="magnitude")


# -- bad passes -------------------------------------------------------------------------------------------------------


def test_a_pass_that_raises() -> None:
    with pytest.raises(
        PassError, match=r"pipeline\[1\]\.raises failed with KeyError: 'no such thing' \(after find-prunable\)"
    ) as caught:
        PassManager((FindPrunable(), Raises())).run(traced("mlp"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_graphprunes_keeps_its_kind() -> None:
    with pytest.raises(SparsityError, match=r"pipeline\[0\]\.refuses: too sparse"):
        PassManager((Refuses(),)).run(traced("mlp"))


def test_a_pass_that_leaves_an_invalid_program() -> None:
    with pytest.raises(
        PassError, match=r"pipeline\[0\]\.leaves-invalid: left an invalid Program: graph at first\.weight: no parameter"
    ):
        PassManager((LeavesInvalid(),)).run(traced("mlp"))


@pytest.mark.parametrize("liar", [Lies(), LiesAboutAnnotations()])
def test_a_pass_that_lies_about_changed(liar: Pass) -> None:
    with pytest.raises(
        PassError, match=rf"pipeline\[0\]\.{liar.name}: it changed the graph and returned changed=False"
    ):
        PassManager((liar,)).run(traced("mlp"))


def test_a_pass_may_say_that_it_changed_something() -> None:
    assert PassManager((Exaggerates(),)).run(traced("mlp")).results[0].changed


# -- order ------------------------------------------------------------------------------------------------------------


def test_a_wrong_order_names_both_passes() -> None:
    with pytest.raises(
        PassError,
        match=r"pipeline\[0\]\.fold-masks requires masked, .*pipeline\[1\]\.insert-masks establishes it; put it before fold-masks",
    ):
        PassManager((FoldMasks(), MASKS)).run(traced("mlp"))
    with pytest.raises(
        PassError,
        match=r"pipeline\[2\]\.fold-masks requires masked.*pipeline\[1\]\.fold-masks destroys it; put fold-masks before",
    ):
        PassManager((MASKS, FoldMasks(), FoldMasks())).run(traced("mlp"))
    with pytest.raises(PassError, match="add the pass that establishes it before freeze-quant"):
        PassManager((FreezeQuant(),)).run(traced("mlp"))


def test_the_order_is_checked_before_anything_runs() -> None:
    program = traced("mlp")
    text = str(program)
    with pytest.raises(PassError, match="requires"):
        PassManager((MASKS, FreezeQuant())).run(program, in_place=True)
    assert str(program) == text


class AnyGraph(Exaggerates):
    """A pass that can cope with blocks."""

    name = "any-graph"
    forbids = Property.NONE


def test_what_a_pass_forbids_must_not_hold() -> None:
    flat, blocks = PassManager((Exaggerates(),)), PassManager((AnyGraph(),))
    with pytest.raises(
        PassError, match=r"pipeline\[0\].exaggerates cannot run on a Program that is partitioned: put inline-blocks"
    ):
        flat.check_order(Property.FUNCTIONAL | Property.PARTITIONED)
    assert flat.check_order(Property.FUNCTIONAL) == Property.FUNCTIONAL
    assert blocks.check_order(Property.PARTITIONED) == Property.PARTITIONED


def test_properties_are_folded_over_the_pipeline() -> None:
    manager = PassManager((FindPrunable(), MASKS, InsertFakeQuant(), FoldMasks()))
    quantized = Property.PLANNED | Property.OBSERVED | Property.FAKE_QUANT
    assert manager.check_order(Property.FUNCTIONAL) == Property.FUNCTIONAL | Property.SITES | quantized
    program = manager.run(traced("mlp")).program
    assert program.properties == Property.FUNCTIONAL | Property.SITES | quantized
    assert program.history == ("find-prunable", str(MASKS), "insert-fake-quant{reduce_range=false}", "fold-masks")


# -- copies -----------------------------------------------------------------------------------------------------------


def test_nothing_is_mutated_unless_in_place() -> None:
    program = traced("mlp")
    text, state = str(program), {key: value.clone() for key, value in program.state_dict().items()}
    after = PassManager((MASKS, FoldMasks(), InsertFakeQuant())).run(program).program
    assert after is not program
    assert (str(program), program.history, program.properties) == (text, (), Property.FUNCTIONAL)
    assert program.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in program.state_dict().items())
    same = PassManager((MASKS, FoldMasks())).run(program, in_place=True).program
    assert same is program
    assert not torch.equal(program.tensor("first.weight"), state["first.weight"])


def test_code_is_compiled_anew_after_a_change() -> None:
    program = traced("mlp")
    (x,) = example("mlp") or ()
    before = answer(program, x)
    PassManager((MASKS,)).run(program, in_place=True)
    assert not torch.equal(answer(program, x), before)


def test_transform_traces_and_leaves_the_model_alone() -> None:
    model = MODELS["mlp"]()
    program = transform(model, [MASKS, "fold-masks"], example("mlp"))
    assert not list(program.calls(ops.mask))
    assert bool((model.get_parameter("first.weight") != 0).all())
    again = transform(program, "insert-fake-quant")
    assert again is not program


# -- a pipeline is a pass ---------------------------------------------------------------------------------------------


def test_a_pipeline_is_a_pass() -> None:
    result = Pipeline((MASKS, FoldMasks())).run(traced("mlp"))
    assert result.changed
    assert result.stats["masks"] == result.stats["masks-folded"] == 2


def test_a_nested_pipeline_counts_as_its_passes() -> None:
    nested = PassManager((Pipeline((FindPrunable(), Pipeline((MASKS,)))), FoldMasks()))
    flat = PassManager((FindPrunable(), MASKS, FoldMasks()))
    assert nested.passes == flat.passes
    program = nested.run(traced("mlp")).program
    assert program.history == flat.run(traced("mlp")).program.history
    assert str(Pipeline((MASKS, FoldMasks()))) == f"{MASKS},fold-masks"
    with pytest.raises(PassError, match=r"pipeline\[1\]\.freeze-quant requires"):
        PassManager((Pipeline((MASKS, FreezeQuant())),)).run(traced("mlp"))


# -- reproducer -------------------------------------------------------------------------------------------------------


def test_a_reproducer_holds_the_ir_before_and_the_rest_of_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "reproducer"
    manager = PassManager((MASKS, FreezeQuantWithoutRequirement(), RemoveDead()), reproducer=folder)
    with pytest.raises(PassError, match=rf"\(after insert-masks\); reproducer in {folder}"):
        manager.run(traced("mlp"))
    assert (folder / "before.ir").read_text() == print_program(run_passes(traced("mlp"), str(MASKS)))
    assert (folder / "recipe.json").read_text() == '{\n  "pipeline": "raises-late,remove-dead"\n}\n'


class FreezeQuantWithoutRequirement(Raises):
    """Fails after another pass."""

    name = "raises-late"


def test_the_rest_of_the_recipe_is_a_recipe(tmp_path: Path) -> None:
    manager = PassManager((InsertMasks("2:4", 0.9), RemoveDead()), reproducer=tmp_path)
    with pytest.raises(SparsityError, match="reproducer in"):
        manager.run(traced("mlp"))
    assert Recipe.load(tmp_path / "recipe.json").passes == manager.passes


# -- instruments ------------------------------------------------------------------------------------------------------


def test_print_after() -> None:
    shown: list[str] = []
    PassManager((FindPrunable(), MASKS), (PrintAfter(shown.append, frozenset({"insert-masks"})),)).run(traced("mlp"))
    (text,) = shown
    assert text.startswith(f"// after [1] {MASKS}\ngraph @mlp(")
    shown.clear()
    PassManager((FindPrunable(), MASKS), (PrintAfter(shown.append),)).run(traced("mlp"))
    assert len(shown) == 2


def test_diff() -> None:
    shown: list[str] = []
    PassManager((FindPrunable(), MASKS), (Diff(shown.append),)).run(traced("mlp"))
    assert shown[0].count("\n+") == 2  # the file's name and the head of the graph, with its property
    assert "+  %first.weight_mask: bool[32,16] = buffer" in shown[1]


def test_timing() -> None:
    timing = Timing()
    PassManager((FindPrunable(), MASKS), (timing,)).run(traced("mlp"))
    assert [name for name, _ in timing.seconds] == ["find-prunable", "insert-masks"]
    assert all(seconds > 0 for _, seconds in timing.seconds)


def test_dump(tmp_path: Path) -> None:
    program = traced("mlp")
    after = PassManager((FindPrunable(), MASKS), (Dump(tmp_path / "ir"),)).run(program).program
    files = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert files == ["00-input.ir", "01-find-prunable.ir", "02-insert-masks.ir"]
    assert (tmp_path / "ir" / files[0]).read_text() == str(program)
    assert (tmp_path / "ir" / files[2]).read_text() == str(after)


def test_progress(tmp_path: Path) -> None:
    with Progress(console=Console(file=(tmp_path / "log").open("w"), force_terminal=False)) as progress:
        PassManager((FindPrunable(), MASKS), (ShowProgress(progress, 2),)).run(traced("mlp"))
        (task,) = progress.tasks
        assert (task.completed, task.description) == (2, "insert-masks")
        progress.console.file.close()
        progress.stop = lambda: None  # type: ignore[method-assign]


def test_coverage_is_reported_with_reasons() -> None:
    lines: list[str] = []
    text = "insert-masks{pattern=4x1,sparsity=0.5}"
    transform(MODELS["mlp"](), text, example("mlp"), instruments=[ReportCoverage(lines.append)])
    assert lines[0].startswith("[0] insert-masks: masks ")
    assert any(line.startswith("    left out ") and "last layer before the output" in line for line in lines[1:])
