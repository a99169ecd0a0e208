"""Sparsity and quantization together: zero is the zero-point exactly, and masks survive training and calibration.

Random schemes, observers, patterns and weights, tiny, huge and all zero; checked after every step of the way from a mask to
integers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir import ops
from graphprune.ir.masking import masked_sites
from graphprune.ir.program import Program
from graphprune.ir.quantizing import quantizers
from graphprune.quant.affine import quantize
from graphprune.quant.schemes import QuantDtype, Scheme, parse_scheme

STEPS = 3
PATTERNS = ("unstructured", "4x1", "1x4", "2x2", "2:4", "1xchannel", "channelx1", "neuron")


class Net(nn.Module):
    """A convolution and two linear layers, whose weights are multiples of four in every direction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.middle = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(torch.relu(self.conv(x)).mean(2))))


@functools.cache
def base() -> Program:
    return gp.trace(Net().eval(), torch.randn(2, 4, 6))


class Case(NamedTuple):
    """One way through."""

    scheme: Scheme
    weight_observer: str
    observer: str
    pattern: str
    sparsity: float
    exponents: tuple[int, ...]
    dead_rows: bool
    fold_first: bool
    calibrated: bool


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    dtype = draw(st.sampled_from(list(QuantDtype)))
    symmetric = dtype.signed and draw(st.booleans())
    axis = draw(st.sampled_from([None, 0]))
    group = draw(st.sampled_from([None, 4, 8])) if axis == 0 else None
    return Scheme(dtype, symmetric, axis, group, reduced=dtype.bits == 8 and draw(st.booleans()))


cases = st.builds(
    Case,
    scheme=schemes(),
    weight_observer=st.sampled_from(["min-max", "mse(bins=64,grid=10)", "percentile(bins=64,fraction=0.9)"]),
    observer=st.sampled_from(["min-max", "moving-average-min-max", "percentile(bins=64)", "mse(bins=64,grid=4)"]),
    pattern=st.sampled_from(PATTERNS),
    sparsity=st.floats(0.1, 0.9),
    exponents=st.lists(st.sampled_from([-36, -12, -3, 0, 0, 0, 3]), min_size=3, max_size=3).map(tuple),
    dead_rows=st.booleans(),
    fold_first=st.booleans(),
    calibrated=st.booleans(),
)


def masked(case: Case) -> Program:
    """The net with weights as the case has them, under one-shot masks."""
    program = gp.transform(base())
    with torch.no_grad():
        for name, exponent in zip(("conv", "middle", "head"), case.exponents, strict=True):
            weight = program.tensor(f"{name}.weight")
            weight.mul_(10.0**exponent)
            if case.dead_rows:
                weight[1] = 0.0
    sparsity = 0.5 if case.pattern == "2:4" else case.sparsity
    options = f"pattern={case.pattern},sparsity={sparsity},scope=local,max_sparsity=1.0,ragged=pad,include_last=true"
    return gp.transform(program, f"insert-masks{{criterion=magnitude,schedule=one-shot,{options}}}")


def batch(step: int) -> Tensor:
    return torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(step))


