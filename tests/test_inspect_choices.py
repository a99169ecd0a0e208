"""``inspect --target``: how a target that chooses by weights is going to compute each layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphprune as gp
from graphprune import cli
from graphprune.artifact.inspection import inspect
from graphprune.errors import LoweringError, RecipeError
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.registry import known_targets, make_target, read_target
from graphprune.pipeline.target import Choice, Choices
from graphprune.targets.sparse_cpu import target as sparse_cpu
from graphprune.targets.sparse_cpu.cost import Decision
from tests.models import MODELS, example

MASKS = "insert-masks{pattern=4x1,sparsity=0.8,criterion=magnitude,schedule=one-shot}"
Asked = list[tuple[tuple[int, ...], int, bool]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the cost model was asked: shape, tokens, quantized. It finds layers with 32 inputs faster, and others not."""
    questions: Asked = []

    def decide(weight: Tensor, tokens: int, quantized: bool = False) -> Decision:
        questions.append((tuple(weight.shape), tokens, quantized))
        gain = 3.14 if weight.shape[1] == 32 else 0.5
        return Decision(gain > 1, gain, 1 - float(weight.count_nonzero()) / weight.numel(), 4)

    monkeypatch.setattr(sparse_cpu, "decide", decide)
    return questions


def pruned_mlp() -> nn.Module:
    """An MLP of which the first layers have zeros, and the last has none."""
    model = MODELS["mlp"]()
    with torch.no_grad():
        model.get_parameter("first.weight")[8:] = 0
        model.get_parameter("second.weight")[4:] = 0
    return model


def texts(model: nn.Module | Program, target: str = "sparse-cpu") -> dict[str, str]:
    inputs = None if isinstance(model, Program) else example("mlp")
    found = inspect(model, inputs, include_last=True, targets=[target])
    return {name: choice.text for name, choice in found.choices.get(target, {}).items()}


def test_says_of_each_layer_how_it_runs_and_what_it_gains(asked: Asked) -> None:
    found = inspect(pruned_mlp(), example("mlp"), include_last=True, targets=["onnx", "sparse-cpu"])
    head, first, second, last = str(found).splitlines()[:4]
    assert head.endswith("on sparse-cpu")
    assert first.endswith("dense (sparse 0.5x)")
    assert second.endswith("sparse, 3.1x")
    assert last.endswith(" dense")
    assert asked == [((32, 16), 128, False), ((32, 32), 128, False)]
    assert any("for 128 tokens and" in line for line in found.remarks)


def test_as_json(asked: Asked) -> None:
    sites = inspect(pruned_mlp(), example("mlp"), include_last=True, targets=["sparse-cpu"]).to_dict()["sites"]
    assert isinstance(sites, list)
    chosen = [json.loads(json.dumps(site["choices"]))["sparse-cpu"] for site in sites]
    assert chosen[1] == {"text": "sparse, 3.1x", "sparse": True, "gain": 3.14, "zeros": 0.875, "block": 4}
    assert (chosen[0]["sparse"], chosen[0]["gain"]) == (False, 0.5)
    assert chosen[2] == {"text": "dense", "sparse": False}


def test_a_model_that_is_not_pruned_is_dense_and_nothing_is_measured(asked: Asked) -> None:
    found = inspect(MODELS["conv_bn"](), example("conv_bn"), targets=["sparse-cpu"])
    assert {choice.text for choice in found.choices["sparse-cpu"].values()} == {"dense"}
    assert set(texts(MODELS["mlp"]()).values()) == {"dense"}
    assert not asked


def test_options_of_the_target_count(asked: Asked) -> None:
    assert texts(pruned_mlp(), "sparse-cpu{tokens=64,all=true}") == {
        "first.weight": "sparse, 0.5x",
        "second.weight": "sparse, 3.1x",
        "head.weight": "dense",
    }
    assert {tokens for _, tokens, _ in asked} == {64}


def test_masks_are_folded_and_quantizers_seen_in_a_copy(asked: Asked) -> None:
    program = gp.transform(MODELS["mlp"](), f"{MASKS},insert-fake-quant", example("mlp")).train()
    with torch.no_grad():
        program(**{name: torch.randn(4, 16) for name in program.interface.names})
    before = str(program)
    assert texts(program)["second.weight"] == "sparse, 3.1x"
    assert {quantized for _, _, quantized in asked} == {True}
    assert str(program) == before


def test_a_layer_without_a_kernel_is_dense_and_says_why(asked: Asked) -> None:
    program = gp.transform(MODELS["mlp"](), f"{MASKS},dynamic-quant", example("mlp"))
    found = inspect(program, targets=["sparse-cpu"]).choices["sparse-cpu"]["second.weight"]
    assert "at run time" in found.text
    assert found.measures["sparse"] is False


def test_what_cannot_be_decided_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Decision:
        raise LoweringError("the C++ compiler c++ cannot be run")

    monkeypatch.setattr(sparse_cpu, "decide", refuse)
    found = inspect(pruned_mlp(), example("mlp"), targets=["sparse-cpu"])
    assert not found.choices
    assert found.remarks[-1].endswith("is not known: the C++ compiler c++ cannot be run")
    assert "choices" not in found.to_dict()["sites"][0]  # type: ignore[index]
    with torch.device("meta"):
        empty = inspect(MODELS["mlp"](), example("mlp"), targets=["sparse-cpu"])
    assert "has no weights here" in empty.remarks[-1]
    program = gp.transform(MODELS["mlp"](), "insert-masks{pattern=4x1,sparsity=0.8}", example("mlp"))
    assert "fold-masks" in inspect(program, targets=["sparse-cpu"]).remarks[-1]


@pytest.mark.parametrize("name", sorted(set(known_targets()) - {"sparse-cpu"}))
def test_other_targets_choose_nothing(name: str) -> None:
    assert make_target(name).choices(trace(pruned_mlp(), example("mlp"))) == Choices()


def test_any_target_can_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def choices(self: object, program: Program) -> Choices:
        return Choices({"second.weight": Choice("twice", {"times": 2})}, "a remark")

    monkeypatch.setattr(known_targets()["onnx"], "choices", choices)
    found = inspect(MODELS["mlp"](), example("mlp"), targets=["onnx"])
    first, second = str(found).splitlines()[1:3]
    assert (first.split()[-1], second.split()[-1]) == ("-", "twice")
    assert found.remarks == ("onnx: a remark",)


def test_targets_are_read_with_their_options() -> None:
    assert read_target("onnx{opset=19}") == make_target("onnx", {"opset": 19})
    with pytest.raises(RecipeError, match="unknown option 'opste'; did you mean 'opset'"):
        read_target("onnx{opste=19}")
    with pytest.raises(RecipeError, match="names 2 targets"):
        read_target("onnx,torch")
    with pytest.raises(RecipeError, match="names 0 targets"):
        read_target("")


def test_on_the_command_line(asked: Asked, tmp_path: Path) -> None:
    gp.save(gp.transform(MODELS["mlp"](), MASKS, example("mlp"), factory="tests.models:mlp"), tmp_path / "saved")
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "saved"), "--target", "sparse-cpu", "--json"])
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout)["sites"]
    assert [site["choices"]["sparse-cpu"]["sparse"] for site in sites] == [False, True]
