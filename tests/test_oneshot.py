"""Pruning a Program once: every architecture, order and sharing of inputs, criteria of every kind, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.oneshot import prune
from graphprune.oneshot.batches import bind_batches
from graphprune.oneshot.plan import Stop, make_plan
from graphprune.oneshot.walk import Walker
from graphprune.oneshot.weights import InMemory, Meter
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.sparsegpt import SparseGPT
from graphprune.sparsity.wanda import Wanda
from tests.models import MODELS
from tests.traced import answer, inputs_of, pair, run, run_passes, tensors, traced

ARCHITECTURES = [name for name in MODELS if name != "conv_transpose"]


def masked(name: str, criterion: str, *, pattern: str = "2:4", labels: bool = False, **fields: object) -> gp.Program:
    options = {
        "pattern": pattern,
        "sparsity": 0.5,
        "criterion": criterion,
        "schedule": "one-shot",
        "scope": "local",
        **fields,
    }
    listed = ",".join(f"{key}={value}" for key, value in options.items())
    return run_passes(traced(name, labels=labels), f"insert-masks{{{listed}}}")


def data(name: str, sizes: tuple[tuple[int, int], ...] = ((3, 5), (2, 7), (1, 6))) -> list[dict[str, Tensor]]:
    """Batches of several shapes."""
    batches = [inputs_of(name, MODELS[name](), batch=batch, length=length) for batch, length in sizes]
    generator = torch.Generator().manual_seed(3)
    return [
        {
            key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for key, value in batch.items()
        }
        for batch in batches
    ]


def weights(program: gp.Program) -> dict[str, Tensor]:
    return {site.name: site.weight.detach().clone() for site in masked_sites(program)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_every_architecture(name: str, criterion: str) -> None:
    program = masked(name, criterion)
    before = weights(program)
    report = prune(program, data(name))
    sites = masked_sites(program)
    assert [site.name for site in report.sites] == [site.name for site in sites]
    for site, entry in zip(sites, report.sites, strict=True):
        assert site.pattern.holds(site.logical_mask)
        assert entry.sparsity == pytest.approx(0.5)
        assert not site.weight[~site.mask].any()
        assert entry.tokens > 0
        assert torch.equal(site.weight, before[site.name] * site.mask) == (criterion == "wanda")
    outputs = tensors(run(program, data(name)[0]))
    assert all(torch.isfinite(output).all() for output in outputs)
    folded = run_passes(copy.deepcopy(program), "fold-masks")
    for one, other in zip(tensors(run(folded, data(name)[0])), outputs, strict=True):
        assert torch.equal(one, other)


class Recorder(nn.Module):
    """Keeps the inputs of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.inputs = layer, []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.reshape(-1, x.shape[-1]))
        return self.layer(x)


@torch.no_grad()
def by_hand(
    model: nn.Module, names: list[str], batches: list[dict[str, Tensor]], criterion: SparseGPT | Wanda
) -> dict[str, Tensor]:
    """Prune layer after layer the slow way: run the whole model for each, record the layer's inputs."""
    found = {}
    for name in names:
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        layer = model.get_submodule(f"{owner}.{leaf}" if owner else leaf)
        recorder = Recorder(layer)
        setattr(model.get_submodule(owner), leaf, recorder)
        for batch in batches:
            model(**batch)
        setattr(model.get_submodule(owner), leaf, layer)
        statistic = criterion.statistic(layer.in_features, "cpu")
        for x in recorder.inputs:
            criterion.observe(statistic, x)
        layer.weight.copy_(criterion.prune(layer.weight, statistic, parse_pattern("2:4"), 0.5)[0])
        found[name] = layer.weight.clone()
    return found


