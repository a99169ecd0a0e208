"""fold-masks: masks become zeros in storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import PassError, SparsityError
from graphprune.ir.masking import Pruned, masked_sites
from graphprune.ir.trace import trace
from graphprune.passes import FoldMasks
from graphprune.pipeline.recipe import Recipe
from graphprune.pipeline.transform import transform
from tests.models import MODELS, example
from tests.traced import answer, run_passes, traced

Golden = Callable[[str, str], None]
MASKED = "insert-masks{schedule=one-shot,criterion=magnitude,sparsity=0.5,ragged=pad}"


def test_golden(golden: Golden) -> None:
    program = run_passes(traced("mlp"), MASKED)
    golden("fold_masks_before", str(program))
    golden("fold_masks_after", str(run_passes(program, "fold-masks")))


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "gpt2_conv1d", "shared_weight", "grouped_conv"])
def test_outputs_are_bitwise_equal_and_zeros_are_stored(name: str) -> None:
    program = run_passes(traced(name), MASKED)
    inputs = example(name) or ()
    before = answer(program, *inputs)
    masks = {site.name: site.mask.clone() for site in masked_sites(program)}
    run_passes(program, "fold-masks")
    assert torch.equal(answer(program, *inputs), before)
    for weight, mask in masks.items():
        assert not bool(program.tensor(weight)[~mask].any())
        record = program.annotation(program.attribute(weight), Pruned)  # type: ignore[arg-type]
        assert record == Pruned("4x1")


def test_state_dict_is_the_sources_again() -> None:
    program = run_passes(traced("gpt2_conv1d"), f"{MASKED},fold-masks")
    assert set(program.state_dict()) == set(MODELS["gpt2_conv1d"]().state_dict())
    MODELS["gpt2_conv1d"]().load_state_dict(program.state_dict())


def test_nothing_to_fold() -> None:
    program = traced("mlp")
    text = str(program)
    assert not FoldMasks().run(program).changed
    assert str(program) == text
    run_passes(program, f"{MASKED},fold-masks")
    text = str(program)
    assert not FoldMasks().run(program).changed
    assert str(program) == text


def test_masks_under_fake_quantizers_fold_too() -> None:
    program = run_passes(traced("mlp"), f"{MASKED},insert-fake-quant")
    (x,) = example("mlp") or ()
    program.train()
    program(x)
    before = answer(program, x)
    assert torch.equal(answer(run_passes(program, "fold-masks"), x), before)


@settings(max_examples=10, deadline=None)
@given(pattern=st.sampled_from(["unstructured", "4x1", "3x5", "2:4", "channelx1"]), sparsity=st.floats(0.0, 0.5))
def test_folding_is_exact_for_every_pattern(pattern: str, sparsity: float) -> None:
    program = run_passes(
        traced("mlp"), f"{MASKED[:-1].replace('sparsity=0.5', f'sparsity={sparsity!r}')},pattern={pattern}}}"
    )
    (x,) = example("mlp") or ()
    before = answer(program, x)
    run_passes(program, "fold-masks{allow_unfinished=true}")
    assert torch.equal(answer(program, x), before)


def test_the_source_model_is_not_touched_unless_in_place() -> None:
    model = MODELS["mlp"]()
    program = trace(model, example("mlp"), check=False)
    transform(program, [MASKED, "fold-masks"])
    assert bool((model.get_parameter("first.weight") != 0).all())
    transform(program, [MASKED, "fold-masks"], in_place=True)
    assert int((model.get_parameter("first.weight") == 0).sum()) > 100


def test_unfinished_masks_are_refused() -> None:
    program = run_passes(traced("mlp"), "insert-masks{sparsity=0.8}")
    with pytest.raises(SparsityError, match=r"rule 0 \(4x1\) has reached sparsity 0.0000 of 0.8; train to the end"):
        FoldMasks().run(program)
    assert FoldMasks(allow_unfinished=True).run(program).changed


def test_a_program_without_masks_is_refused_by_the_manager() -> None:
    with pytest.raises(PassError, match=r"pipeline\[0\].fold-masks requires masked"):
        run_passes(traced("mlp"), "fold-masks")


@given(allow=st.booleans())
def test_text_reads_back(allow: bool) -> None:
    assert Recipe.of(str(FoldMasks(allow))).passes == (FoldMasks(allow),)


def test_one_shot_without_data_says_where_to_give_it() -> None:
    with pytest.raises(SparsityError, match=r"criterion snip needs data .* graphprune\.oneshot\.prune"):
        run_passes(traced("mlp"), "insert-masks{criterion=snip,schedule=one-shot},fold-masks")
