"""Allocation and schedules against the reference, on many small inputs that no network would produce."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphprune.sparsity.allocation import Scope, allocate
from graphprune.sparsity.schedules import parse_schedule
from tests.conformance.reference_choice import Candidates, choose, sparsity_at


@st.composite
def _sites(draw: st.DrawFn) -> list[Candidates]:
    sites = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 12))
        scores = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))  # many ties
        size, last = draw(st.sampled_from([1, 2, 4, 9, 36])), draw(st.booleans())
        sizes = np.full(count, size, dtype=np.int64)
        sizes[-1] = max(1, size // 2) if last else size
        outside = draw(st.integers(0, 3))
        sites.append(Candidates(np.array(scores, dtype=np.float32) / 2, sizes, int(sizes.sum()) + outside))
    return sites


@settings(max_examples=150)
@example(  # the next unit of the first site is beyond its most: another, of a larger score, is nearer to the goal
    sites=[
        Candidates(np.zeros(2, dtype=np.float32), np.array([16, 8]), 24),
        Candidates(np.array([1, 4], dtype=np.float32), np.array([1, 1]), 2),
    ],
    sparsity=0.52,
    least=0.0,
    room=0.5,
    scope="global",
)
@given(
    sites=_sites(),
    sparsity=st.floats(0, 1),
    least=st.floats(0, 1),
    room=st.floats(0, 1),
    scope=st.sampled_from(["global", "local"]),
)
def test_choice_of_units(sites: list[Candidates], sparsity: float, least: float, room: float, scope: str) -> None:
    most = max(sparsity, least) + (1 - max(sparsity, least)) * room
    able = [min(site.weights * most, float(site.sizes.sum())) for site in sites]
    wanted = [sparsity * site.weights for site in sites]
    if sum(wanted) > sum(able) or (scope == "local" and any(a < w for a, w in zip(able, wanted, strict=True))):
        return  # refused, which tests of allocation look at
    have = allocate(
        [torch.from_numpy(site.scores) for site in sites],
        [torch.from_numpy(site.sizes) for site in sites],
        [site.weights for site in sites],
        sparsity,
        scope=Scope(scope),
        max_sparsity=most,
        min_sparsity=least,
    )
    for flags, mine in zip(choose(sites, [sparsity] * len(sites), scope, least, most), have, strict=True):
        assert np.array_equal(mine.numpy(), flags)


@pytest.mark.parametrize(
    "name", ["exponential", "linear", "cosine", "cube", "cubic", "inverse-cubic", "one-shot", "constant"]
)
@pytest.mark.parametrize("target", [0.1, 0.5, 0.8, 0.98])
def test_schedules(name: str, target: float) -> None:
    schedule = parse_schedule(name)
    for progress in np.linspace(0, 1, 41):
        wanted = sparsity_at(name, float(progress), target)
        assert schedule.sparsity(float(progress), 0.0, target) == pytest.approx(wanted, abs=1e-12)
    assert schedule.sparsity(1.0, 0.0, target) == target


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("exponential", [0.275, 0.474, 0.618, 0.724, 0.799]),
        ("linear", [0.159, 0.319, 0.479, 0.639, 0.799]),
        ("cosine", [0.043, 0.152, 0.329, 0.552, 0.799]),
    ],
)
def test_curves_are_those_that_neural_compressor_printed(name: str, printed: list[float]) -> None:
    """Five updates to 0.8. What it printed is short of the curve by rounding down, and above it where scores were equal."""
    have = [parse_schedule(name).sparsity(step / 5, 0.0, 0.8) for step in range(1, 6)]
    assert have == pytest.approx(printed, abs=5e-3)
    assert have[-1] == 0.8
