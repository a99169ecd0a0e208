"""Losses against their definitions in float64: values, gradients, what is masked, several teachers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphprune.training.losses import (
    embedding_loss,
    feature_loss,
    hidden_loss,
    logits_loss,
    mean_pool,
)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape, dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@given(rows=st.integers(1, 5), classes=st.integers(2, 9), temperature=st.floats(0.3, 8), seed=st.integers(0, 99))
def test_gradients_of_logits_are_the_formulas(rows: int, classes: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = pair(rows, classes)
    p, q = (torch.softmax(item / temperature, -1) for item in (teacher, student.detach()))
    by_hand = temperature * (q - p) / rows  # T^2 * 1/T * (q - p), the mean over rows
    for kind in ("kl", "ce"):
        loss = logits_loss(student, teacher, temperature, kind=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(gradient(loss, student), by_hand)
    entropy = -(p * p.log()).sum(-1).mean() * temperature**2
    kl, ce = (logits_loss(student, teacher, temperature, kind=kind) for kind in ("kl", "ce"))  # type: ignore[arg-type]
    torch.testing.assert_close(ce - entropy, kl)
    assert kl >= -1e-12
    mse = logits_loss(student, teacher, temperature, kind="mse")
    torch.testing.assert_close(gradient(mse, student), 2 * (student.detach() - teacher) / student.numel())


@given(scale=st.floats(0.01, 50), temperature=st.floats(0.5, 10))
def test_divergence_of_identical_logits_is_zero(scale: float, temperature: float) -> None:
    logits = torch.randn(4, 3, 7) * scale
    assert float(logits_loss(logits, logits, temperature)) == 0


def test_it_is_the_batch_mean_and_not_incs_mean() -> None:
    student, teacher = pair(6, 10)
    mean = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").mean()
    torch.testing.assert_close(logits_loss(student, teacher), mean * 10)


def test_leading_entries_weigh_alike() -> None:
    student, teacher = pair(3, 5, 7)
    torch.testing.assert_close(
        logits_loss(student, teacher, 2.0), logits_loss(student.flatten(0, 1), teacher.flatten(0, 1), 2.0)
    )


def test_a_high_temperature_is_half_the_squared_error_of_centered_logits() -> None:
    student, teacher = pair(4, 6)
    centered = [item - item.mean(-1, keepdim=True) for item in (student, teacher)]
    wanted = (centered[0] - centered[1]).square().sum(-1).mean() / (2 * 6)  # Hinton et al., section 2.1
    assert float(logits_loss(student, teacher, 1e4).detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)


@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
def test_masked_entries_and_classes_have_no_influence(kind: str) -> None:
    student, teacher = pair(2, 5)
    mask = torch.tensor([True, False])
    alone = logits_loss(student[:1], teacher[:1], 2.0, kind=kind)  # type: ignore[arg-type]
    torch.testing.assert_close(logits_loss(student, teacher, 2.0, kind=kind, mask=mask), alone)  # type: ignore[arg-type]
    classes = torch.tensor([True, True, True, False, False])
    fewer = logits_loss(student[:, :3], teacher[:, :3], 2.0, kind=kind)  # type: ignore[arg-type]
    both = logits_loss(student, teacher, 2.0, kind=kind, classes=classes)  # type: ignore[arg-type]
    torch.testing.assert_close(both, fewer)
    assert (gradient(both, student)[:, 3:] == 0).all()
    nothing = logits_loss(student, teacher, kind=kind, mask=torch.zeros(2, dtype=torch.bool))  # type: ignore[arg-type]
    assert float(nothing.detach()) == 0


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_masked_classes_stay_finite_in_half_precision(temperature: float) -> None:
    student, teacher = torch.randn(2, 4).bfloat16().requires_grad_(), torch.randn(2, 4).half()
    classes = torch.tensor([[True, True, False, False], [True, False, False, False]])
    loss = logits_loss(student, teacher, temperature, classes=classes)
    assert loss.dtype == torch.float32
    assert torch.isfinite(gradient(loss, student)).all()


def test_several_teachers_are_the_mean_of_their_softened_distributions() -> None:
    student, one = pair(4, 5)
    two = torch.randn(4, 5, dtype=torch.float64)
    p = 0.75 * torch.softmax(one / 3, -1) + 0.25 * torch.softmax(two / 3, -1)
    log_q = torch.log_softmax(student / 3, -1)
    torch.testing.assert_close(
        logits_loss(student, [one, two], 3.0, weights=[0.75, 0.25]), 9 * (p * (p.log() - log_q)).sum(-1).mean()
    )
    torch.testing.assert_close(
        logits_loss(student, [one, two], 3.0, kind="ce", weights=[0.75, 0.25]), 9 * -(p * log_q).sum(-1).mean()
    )
    torch.testing.assert_close(logits_loss(student, [one, one], 3.0), logits_loss(student, one, 3.0))
    wanted = (student - (one + two) / 2).square().mean()
    torch.testing.assert_close(logits_loss(student, [one, two], kind="mse"), wanted)
    classes = torch.tensor([True, True, True, False, False])
    assert torch.isfinite(logits_loss(student, [one, two], classes=classes).detach())


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("mse", lambda s, t: (s - t).square().mean(-1)),
        ("l1", lambda s, t: (s - t).abs().mean(-1)),
        ("cosine", lambda s, t: 1 - (s * t).sum(-1) / s.norm(dim=-1) / t.norm(dim=-1)),
        ("kl", lambda s, t: (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)),
    ],
)
def test_features_row_by_row(kind: str, formula: object) -> None:
    student, teacher = pair(2, 4, 8)
    rows = formula(student, teacher)  # type: ignore[operator]
    loss = feature_loss(student, teacher, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, rows.mean())
    torch.testing.assert_close(gradient(loss, student), gradient(rows.mean(), student))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    torch.testing.assert_close(feature_loss(student, teacher, kind, mask=mask), rows[mask].mean())  # type: ignore[arg-type]
    assert float(feature_loss(teacher, teacher, kind)) == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]


def test_distributions_are_not_softmaxed_again() -> None:
    student, teacher = (torch.randn(2, 3, 5, dtype=torch.float64).softmax(-1) for _ in range(2))
    wanted = (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(feature_loss(student, teacher, "kl"), wanted)
    torch.testing.assert_close(feature_loss(student, teacher, "kl", distributions=True), wanted)
    assert not torch.allclose(feature_loss(student, teacher, "kl", distributions=False), wanted)
    dropped = student.clone()
    dropped[..., 0] = 0  # dropout on an attention map
    assert torch.isfinite(feature_loss(dropped, teacher, "kl"))


def test_columns_of_padding_do_not_count() -> None:
    student, teacher = pair(1, 2, 4, 4)
    columns = torch.tensor([True, True, True, False])
    torch.testing.assert_close(
        feature_loss(student, teacher, "mse", columns=columns), (student - teacher)[..., :3].square().mean()
    )


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
    assert math.isfinite(float(mean_pool(hidden, torch.zeros(1, 3))))
