"""Patterns head and neuron: the same units go in every layer that has a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.ir.groups import find_heads, find_neurons
from graphprune.ir.masking import MaskedSite, masked_sites, sparsity_of
from graphprune.ir.program import Program
from graphprune.sparsity.channels import Channel
from tests.traced import inputs_of, pair, run_passes, tensors, traced

ONCE = "criterion=magnitude,schedule=one-shot"


def gone(site: MaskedSite) -> Tensor:
    """Per channel of the site's axis: whether all of it is masked."""
    pattern = site.pattern
    assert isinstance(pattern, Channel)
    return ~site.logical_mask.any(1 - pattern.axis)


def assert_units_agree(program: Program, kind: str) -> int:
    """Every group's members lose the same units; returns how many are lost."""
    found, _ = find_heads(program) if kind == "head" else find_neurons(program)
    sites = {site.name: site for site in masked_sites(program)}
    lost = 0
    for group in found:
        members = [member for member in group.members if member.site in sites]
        if not members:
            continue
        choices = []
        for member in members:
            channels = gone(sites[member.site])[member.start : member.start + group.count * member.width]
            units = channels.view(group.count, member.width)
            assert torch.equal(units.all(1), units.any(1))
            choices.append(units.all(1))
        assert all(torch.equal(choice, choices[0]) for choice in choices)
        lost += int(choices[0].sum())
    return lost


@pytest.mark.parametrize("kind", ["head", "neuron"])
@pytest.mark.parametrize("name", ["bert_sequence", "gpt2", "llama", "t5", "vit"])
def test_whole_units_go_everywhere(name: str, kind: str) -> None:
    program = run_passes(traced(name), f"insert-masks{{pattern={kind},sparsity=0.5,{ONCE}}}")
    sites = masked_sites(program)
    assert sites
    assert assert_units_agree(program, kind) > 0
    assert sparsity_of(sites) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("name", "kind"), [("bert_sequence", "head"), ("llama", "neuron"), ("gpt2", "head")])
def test_producers_do_not_matter_where_the_consumer_is_zero(name: str, kind: str) -> None:
    model, program = pair(name)
    masked = run_passes(program, f"insert-masks{{pattern={kind},sparsity=0.5,{ONCE}}}").eval()
    inputs = inputs_of(name, model)
    with torch.no_grad():
        want = tensors(masked(**inputs))
        for site in masked_sites(masked):
            pattern = site.pattern
            assert isinstance(pattern, Channel)
            if pattern.axis == 0:
                site.mask.fill_(True)
        have = tensors(masked(**inputs))
    for first, second in zip(want, have, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", ["snip_momentum", "retrain_free", "taylor"])
def test_trained_with_a_session(criterion: str) -> None:
    program = traced("bert_sequence", labels=True).train()
    program = run_passes(
        program,
        f"insert-masks{{pattern=head,sparsity=0.5,criterion={criterion},warm_up=2,cool_down=0,frequency=2}}",
    )
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-3)
    session = gp.training.Session(program, optimizer, total_steps=8)
    for step in range(8):
        torch.manual_seed(step)
        ids = torch.randint(5, 50, (4, 6))
        program(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.done
    assert assert_units_agree(program, "head") > 0


def test_exported_and_verified(tmp_path: Path) -> None:
    program = run_passes(traced("bert_sequence"), f"insert-masks{{pattern=head,sparsity=0.5,{ONCE}}}")
    program = run_passes(program, f'insert-masks{{pattern=neuron,sparsity=0.5,exclude=["*pooler*"],{ONCE}}}')
    artifact = gp.export(program, target="onnx", out=tmp_path / "out")
    gp.verify(tmp_path / "out")
    patterns = {site.pattern for site in artifact.manifest.sites}
    assert {"1xchannel", "channelx1"} <= patterns


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", "pattern=head", "fits none"),
        ("bert_sequence", 'pattern=head,select=["*query"]', "which was not chosen"),
        ("bert_sequence", "pattern=head,criterion=l0", "coupled with other sites"),
        ("bert_sequence", "pattern=neuron,progressive=2", "none to divide"),
        ("bert_sequence", "pattern=heads", "unknown sparsity pattern"),
    ],
)
def test_refusals(name: str, options: str, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        gp.transform(traced(name), f"insert-masks{{{options}}}")
