"""Criteria: formulas, chunks, state and text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SparsityError
from graphprune.sparsity import CRITERIA, Magnitude, SnipMomentum, parse_criterion, parse_pattern

PATTERNS = ["unstructured", "4x1", "3x2", "2:4", "channelx1", "1xchannel"]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 20, 1 << 18])
@pytest.mark.parametrize("transposed", [False, True])
def test_snip_momentum_formula(text, chunk, transposed, monkeypatch):
    monkeypatch.setattr("graphprune.sparsity.criterion.CHUNK", chunk)
    torch.manual_seed(0)
    pattern, criterion = parse_pattern(text), SnipMomentum()
    weights, grads = torch.randn(3, 10, 7), torch.randn(3, 10, 7)
    if transposed:
        weights, grads = (
            weights.transpose(1, 2).contiguous().transpose(1, 2),
            grads.transpose(1, 2).contiguous().transpose(1, 2),
        )
    stored = criterion.initial(pattern, (10, 7), device="cpu")
    expected = torch.zeros(pattern.score_shape((10, 7)))
    for weight, grad in zip(weights, grads, strict=True):
        assert criterion.accumulate(stored, weight, grad, pattern) is stored
        expected = 0.9 * expected + 1.0 * pattern.reduce((weight * grad).abs())
    torch.testing.assert_close(stored, expected)
    assert criterion.scores(stored, weights[0], pattern) is stored


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_magnitude_formula(text, chunk, monkeypatch):
    monkeypatch.setattr("graphprune.sparsity.criterion.CHUNK", chunk)
    torch.manual_seed(0)
    pattern, weight = parse_pattern(text), torch.randn(10, 7, requires_grad=True)
    scores = Magnitude().scores(None, weight, pattern)
    torch.testing.assert_close(scores, pattern.reduce(weight.detach().abs()))
    assert not scores.requires_grad
    assert Magnitude().initial(pattern, (10, 7), device="cpu") is None


def test_magnitude_ranks_large_negative_weights_high():
    scores = Magnitude().scores(None, torch.tensor([[-5.0, 1.0, 0.1]]), parse_pattern("1x1"))
    assert scores.argmax() == 0


def test_half_precision_is_scored_in_float32():
    torch.manual_seed(0)
    pattern, weight = parse_pattern("2x1"), torch.randn(4, 4).bfloat16()
    expected = pattern.reduce((weight.float() * weight.float()).abs())
    torch.testing.assert_close(SnipMomentum().accumulate(None, weight, weight, pattern), expected)
    assert Magnitude().scores(None, weight, pattern).dtype == torch.float32
    low = SnipMomentum().initial(pattern, (4, 4), device="cpu").to(torch.bfloat16)
    assert SnipMomentum().accumulate(low, weight, weight, pattern).dtype == torch.bfloat16


def test_declarations():
    assert SnipMomentum.needs_gradient
    assert not SnipMomentum.dense_gradient
    assert not Magnitude.needs_gradient
    assert set(CRITERIA) >= {"magnitude", "snip_momentum"}


@given(st.floats(0, 0.99), st.floats(0.01, 10))
def test_text_roundtrip(decay, gain):
    criterion = SnipMomentum(decay, gain)
    assert parse_criterion(str(criterion)) == criterion


def test_text_forms():
    assert str(SnipMomentum()) == "snip_momentum"
    assert parse_criterion(" snip_momentum( decay = 0.5 ) ") == SnipMomentum(decay=0.5)
    assert parse_criterion("magnitude") == Magnitude()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snip_momentm", "did you mean 'snip_momentum'"),
        ("snip_momentum(decy=1)", "unknown option 'decy'; did you mean 'decay'"),
        ("snip_momentum(decay=x)", "no number"),
        ("snip_momentum(decay=0.1,decay=0.2)", "given twice"),
        ("snip_momentum(decay=1.0)", "0 <= decay < 1"),
        ("magnitude(", "cannot read"),
    ],
)
def test_text_refusals(text, message):
    with pytest.raises(SparsityError, match=message):
        parse_criterion(text)


def test_misuse():
    pattern, weight = parse_pattern("1x1"), torch.ones(2, 2)
    with pytest.raises(SparsityError, match="uses no gradients"):
        Magnitude().accumulate(None, weight, weight, pattern)
    with pytest.raises(SparsityError, match="seen no gradient"):
        SnipMomentum().scores(None, weight, pattern)
    with pytest.raises(SparsityError, match="gradient of shape"):
        SnipMomentum().accumulate(None, weight, torch.ones(2, 3), pattern)
