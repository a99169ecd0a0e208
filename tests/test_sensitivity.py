"""Sensitivity: the sweep measures what a one-shot prune gives, goes on where it stopped, and shares a sparsity by it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.artifact.sensitivity import Sensitivity
from graphprune.artifact.sweep import sensitivity
from graphprune.ir.masking import masked_sites, sparsity_of
from tests.models import MODELS, example

_INPUT = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
_LAYERS = ["first", "second", "head"]


@torch.no_grad()
def norm(program: gp.Program) -> float:
    return float(program(_INPUT).abs().mean())


class Counting:
    """A metric that counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int = 0, error: BaseException | None = None) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, program: gp.Program) -> float:
        assert not program.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error or KeyboardInterrupt
        return norm(program)


def sweep(metric: Callable[[gp.Program], object] = norm, **options: object) -> Sensitivity:
    options = {"sparsities": (0.5, 0.9), "include_last": True, "metric_name": "norm", **options}
    return sensitivity(MODELS["mlp"](), metric, example("mlp"), **options)  # type: ignore[arg-type]


def test_each_value_is_that_of_a_one_shot_prune() -> None:
    model = MODELS["mlp"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sensitivity(model, norm, example("mlp"), sparsities=(0.9, 0.5), include_last=True)
    assert [site.name for site in found.sites] == _LAYERS
    assert found.dense == norm(gp.trace(model, example("mlp")).eval())
    for point in found.points:
        step = f"insert-masks{{criterion=magnitude,schedule=one-shot,sparsity={point.sparsity},select={point.site}}}"
        assert point.value == norm(gp.transform(model, step, example("mlp")).eval())
        assert point.drop == found.dense - point.value
    assert len(found.points) == 6
    assert found.sparsities == (0.5, 0.9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fail_at", [0, 4])
def test_masks_are_put_back_also_when_the_metric_fails(fail_at: int) -> None:
    program = gp.trace(MODELS["mlp"](), example("mlp"))
    metric = Counting(fail_at, ValueError("no data"))
    failure = pytest.raises(gp.GraphPruneError, match=r"with head pruned to 0\.5 failed with ValueError: no data")
    with failure if fail_at else contextlib.nullcontext():
        sensitivity(program, metric, sparsities=(0.5,), include_last=True, in_place=True)
    assert len(masked_sites(program)) == 3
    assert sparsity_of(masked_sites(program)) == 0.0


def test_a_program_is_left_alone_by_default() -> None:
    program = gp.trace(MODELS["mlp"](), example("mlp")).train()
    sensitivity(program, norm, sparsities=(0.5,))
    assert not masked_sites(program)
    assert program.training


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    whole = sweep()
    with pytest.raises(KeyboardInterrupt):
        sweep(Counting(fail_at=4), path=path)
    assert [(point.site, point.sparsity) for point in Sensitivity.load(path).points] == [("first", 0.5), ("first", 0.9)]
    with pytest.raises(gp.SparsityError, match="2 of 3 layers are not measured yet, second among them"):
        Sensitivity.load(path).targets(0.5)
    rest = Counting()
    seen: list[tuple[int, int, str]] = []
    assert sweep(rest, path=path, watch=lambda *state: seen.append(state)) == whole
    assert rest.calls == 5  # the dense model, to see that the metric is still the same, and four points
    assert seen[0] == (2, 7, "dense")
    assert seen[1:3] == [(3, 7, "second at 0.5"), (4, 7, "second at 0.9")]
    assert seen[-1] == (7, 7, "done")
    assert Sensitivity.load(path) == whole
    nothing_left = Counting()
    assert sweep(nothing_left, path=path) == whole
    assert nothing_left.calls == 0


def test_more_sparsities_are_added(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    sweep(path=path)
    more = Counting()
    found = sweep(more, path=path, sparsities=(0.75, 0.9))
    assert more.calls == 4
    assert found.sparsities == (0.5, 0.75, 0.9)
    assert Sensitivity.load(path) == found


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pattern": "2x1"}, r"pattern '4x1' and not '2x1'"),
        ({"criterion": "random"}, r"criterion 'magnitude' and not 'random"),
        ({"metric_name": "f1"}, r"metric 'norm' and not 'f1'"),
        ({"name": "bert"}, r"model 'mlp' and not 'bert'"),
        ({"lower_is_better": True}, r"lower_is_better False and not True"),
        ({"exclude": ["first"]}, r"has 3 layers, not the 2 that select and exclude choose now"),
    ],
)
def test_a_file_of_other_settings_is_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    path = sweep(path=tmp_path / "found.json", sparsities=(0.5,)).save(tmp_path / "found.json")
    before = path.read_bytes()
    with pytest.raises(gp.GraphPruneError, match=message):
        sweep(path=path, **other)
    assert path.read_bytes() == before


def test_a_file_of_other_weights_or_another_metric_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    sweep(path=path)
    model = MODELS["mlp"]()
    with torch.no_grad():
        model.first.bias[0] += 1  # type: ignore[union-attr,operator,index]
    with pytest.raises(
        gp.GraphPruneError, match=r"was measured with weights '\w{16}' and not '\w{16}'; choose another file"
    ):
        sensitivity(model, norm, example("mlp"), path=path, include_last=True, metric_name="norm")
    with pytest.raises(gp.GraphPruneError, match=r"was [\d.]+ when the file was begun and is [\d.]+ now"):
        sweep(lambda program: 2 * norm(program), path=path, sparsities=(0.5, 0.6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no sensitivity file"),
        ("{}", "is no sensitivity file"),
        ('{"format": 2}', "has format 2"),
        ('{"format": 1, "settings": {}, "dense": 1, "sites": []}', "is no sensitivity file"),
        ('{"format": 1, "settings": {"a": 1}, "dense": NaN, "sites": []}', "not finite"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(gp.GraphPruneError, match=message):
        sweep(path=path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None"),
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (True, "returned True"),
        ("0.9", "returned a str"),
        (torch.ones(2), "returned a Tensor"),
        (torch.tensor(math.nan), "returned nan"),
    ],
)
def test_a_metric_returns_a_finite_number(value: object, message: str) -> None:
    with pytest.raises(
        gp.GraphPruneError, match=f"metric norm of the dense model {message}; it must return a finite number"
    ):
        sweep(lambda program: value)


def test_a_metric_may_return_a_tensor_and_change_the_mode() -> None:
    def careless(program: gp.Program) -> torch.Tensor:
        assert not program.training
        program.train()
        return torch.tensor([norm(program.eval())], dtype=torch.float64)

    assert sweep(careless) == sweep()


def test_a_loss_rises() -> None:
    higher, lower = sweep(), sweep(lower_is_better=True)
    assert [point.drop for point in lower.points] == [-point.drop for point in higher.points]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": ()}, "sparsities is empty"),
        ({"sparsities": (50,)}, "fraction"),
        ({"sparsities": (0.5, 0.5)}, "given twice"),
        ({"criterion": "snip_momentum"}, "needs data"),
        ({"criterion": "magntiude"}, "did you mean 'magnitude'"),
        ({"select": ["frist"]}, "did you mean 'first'"),
        ({"pattern": "2:4"}, "cannot reach sparsity 0.9"),
    ],
)
def test_options_are_checked_before_the_metric_runs(options: dict[str, object], message: str) -> None:
    metric = Counting()
    with pytest.raises(gp.GraphPruneError, match=message):
        sweep(metric, **options)
    assert metric.calls == 0


def test_a_layer_that_cannot_reach_a_sparsity_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 6)).eval()
    with pytest.raises(gp.SparsityError, match=r"^1: pattern 2:4 cannot reach sparsity 0\.5 there|its most is"):
        sensitivity(model, norm, torch.randn(2, 16), pattern="2:4", sparsities=(0.6,), include_last=True)


