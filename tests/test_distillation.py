"""Distillation losses against their definitions, and the weighted sum on real outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

import graphprune as gp
from graphprune.training import Distillation, embedding_loss, hidden_loss, logits_loss, mean_pool


def test_logits_loss_is_the_softened_divergence() -> None:
    student, teacher = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    wanted = (p * (p / q).log()).sum(-1).mean() * 4
    assert logits_loss(student, teacher, 2.0) == pytest.approx(float(wanted), rel=1e-5)
    assert float(logits_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


def test_hidden_loss_is_relative_and_leaves_padding_out() -> None:
    teacher = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    student = teacher.clone()
    student[1, 2:] = 100
    assert float(hidden_loss(student, teacher, mask)) == 0
    noisy = teacher + 0.1
    assert float(hidden_loss(noisy, teacher, mask)) == pytest.approx(
        float(hidden_loss(noisy * 50, teacher * 50, mask)), rel=1e-4
    )


def test_no_gradient_reaches_the_teacher() -> None:
    student = torch.randn(2, 4, 8, requires_grad=True)
    teacher = torch.randn(2, 4, 8, requires_grad=True)
    total = logits_loss(student, teacher) + hidden_loss(student, teacher) + embedding_loss(student[:, 0], teacher[:, 0])
    total.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert float(mean_pool(hidden, torch.tensor([[1, 1, 0]]))) == 2.0


@pytest.fixture(scope="module")
def pair() -> tuple[gp.Program, BertModel]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    teacher = BertModel(config, add_pooling_layer=False).eval()
    return gp.trace(copy.deepcopy(teacher), output_hidden_states=True), teacher


def test_a_program_equal_to_its_teacher_has_no_loss(pair: tuple[gp.Program, BertModel]) -> None:
    program, teacher = pair
    ids = torch.randint(0, 99, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    distillation = Distillation(teacher, hidden=2.0, embedding=1.0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    program.eval()
    loss = distillation.loss(program(**inputs), distillation.run_teacher(inputs), mask)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        program.tensor("encoder.layer.1.output.dense.weight").add_(torch.randn(16, 32))
    assert float(distillation.loss(program(**inputs), distillation.run_teacher(inputs), mask).detach()) > 0.01


def test_the_teacher_keeps_its_mode_and_gets_no_labels(pair: tuple[gp.Program, BertModel]) -> None:
    _, teacher = pair
    teacher.train()
    output = Distillation(teacher, embedding=1.0).run_teacher(
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1)}
    )
    assert teacher.training
    assert not output.last_hidden_state.requires_grad
    teacher.eval()


def test_refusals(pair: tuple[gp.Program, BertModel]) -> None:
    _, teacher = pair
    with pytest.raises(gp.GraphPruneError, match="all weights zero does nothing"):
        Distillation(teacher)
    with pytest.raises(gp.GraphPruneError, match="temperature=0 is not positive"):
        Distillation(teacher, logits=1.0, temperature=0)
    with pytest.raises(gp.GraphPruneError, match="share none of logits"):
        Distillation(teacher, logits=1.0).loss({}, {})
    with pytest.raises(gp.GraphPruneError, match="trace or call it with output_hidden_states=True"):
        Distillation(teacher, hidden=1.0).loss({}, {})
    states = {"hidden_states": (torch.zeros(1, 2, 4),) * 2}
    wide = {"hidden_states": (torch.zeros(1, 2, 8),) * 2}
    with pytest.raises(gp.GraphPruneError, match="map layers of one width"):
        Distillation(teacher, hidden=1.0).loss(states, wide)