@pytest.mark.parametrize("name", ["mlp", "residual", "bert_sequence", "llama"])
@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT()], ids=str)
def test_each_layer_sees_inputs_that_went_through_pruned_layers(name: str, criterion: SparseGPT | Wanda) -> None:
    model, program = pair(name)
    program = run_passes(
        program, f"insert-masks{{pattern=2:4,sparsity=0.5,criterion={criterion},schedule=one-shot,scope=local}}"
    )
    prune(program, data(name))
    expected = by_hand(model, [site.name for site in masked_sites(program)], data(name), criterion)
    for site in masked_sites(program):
        assert torch.equal(site.weight == 0, expected[site.name] == 0), site.name
        torch.testing.assert_close(site.weight.detach(), expected[site.name], rtol=1e-3, atol=1e-5)


def test_sites_with_one_input_are_pruned_together() -> None:
    program = masked("llama", "sparsegpt")
    plan = make_plan(program, masked_sites(program), ["input_ids", "attention_mask"])
    together = [[site.name.split(".")[-2] for site in stop.sites] for stop in plan.stops]
    assert together == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_only_what_a_site_needs_is_run() -> None:
    program = masked("bert_sequence", "wanda", labels=True)
    batch = data("bert_sequence")[0]
    report = prune(program, [batch])  # no labels, so no loss
    assert report.batches == 1
    plan = make_plan(program, masked_sites(program), list(bind_batches(program, [batch], [])[0]))
    assert not any("cross_entropy" in str(node.target) for node in plan.nodes)


def test_a_weight_used_several_times_sees_the_inputs_of_all_its_uses() -> None:
    model, program = pair("shared_weight")
    program = run_passes(
        program,
        "insert-masks{pattern=2:4,sparsity=0.5,criterion=wanda,schedule=one-shot,scope=local,include_last=true}",
    )
    batches = data("shared_weight")
    report = prune(program, batches)
    with torch.no_grad():
        x = torch.cat([batch["x"] for batch in batches])
        second = F.relu(model.body(x))
        third = F.relu(model.body(second))
    statistic = Wanda().statistic(16, "cpu")
    Wanda().observe(statistic, torch.cat([x, second, third]))
    expected, _ = Wanda().prune(model.body.weight.detach(), statistic, parse_pattern("2:4"), 0.5)
    (shared, head) = masked_sites(program)
    assert torch.equal(shared.weight.detach(), expected)
    assert report.sites[0].tokens == 3 * len(x)
    # the head is pruned with inputs that went through the pruned weight
    with torch.no_grad():
        model.body.weight.copy_(expected)
        last = F.relu(model.again(F.relu(model.body(F.relu(model.body(x))))))
    statistic = Wanda().statistic(16, "cpu")
    Wanda().observe(statistic, last)
    assert torch.equal(head.weight, Wanda().prune(model.head.weight.detach(), statistic, parse_pattern("2:4"), 0.5)[0])


def test_values_are_freed_after_their_last_use() -> None:
    program = masked("bert_sequence", "wanda").eval()
    batches = bind_batches(program, data("bert_sequence"), [])
    plan = make_plan(program, masked_sites(program), list(batches[0]))
    walker = Walker(program, plan, InMemory(program), batches, device=torch.device("cpu"), meter=Meter())
    kept: list[int] = []

    def look(stop: Stop) -> None:
        later = {use.value for item in plan.stops[walker.done :] for use in item.uses}
        for node in walker.live[0]:
            users = [user for user in node.users if user in plan.nodes and plan.order[user] >= stop.index]
            assert users or node in later, f"{node} is kept after {stop.sites[0].name}"
        kept.append(sum(isinstance(value, Tensor) for value in walker.live[0].values()))

    walker.run(look)
    assert max(kept) < 12
    assert all(len(live) == len(walker.live[0]) for live in walker.live)