def test_models_without_weights_or_with_masks_are_refused() -> None:
    with pytest.raises(gp.SparsityError, match="meta device"):
        sensitivity(MODELS["mlp"]().to("meta"), norm, example("mlp"))
    program = gp.transform(MODELS["mlp"](), "insert-masks{sparsity=0.5}", example("mlp"))
    with pytest.raises(gp.SparsityError, match="has masks already"):
        sensitivity(program, norm)


def test_the_least_sensitive_layers_get_most() -> None:
    found = sweep()
    drops = {"first": (0.0, 0.0), "second": (0.1, 0.9), "head": (-0.3, 0.001)}
    sites = tuple(
        replace(site, values={s: found.dense - drop for s, drop in zip((0.5, 0.9), drops[site.name], strict=True)})
        for site in found.sites
    )
    shares = replace(found, sites=sites).targets(0.5)
    weights = {site.name: site.weights for site in sites}
    assert shares["first"] == shares["head"] == 0.9  # head: a gain at 0.5 counts as nothing lost
    rest = 0.5 * sum(weights.values()) - 0.9 * (weights["first"] + weights["head"])
    assert shares["second"] == pytest.approx(rest / weights["second"])


@pytest.mark.parametrize("sparsity", [0.2, 0.6, 0.85])
def test_the_recipe_reaches_the_sparsity(sparsity: float) -> None:
    found = sweep()
    shares, recipe = found.targets(sparsity), found.recipe(sparsity)
    assert gp.Recipe.parse(recipe.to_yaml()) == recipe
    sites = masked_sites(gp.transform(MODELS["mlp"](), recipe, example("mlp")))
    assert sparsity_of(sites) == pytest.approx(sparsity, abs=4 * 3 / 1664)
    for site in sites:
        name = site.name.removesuffix(".weight")
        assert sparsity_of([site]) == pytest.approx(shares[name], abs=4 / site.weight.numel())


