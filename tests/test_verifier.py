"""The verifier: every rule, broken by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphprune.errors import VerifyError
from graphprune.ir import ops
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import Operand, QuantPlan
from graphprune.ir.quantizing import Quantizer
from graphprune.ir.verifier import verify
from tests.models import MODELS, example
from tests.traced import run_passes, traced

Break = Callable[[Program], object]


def quantized() -> Program:
    program = run_passes(traced("mlp"), "insert-masks{sparsity=0.5},insert-fake-quant")
    program.train()
    program(*(example("mlp") or ()))
    return program.eval()


def node_of(program: Program, target: object) -> torch.fx.Node:
    return next(iter(program.calls(target)))


@pytest.mark.parametrize("name", MODELS)
def test_traces_are_valid(name: str) -> None:
    verify(traced(name))


def test_transformed_programs_are_valid() -> None:
    verify(quantized())
    verify(run_passes(quantized(), "freeze-quant"))


def _rename(program: Program) -> None:
    nodes = list(program.graph.nodes)
    nodes[-2].name = nodes[-3].name


def _use_early(program: Program) -> None:
    relu = node_of(program, torch.ops.aten.relu.default)
    node_of(program, torch.ops.aten.linear.default).append(relu)
    linear = list(program.calls(torch.ops.aten.linear.default))[1]
    relu.args = (linear,)


def _two_masks(program: Program) -> None:
    first, second = list(program.calls(ops.mask))[:2]
    second.update_arg(1, first.args[1])
    program.tensor(str(second.args[0].target)).data = program.tensor(str(first.args[0].target)).data  # type: ignore[union-attr]


def _unused(program: Program) -> None:
    node = node_of(program, ops.mask)
    with program.graph.inserting_after(node):
        program.graph.call_function(ops.mask, node.args)


def _second_output(program: Program) -> None:
    program.graph.create_node("output", "output", (program.output.args[0],), name="again")


def _set(name: str, value: object) -> Break:
    def change(program: Program) -> None:
        program.tensor(name).copy_(torch.as_tensor(value))

    return change


def _replace(name: str, value: torch.Tensor) -> Break:
    def change(program: Program) -> None:
        program.remove_buffer(name)
        program.add_buffer(name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "graph at .*: two nodes have this name"),
        (_use_early, "graph at relu: uses linear_1 before it is computed"),
        (
            lambda p: p.remove_buffer("first.weight_mask"),
            r"graph at first\.weight_mask: no parameter or buffer has this name",
        ),
        (
            lambda p: setattr(p.attribute("head.bias"), "target", "head"),
            "graph at head: no parameter or buffer has this name",
        ),
        (_unused, "graph at .*: the result of graphprune.mask.default is not used"),
        (_second_output, "graph: a graph has one output, this one has 2"),
        (
            lambda p: setattr(next(iter(p.graph.find_nodes(op="placeholder"))), "target", "y"),
            r"graph: inputs \('y',\) differ from the interface \('x',\)",
        ),
        (
            _replace("first.weight_mask", torch.ones(32, 16)),
            "masked at mask_default: the mask is torch.float32, not bool",
        ),
        (
            _replace("first.weight_mask", torch.ones(16, 32, dtype=torch.bool)),
            "masked at mask_default: mask and weight differ in shape",
        ),
        (
            lambda p: node_of(p, ops.mask).update_arg(1, node_of(p, torch.ops.aten.relu.default)),
            "uses relu before it is computed",
        ),
        (
            lambda p: node_of(p, ops.mask).update_arg(0, next(iter(p.graph.find_nodes(op="placeholder")))),
            "masked at mask_default: its first argument must be a weight",
        ),
        (
            lambda p: node_of(p, ops.mask).update_arg(1, next(iter(p.graph.find_nodes(op="placeholder")))),
            "masked at mask_default: its mask must be a buffer of the Program",
        ),
        (_two_masks, "masked at .*: (mask and weight differ in shape|a weight has one mask and a mask has one weight)"),
        (_set("first.weight_scale", 0.0), "fake-quant at fake_quantize.*: scale must be finite and positive"),
        (_set("first.input_scale", float("nan")), "fake-quant at .*: scale must be finite and positive"),
        (_set("first.input_zero_point", 256), r"fake-quant at .*: zero-point must lie in \[0, 255\]"),
        (_set("first.weight_zero_point", 3), "fake-quant at .*: the zero-point of a symmetric scheme is 0"),
        (
            _replace("first.input_zero_point", torch.zeros(2, dtype=torch.int32)),
            "fake-quant at .*: scale and zero-point differ in shape",
        ),
        (
            lambda p: p.forget(node_of(p, ops.fake_quantize), Quantizer),
            "fake-quant at .*: it carries no decision",
        ),
    ],
)
def test_a_broken_rule_is_named(change: Break, message: str) -> None:
    program = quantized()
    change(program)
    with pytest.raises(VerifyError, match=message):
        verify(program)


def test_channels_and_scales_agree() -> None:
    program = quantized()
    for kind, dtype in (("scale", torch.float32), ("zero_point", torch.int32)):
        name = f"first.weight_{kind}"
        program.remove_buffer(name)
        program.add_buffer(name, torch.ones(16, dtype=dtype) if kind == "scale" else torch.zeros(16, dtype=dtype))
    with pytest.raises(VerifyError, match=r"scale has shape \(16,\), its scheme asks for \(32,\)"):
        verify(program)


def test_a_mask_of_two_weights_and_a_weight_of_two_masks() -> None:
    program = run_passes(traced("shared_weight"), "insert-masks{sparsity=0.5}")
    mask = node_of(program, ops.mask)
    with program.graph.inserting_after(mask):
        buffer = program.graph.create_node("get_attr", "other_mask")
    program.register_buffer("other_mask", torch.ones(16, 16, dtype=torch.bool))
    with program.graph.inserting_after(buffer):
        second = program.graph.call_function(ops.mask, (mask.args[0], buffer))
    list(mask.users)[-1].replace_input_with(mask, second)
    with pytest.raises(VerifyError, match="a weight has one mask and a mask has one weight"):
        verify(program)


def test_a_frozen_graph_has_no_observers() -> None:
    program = quantized()
    program.properties |= Property.FROZEN
    with pytest.raises(VerifyError, match=r"frozen at .*: a frozen graph has no observers"):
        verify(program)


def test_the_lines_around_the_node_are_shown() -> None:
    program = quantized()
    program.tensor("first.weight_scale").zero_()
    with pytest.raises(VerifyError) as caught:
        verify(program)
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    assert [line.startswith("> ") for line in lines[1:]] == [False] * 3 + [True] + [False] * 3
    assert "graphprune.fake_quantize(" in lines[4]


def test_rules_of_a_property_hold_only_with_it() -> None:
    program = quantized()
    program.tensor("first.weight_scale").zero_()
    program.properties &= ~Property.FAKE_QUANT
    verify(program)
    assert isinstance(program.get_parameter("first.weight"), nn.Parameter)


# -- planned, observed ------------------------------------------------------------------------------------------------


def observed() -> Program:
    """A plan with observers, the head's with a histogram."""
    return run_passes(traced("mlp"), 'annotate-quant{rules=["name head: observer=percentile"]},insert-observers')