@pytest.mark.parametrize(
    "criterion", ["snip", "gradient", "taylor", "snip_momentum", "movement", "block_mask", "retrain_free", "obs"]
)
def test_criteria_with_gradients(criterion: str) -> None:
    pattern = {"retrain_free": "1xchannel", "obs": "4x1"}.get(criterion, "4x1")
    program = masked("bert_sequence", criterion, pattern=pattern, labels=True, scope="local")
    before = weights(program)
    batches = [
        {**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.int64)} for batch in data("bert_sequence")
    ]
    report = prune(program, batches)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    for site in masked_sites(program):
        assert site.pattern.holds(site.logical_mask)
        assert not site.weight[~site.mask].any()
        if criterion != "obs":
            assert torch.equal(site.weight, before[site.name] * site.mask)
        assert site.weight.grad is None
        assert site.weight.requires_grad
    if criterion == "obs":
        assert any(not torch.equal(site.weight, before[site.name] * site.mask) for site in masked_sites(program))


def test_snip_is_its_formula_and_takes_a_loss() -> None:
    program = masked("mlp", "snip", scope="global", pattern="unstructured")
    model = MODELS["mlp"]()
    batches = data("mlp")[:1]
    prune(program, batches, loss=lambda output, batch: output.square().mean())
    model(batches[0]["x"]).square().mean().backward()
    scores = {name: (value * value.grad).abs() for name, value in model.named_parameters()}
    sites = masked_sites(program)
    kept = torch.cat([scores[site.name][site.mask] for site in sites])
    gone = torch.cat([scores[site.name][~site.mask] for site in sites])
    assert kept.min() >= gone.max()


def test_magnitude_needs_no_data_and_rules_can_differ() -> None:
    text = (
        "insert-masks{pattern=2:4,sparsity=0.5,criterion=magnitude,schedule=one-shot,select=first},"
        "insert-masks{pattern=unstructured,sparsity=0.25,criterion=sparsegpt,schedule=one-shot,scope=local,select=second}"
    )
    program = run_passes(traced("mlp"), text)
    first = weights(program)["first.weight"]
    report = prune(program, data("mlp"))
    assert [round(site.sparsity, 3) for site in report.sites] == [0.5, 0.25]
    assert [site.tokens > 0 for site in report.sites] == [False, True]
    shown = {site.name: site for site in masked_sites(program)}
    assert torch.equal(shown["first.weight"].weight, first * shown["first.weight"].mask)
    alone = run_passes(traced("mlp"), text.split(",insert-masks")[0])
    assert prune(alone).sparsity == pytest.approx(0.5)


def test_locked_masks_stay() -> None:
    program = traced("mlp")
    with torch.no_grad():
        program.tensor("first.weight")[:, ::2] = 0.0
    more = "insert-masks{pattern=2:4,sparsity=0.5,criterion=wanda,schedule=one-shot,scope=local,select=second}"
    program = run_passes(program, f"lock-masks{{select=first}},{more}")
    report = prune(program, data("mlp"))
    assert [site.name for site in report.sites] == ["second.weight"]
    locked = masked_sites(program)[0]
    assert not locked.mask[:, ::2].any()
    assert locked.mask[:, 1::2].all()
    alone = traced("mlp")
    alone.tensor("first.weight").data.zero_()
    alone = run_passes(alone, "lock-masks{select=first}")
    with pytest.raises(gp.SparsityError, match="no masks to choose"):
        prune(alone)


def test_targets_of_single_sites() -> None:
    program = masked("mlp", "sparsegpt", pattern="unstructured", targets='"second=0.25"')
    assert [round(site.sparsity, 3) for site in prune(program, data("mlp")).sites] == [0.5, 0.25]


def test_positional_batches_mode_and_determinism() -> None:
    results = []
    for _ in range(2):
        program = masked("mlp", "sparsegpt").train()
        report = prune(program, [batch["x"] for batch in data("mlp")], progress=True)
        assert program.training
        results.append(weights(program))
    assert str(report.to_dict()["totals"]["sparsity"]) == "0.5"
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x.mul_(2.0)
        return self.head(self.second(x) + x)