def test_a_recipe_may_go_beyond_the_usual_cap_and_train() -> None:
    found = sweep(sparsities=(0.99,), pattern="unstructured")
    recipe = found.recipe(0.985, schedule="cubic")
    assert "max_sparsity=0.99" in str(recipe)
    assert "cubic" not in str(recipe)  # the default
    with pytest.raises(gp.RecipeError, match="cubci"):
        found.recipe(0.5, schedule="cubci")
    with pytest.raises(gp.SparsityError, match=r"at most 0\.99"):
        found.recipe(0.995)


class Two(torch.nn.Module):
    """Two weights in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.into) @ self.out


@pytest.mark.parametrize("nested", [False, True])
def test_names_are_those_that_select_understands(nested: bool) -> None:
    model = torch.nn.Sequential(Two(), torch.nn.Linear(8, 8)) if nested else Two()
    x = torch.randn(4, 8)

    def mean(program: gp.Program) -> float:
        return float(program(x).abs().mean())

    found = sensitivity(model, mean, x, sparsities=(0.5,), include_last=True)
    assert [site.name for site in found.sites] == (["0.into", "0.out", "1"] if nested else ["into", "out"])
    program = gp.transform(model, found.recipe(0.3), x)
    assert {site.name for site in masked_sites(program)} == {name for site in found.sites for name in site.members}


@pytest.mark.parametrize(("pattern", "members"), [("neuron", 2), ("head", 4)])
def test_blocks_that_are_pruned_together_are_one_layer(pattern: str, members: int) -> None:
    model = MODELS["bert_sequence"]()
    ids = torch.arange(32).view(4, 8)

    def logits(program: gp.Program) -> float:
        return float(program(input_ids=ids).logits.abs().mean())

    found = sensitivity(model, logits, pattern=pattern, sparsities=(0.5,))
    assert {len(site.members) for site in found.sites} == {members}
    program = gp.transform(model, found.recipe(0.5))
    assert {sparsity_of([site]) for site in masked_sites(program)} == {0.5}


def test_a_real_model_and_its_table() -> None:
    model = MODELS["bert_sequence"]()
    ids = torch.arange(32).view(4, 8)

    def logits(program: gp.Program) -> float:
        return float(program(input_ids=ids).logits.abs().mean())

    found = sensitivity(model, logits, sparsities=(0.5,), select=["*query", "*intermediate*"])
    assert all(site.name.endswith(("query", "intermediate.dense")) for site in found.sites)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "weights", "0.5"]
    assert lines[1].split()[0] == found.sites[0].name
    assert f"dense {found.dense:.6g}" in lines[-1]


def test_a_plot_of_part_of_a_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sweep(lambda program: 1.0)  # no drop anywhere
    part = replace(found, sites=(replace(found.sites[0], values={}), *found.sites[1:]))
    assert part.plot(tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(gp.GraphPruneError, match="nothing is measured yet"):
        replace(found, sites=()).plot(tmp_path / "none.png")