def _replan(position: int, *, weight: bool) -> Break:
    def change(program: Program) -> None:
        node = node_of(program, torch.ops.aten.linear.default)
        operand = Operand(position, "int8:symmetric:channel", "min-max", weight)
        program.annotate(node, QuantPlan.of("first.weight", [operand]))

    return change


def test_plans_and_observers_are_valid() -> None:
    verify(run_passes(traced("bert_qa"), "annotate-quant"))
    verify(observed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replan(7, weight=False), r"planned at linear: argument 7 is planned and no value"),
        (_replan(0, weight=True), r"planned at linear: argument 0 is planned as a weight and is none"),
        (
            lambda p: p.forget(node_of(p, ops.observe), Quantizer),
            "observed at observe.*: it carries no decision; insert it with insert-observers",
        ),
        (
            lambda p: node_of(p, ops.observe).update_arg(8, "int8:symmetric:tensor"),
            "observed at observe.*: it does not observe as its decision says",
        ),
        (
            lambda p: node_of(p, ops.observe).update_arg(1, next(iter(p.graph.find_nodes(op="placeholder")))),
            "observed at observe.*: its range must be a buffer of the Program",
        ),
        (
            _replace("first.input_high", torch.zeros(2)),
            "observed at observe.*: its range, scale and zero-point differ in shape",
        ),
        (
            _replace("first.weight_scale", torch.ones(16)),
            "observed at observe.*: its range, scale and zero-point differ in shape",
        ),
        (
            _replace("head.input_histogram", torch.zeros(3, 64)),
            "observed at observe.*: it needs one histogram for each range",
        ),
    ],
)
def test_a_broken_plan_or_observer_is_named(change: Break, message: str) -> None:
    program = observed()
    change(program)
    with pytest.raises(VerifyError, match=message):
        verify(program)