def test_changes_in_place_are_seen() -> None:
    torch.manual_seed(0)
    model = InPlace().eval()
    program = gp.transform(
        model,
        "insert-masks{pattern=2:4,sparsity=0.5,criterion=wanda,schedule=one-shot,scope=local}",
        (torch.randn(4, 8),),
    )
    x = torch.randn(16, 8)
    prune(program, [x.clone()])
    model.load_state_dict({name: value for name, value in program.state_dict().items() if "mask" not in name})
    torch.testing.assert_close(answer(program, x.clone()), answer(model, x.clone()))
    statistic = Wanda().statistic(8, "cpu")
    with torch.no_grad():
        Wanda().observe(statistic, model.first(x).relu() * 2.0)
    site = masked_sites(program)[1]
    _, mask = Wanda().prune(site.weight.detach(), statistic, parse_pattern("2:4"), 0.5)
    assert torch.equal(site.mask, mask)


class TestRefusals:
    def test_schedule(self) -> None:
        program = run_passes(traced("mlp"), "insert-masks{pattern=2:4,sparsity=0.5,criterion=snip}")
        with pytest.raises(gp.SparsityError, match="schedule=one-shot"):
            prune(program, data("mlp"))

    def test_no_masks(self) -> None:
        with pytest.raises(gp.SparsityError, match="no masks"):
            prune(traced("mlp"))

    @pytest.mark.parametrize("criterion", ["wanda", "snip"])
    def test_no_data(self, criterion: str) -> None:
        with pytest.raises(gp.SparsityError, match="needs calibration data and there are no batches"):
            prune(masked("mlp", criterion))

    def test_empty_batches(self) -> None:
        with pytest.raises(gp.SparsityError, match=r"no rows of input reached first\.weight"):
            prune(masked("mlp", "wanda"), [torch.zeros(0, 16)])

    def test_no_loss(self) -> None:
        with pytest.raises(gp.SparsityError, match="pass loss="):
            prune(masked("mlp", "snip"), data("mlp"))

    def test_values_that_are_not_finite(self) -> None:
        bad = data("mlp")
        bad[1]["x"][0, 0] = float("nan")
        with pytest.raises(gp.SparsityError, match=r"inputs of first\.weight have NaN or infinite values in batch 1"):
            prune(masked("mlp", "wanda"), bad)
        with pytest.raises(gp.SparsityError, match="loss of batch 1"):
            prune(masked("mlp", "snip"), bad, loss=lambda output, batch: output.sum())

    def test_a_loss_that_misses_a_site(self) -> None:
        program = masked("mlp", "snip")
        with pytest.raises(gp.SparsityError, match=r"no gradient reached first\.weight"):
            prune(program, data("mlp"), loss=lambda output, batch: program.tensor("second.weight").sum())

    def test_missing_and_differing_inputs(self) -> None:
        program = masked("t5", "wanda")
        ids = torch.ones(2, 4, dtype=torch.int64)
        with pytest.raises(gp.TraceError, match="needs the input 'decoder_input_ids'"):
            prune(program, [{"input_ids": ids}])
        with pytest.raises(gp.SparsityError, match="give all the same inputs"):
            prune(program, [{"input_ids": ids, "decoder_input_ids": ids}, {"input_ids": ids}])
        with pytest.raises(gp.TraceError, match="did you mean"):
            prune(program, [{"input_id": ids}])

    def test_coupled_patterns_and_global_scope(self) -> None:
        with pytest.raises(gp.RecipeError, match="scope=local"):
            masked("mlp", "wanda", scope="global")
        with pytest.raises(gp.SparsityError, match="couples several"):
            prune(masked("bert_sequence", "wanda", pattern="head"), data("bert_sequence"))

    def test_a_site_that_the_criterion_cannot_prune(self) -> None:
        with pytest.raises(gp.SparsityError, match=r"depthwise\.weight: sparsegpt prunes each group"):
            prune(masked("grouped_conv", "sparsegpt", pattern="4x1"), data("grouped_conv"))

    def test_quantizers(self) -> None:
        program = run_passes(masked("mlp", "wanda"), "insert-fake-quant")
        with pytest.raises(gp.PassError, match="prune before insert-fake-quant"):
            prune(program, data("mlp"))
