"""calibrate: data goes through the observers, as a pass of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.ir.quantizing import observers
from graphprune.passes import Calibrate
from graphprune.pipeline.recipe import Recipe
from graphprune.quant.affine import choose_qparams
from graphprune.quant.observer_text import parse_observer
from graphprune.quant.schemes import parse_scheme
from tests.models import MODELS, example, mlp
from tests.traced import answer, run_passes, traced

OBSERVED = "annotate-quant,insert-observers"
SCHEME = parse_scheme("uint8:affine:tensor")


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 16, generator=generator) for _ in range(count)]


def observed(text: str = OBSERVED) -> Program:
    return run_passes(traced("mlp"), text)


def calibrated(text: str, data: object = None) -> Program:
    return gp.transform(traced("mlp"), text, data=batches() if data is None else data)  # type: ignore[arg-type]


# -- what it does -----------------------------------------------------------------------------------------------------


def test_the_graph_stays_and_scales_are_those_of_the_data() -> None:
    program, data = observed(), batches()
    text, before = str(program), answer(program, data[0])
    result = Calibrate(progress=False).run_on(program, data)
    assert result.stats == {"batches": 3}
    assert str(program) == text
    assert torch.equal(answer(program, data[0]), before)
    both = torch.cat(data)
    scale, zero_point = choose_qparams(both.min(), both.max(), SCHEME)
    assert torch.equal(program.tensor("first.input_scale"), scale)
    assert torch.equal(program.tensor("first.input_zero_point"), zero_point)


@pytest.mark.parametrize("observer", ["percentile(fraction=0.9)", "histogram-kl(bins=256)", "mse(bins=256,grid=20)"])
def test_histograms_are_read_at_the_end_only(observer: str) -> None:
    program, data = observed(f'annotate-quant{{observer="{observer}"}},insert-observers'), batches()
    program.train()
    for batch in data:
        program(batch)  # training is not calibration: nobody fills these histograms
    assert float(program.tensor("first.input_histogram").sum()) == 0
    scales: list[float] = []

    def watched() -> Iterator[Tensor]:
        for batch in data:
            scales.append(float(program.tensor("first.input_scale")))
            yield batch

    Calibrate(progress=False).run_on(program.eval(), watched())
    assert scales == [1.0] * 3
    watching = parse_observer(observer)
    state = None
    for batch in data:
        state = watching.update(state, batch)
    assert state is not None
    scale, zero_point = choose_qparams(*watching.range(state, SCHEME), SCHEME)
    assert torch.equal(program.tensor("first.input_scale"), scale)
    assert torch.equal(program.tensor("first.input_zero_point"), zero_point)
    if "percentile" in observer:
        assert float(scale) < float((torch.cat(data).max() - torch.cat(data).min()) / 255)


def test_calibrated_scales_are_those_that_quantize() -> None:
    program = calibrated(f"{OBSERVED},calibrate,insert-fake-quant,freeze-quant")
    (x,) = example("mlp") or ()
    plain = answer(traced("mlp"), x)
    assert float((answer(program, x) - plain).norm() / plain.norm()) < 0.05
    assert torch.equal(
        program.tensor("first.input_scale"), calibrated(f"{OBSERVED},calibrate").tensor("first.input_scale")
    )


def test_running_twice_with_the_same_data_changes_nothing() -> None:
    once, twice = calibrated(f"{OBSERVED},calibrate"), calibrated(f"{OBSERVED},calibrate,calibrate")
    for name, value in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value), name


def test_some_batches_only() -> None:
    data = batches(4)
    program = calibrated(f"{OBSERVED},calibrate{{batches=2}}", data)
    assert float(program.tensor("first.input_high")) == float(torch.cat(data[:2]).max())
    assert Calibrate(batches=2, progress=False).run_on(observed(), iter(data)).stats == {"batches": 2}


def test_mode_and_flags_are_put_back() -> None:
    program = observed().train()
    Calibrate(progress=False).run_on(program, batches())
    assert program.training
    assert program.observing
    assert not program.calibrating
    with pytest.raises(gp.PassError):
        Calibrate(progress=False).run_on(program.eval(), [torch.full((2, 16), float("inf"))])
    assert not program.observing
    assert not program.calibrating


@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(1, 11), max_size=3, unique=True).map(sorted),
    observer=st.sampled_from(["min-max", "percentile", "mse"]),
)
def test_how_data_is_cut_into_batches_does_not_matter(cuts: list[int], observer: str) -> None:
    data = torch.cat(batches())[:12]
    plan = f"annotate-quant{{observer={observer},select=[first]}},insert-observers,calibrate"
    whole, parts = calibrated(plan, [data]), calibrated(plan, list(torch.tensor_split(data, cuts)))
    assert torch.equal(whole.tensor("first.input_scale"), parts.tensor("first.input_scale"))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_not_a_number_is_named_with_the_site() -> None:
    program = traced("mlp")
    with torch.no_grad():
        program.tensor("second.bias")[3] = float("nan")
    run_passes(program, "annotate-quant{weights=none},insert-observers")
    with pytest.raises(gp.PassError, match=r"head\.input: observer min-max: the tensor holds NaN or infinity"):
        Calibrate(progress=False).run_on(program, batches())
    with pytest.raises(gp.PassError, match="batch 1: input 'x' has NaN"):
        Calibrate(progress=False).run_on(observed(), [*batches(1), torch.full((2, 16), float("nan"))])


def test_no_data() -> None:
    with pytest.raises(gp.PassError, match="calibrate needs calibration data"):
        gp.transform(traced("mlp"), f"{OBSERVED},calibrate")
    with pytest.raises(gp.PassError, match="got no batches"):
        calibrated(f"{OBSERVED},calibrate", [])
    used = iter(batches())
    list(used)
    with pytest.raises(gp.PassError, match="not used up before"):
        calibrated(f"{OBSERVED},calibrate", used)
    with pytest.raises(gp.PassError, match=r"one batch and not several; give a list: \[batch\]"):
        calibrated(f"{OBSERVED},calibrate", batches()[0])


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(gp.TraceError, match=r"batch 1: .*16"):
        calibrated(f"{OBSERVED},calibrate", [*batches(1), torch.randn(2, 15)])
    with pytest.raises(gp.TraceError, match=r"batch 0: .*'y'"):
        calibrated(f"{OBSERVED},calibrate", [{"y": torch.randn(2, 16)}])
    with pytest.raises(gp.PassError, match="batch 0 is a str"):
        calibrated(f"{OBSERVED},calibrate", ["text"])


def test_a_value_that_no_batch_reaches() -> None:
    program = run_passes(traced("bert_qa", labels=True), "annotate-quant,insert-observers")
    program.drop_inputs(frozenset({"start_positions", "end_positions"}))
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert Calibrate(progress=False).run_on(program, [inputs]).changed


@pytest.mark.parametrize("way", ["pass", "function"])
def test_a_frozen_program_is_refused(way: str) -> None:
    program = calibrated(f"{OBSERVED},calibrate,insert-fake-quant,freeze-quant")
    if way == "function":
        with pytest.raises(gp.PassError, match="frozen: its scales are fixed and its observers gone"):
            gp.training.calibrate(program, batches())
        return
    with pytest.raises(
        gp.PassError,
        match=r"calibrate cannot run on a Program that is frozen: put insert-fake-quant or insert-observers",
    ):
        gp.transform(program, "calibrate", data=batches())


def test_frozen_observers_are_refused() -> None:
    program = observed()
    program.freeze("observers")
    with pytest.raises(gp.PassError, match=r"the observers are frozen, by freeze_observers or Program\.freeze"):
        Calibrate(progress=False).run_on(program, batches())


def test_without_observers() -> None:
    with pytest.raises(gp.PassError, match="calibrate requires observed"):
        calibrated("calibrate")
    with pytest.raises(gp.PassError, match="batches=-1 is below 0"):
        Calibrate(batches=-1)


# -- replay, text -----------------------------------------------------------------------------------------------------


def test_a_saved_program_is_replayed_without_data(tmp_path: Path) -> None:
    text = 'annotate-quant{observer="percentile(bins=64)"},insert-observers,calibrate'
    program = gp.transform(MODELS["mlp"](), text, example("mlp"), data=batches(), factory=f"{mlp.__module__}:mlp")
    gp.save(program, tmp_path / "saved")
    again = gp.load(tmp_path / "saved")
    assert str(again) == str(program)
    for name, value in program.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    quantized = run_passes(again, "insert-fake-quant,freeze-quant")
    assert not list(observers(quantized))
    meta = gp.transform(traced("mlp").to("meta"), text)
    assert str(meta) == str(
        run_passes(traced("mlp").to("meta"), 'annotate-quant{observer="percentile(bins=64)"},insert-observers')
    )


@given(batches=st.integers(0, 1000), progress=st.booleans())
def test_text_reads_back(batches: int, progress: bool) -> None:
    step = Calibrate(batches=batches, progress=progress)
    assert Recipe.of(str(step)).passes == (step,)
