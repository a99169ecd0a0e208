"""The source model of a Program again: its class, with the Program's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.artifact.samples import make_inputs
from graphprune.errors import GraphPruneError, LoweringError
from graphprune.ir.source_model import remove_idle_normalizations, source_model
from tests.ipex_programs import RULE
from tests.models import HUGGING_FACE, MODELS, example
from tests.traced import traced


def logits(module: nn.Module, program: gp.Program) -> torch.Tensor:
    with torch.no_grad():
        output = module(**make_inputs(program)[0], **program.interface.constants)
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_it_computes_the_same(name: str) -> None:
    program = traced(name)
    with torch.no_grad():
        for value in program.parameters():
            value.mul_(1.5)
    model = source_model(program)
    assert type(model) is type(MODELS[name]())
    assert not model.training
    assert torch.equal(logits(model, program), logits(program, program))
    assert model.config is not program.config


def test_it_shares_nothing_with_the_program() -> None:
    program = traced("bert_qa")
    model = source_model(program)
    with torch.no_grad():
        model.qa_outputs.weight.zero_()
    assert program.tensor("qa_outputs.weight").any()


def test_factories_build_plain_modules() -> None:
    program = gp.trace(MODELS["mlp"](), example("mlp"), factory="tests.models:mlp")
    with torch.no_grad():
        program.tensor("head.weight").zero_()
    assert not source_model(program).head.weight.any()


def test_ties_stay() -> None:
    model = source_model(traced("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_folded_masks_and_rounded_weights_are_in_the_model() -> None:
    program = gp.transform(traced("bert_sequence"), f"insert-masks{{{RULE}}},fold-masks,dynamic-quant")
    weight = source_model(program).bert.pooler.dense.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(weight, program.tensor("bert.pooler.dense.weight"))


def test_folded_normalizations_do_nothing_and_can_go() -> None:
    program = gp.transform(traced("resnet"), "fold-conv-bn")
    model = source_model(program)
    assert torch.allclose(logits(model, program), logits(program, program), atol=1e-6)
    assert model.resnet.embedder.embedder.convolution.bias is not None
    remove_idle_normalizations(program, model)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert torch.allclose(logits(model, program), logits(program, program), atol=1e-6)


def test_a_program_of_the_loss_gives_a_model_of_its_own() -> None:
    program = traced("bert_sequence", labels=True)
    assert torch.equal(source_model(program).classifier.weight, program.tensor("classifier.weight"))


def test_stored_halves_come_back_as_float() -> None:
    program = gp.transform(traced("bert_sequence"), "cast-mixed{store=true}")
    assert {value.dtype for value in source_model(program).parameters()} == {torch.float32}


def test_masks_are_refused() -> None:
    program = gp.transform(traced("bert_sequence"), f"insert-masks{{{RULE}}}")
    with pytest.raises(LoweringError, match="run fold-masks first"):
        source_model(program)


def test_inserted_factors_are_refused() -> None:
    program = traced("bert_sequence")
    program = gp.transform(program, "smooth-quant{folding=false,progress=false}", data=make_inputs(program))
    with pytest.raises(LoweringError, match=r"input_smoothing, read by aten\.mul.* has no place in transformers"):
        source_model(program)


def test_another_version_of_the_class_is_refused() -> None:
    program = traced("bert_sequence")
    program.config.num_hidden_layers = 3
    with pytest.raises(LoweringError, match=r"has bert\.encoder\.layer\.2.*which the Program has not"):
        source_model(program)
    program.config.num_hidden_layers = 2
    program.config.hidden_size = 16
    with pytest.raises(LoweringError, match=r"has shape \(.*build it with the config"):
        source_model(program)


def test_sources_without_config_or_factory_are_refused() -> None:
    with pytest.raises(GraphPruneError, match="has no Hugging Face config"):
        source_model(traced("mlp"))