def train(program: Program, total_steps: int = STEPS) -> None:
    """A few steps with weight decay and momentum, which would move zeros if anything could."""
    program.train()
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.05, weight_decay=0.1)
    with gp.training.Session(program, optimizer, total_steps=total_steps):
        for step in range(total_steps):
            program(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    program.eval()


def check(program: Program, masks: dict[str, Tensor], *, stored: bool = True) -> None:
    """Every pruned entry is zero, ``stored`` too, is the zero-point as an integer, and is zero again behind its quantizer."""
    for site in masked_sites(program):
        assert torch.equal(site.mask, masks[site.name])
        assert site.pattern.holds(site.logical_mask)
    if stored:  # before training, the mask alone makes them zero
        assert not any(bool(program.tensor(name)[~mask].any()) for name, mask in masks.items())
    for node, decision in quantizers(program):
        if decision.prefix not in masks:
            continue
        mask = masks[decision.prefix]
        weight, pruned = ops.mask(program.tensor(decision.prefix).detach(), mask), ~mask
        scale, zero_point = (program.tensor(f"{decision.prefix}_{kind}") for kind in ("scale", "zero_point"))
        scheme = parse_scheme(decision.scheme)
        assert bool((scale.isfinite() & (scale > 0)).all())
        integers = quantize(weight, scale, zero_point, scheme).int()
        assert scheme.qmin <= int(integers.min()) <= int(integers.max()) <= scheme.qmax
        assert torch.equal(integers[pruned], spread(zero_point, weight, scheme)[pruned])
        shown = ops.fake_quantize(weight, scale, zero_point, *node.args[3:])
        assert bool(shown.isfinite().all())
        assert not bool(shown[pruned].any())


def spread(zero_point: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """The zero-point of every entry of a weight."""
    if scheme.axis is None:
        return zero_point.expand_as(weight)
    if scheme.group is not None:
        return zero_point.repeat_interleave(scheme.group, 1 - scheme.axis)
    return zero_point.view([-1 if dim == scheme.axis else 1 for dim in range(weight.dim())]).expand_as(weight)


@settings(max_examples=40)
@given(case=cases)
def test_zeros_are_the_zero_point_from_the_mask_to_the_integers(case: Case) -> None:
    program = masked(case)
    masks = {site.name: site.mask.clone() for site in masked_sites(program)}
    assert masks
    data = [batch(100), batch(101)]
    plan = f'weights={case.scheme},weight_observer="{case.weight_observer}",observer="{case.observer}"'
    grouped = ',rules=["name conv: weights=int8:symmetric:channel"]' if case.scheme.group else ""
    program = gp.transform(program, f"annotate-quant{{{plan}{grouped}}}")
    if case.calibrated or "min-max" not in case.observer:
        steps = ["insert-observers", "calibrate", "insert-fake-quant"]
    else:
        steps = ["insert-fake-quant"]
    for step in steps:
        program = gp.transform(program, step, data=data)
        check(program, masks, stored=False)
    train(program)
    check(program, masks)
    gp.training.calibrate(program, data)
    check(program, masks)
    for step in ("fold-masks", "freeze-quant") if case.fold_first else ("freeze-quant", "fold-masks"):
        program = gp.transform(program, step)
        check(program, masks)
    assert program.properties & (gp.Property.FROZEN | gp.Property.MASKED) == gp.Property.FROZEN


@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
@pytest.mark.parametrize("scheme", ["int8:affine:tensor", "uint4:affine:channel:group4"])
def test_the_order_of_folding_and_freezing_does_not_matter(pattern: str, scheme: str) -> None:
    case = Case(parse_scheme(scheme), "min-max", "min-max", pattern, 0.5, (0, 0, 0), True, True, True)
    plan = f"annotate-quant{{weights={scheme},exclude=[conv]}},insert-observers,calibrate,insert-fake-quant"
    program = gp.transform(masked(case), plan, data=[batch(0)])
    first = gp.transform(program, "fold-masks,freeze-quant")
    second = gp.transform(program, "freeze-quant,fold-masks")
    assert str(first) == str(second)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_masks_that_grow_while_training_quantized() -> None:
    text = "insert-masks{pattern=4x1,sparsity=0.75,warm_up=1,cool_down=2,frequency=2},insert-fake-quant"
    program = gp.transform(base(), text)
    train(program, 12)
    masks = {site.name: site.mask.clone() for site in masked_sites(program)}
    assert all(float(mask.float().mean()) < 1 for mask in masks.values())
    check(program, masks)
    check(gp.transform(program, "freeze-quant,fold-masks"), masks)


def test_a_pattern_holds_in_the_integers() -> None:
    text = "insert-masks{pattern=2:4,sparsity=0.5,criterion=magnitude,schedule=one-shot,exclude=[conv]},dynamic-quant,fold-masks"
    program = gp.transform(base(), text)
    weight = program.tensor("middle.weight").detach()
    integers = quantize(
        weight,
        program.tensor("middle.weight_scale"),
        program.tensor("middle.weight_zero_point"),
        parse_scheme("int8:symmetric:channel"),
    )
    groups = (integers != 0).view(16, 2, 4).sum(-1)
    assert int(groups.max()) <= 2
