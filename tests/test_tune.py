"""Tuning: what breaks a metric falls back, the best is kept, and the recipe gives the recorded number again."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.artifact.tuned_pipeline import STATIC, TunedPipeline
from graphprune.artifact.tuning import Trial, Tuning
from graphprune.ir.quantizing import quantizers
from graphprune.passes.calibrate import Calibrate
from tests.models import MODELS, example
from tests.tuned import BATCHES, INPUT, SITES, error, fragile, fragile_example, likeness

_SECOND = {"second.weight": "off"}


def tune(metric: Callable[[gp.Program], object] = likeness, **options: object) -> Tuning:
    options = {"data": BATCHES, "metric_name": "likeness", "relative": 0.03, **options}
    return gp.tune(copy.deepcopy(_traced()), metric, **options)  # type: ignore[arg-type]


@functools.cache
def _traced() -> gp.Program:
    return gp.trace(fragile(), fragile_example())


def again(found: Tuning, trial: Trial | None = None, metric: Callable[[gp.Program], float] = likeness) -> float:
    """The metric of the recipe that a tuning found, applied to the model anew."""
    recipe = gp.Recipe.parse(found.recipe(trial).to_yaml())
    return metric(gp.transform(fragile(), recipe, fragile_example(), data=BATCHES).eval())


class Counting:
    """A metric that counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int = 0) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, program: gp.Program) -> float:
        assert not program.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return likeness(program)


def test_the_layer_that_breaks_the_metric_falls_back_alone() -> None:
    found = tune()
    assert found.met
    assert found.best is not None
    assert found.best.levels == _SECOND
    assert [trial.levels for trial in found.trials] == [{}, _SECOND]
    assert found.trials[0].value < 50 < found.goal <= found.best.value <= found.baseline == 100
    assert [site.name for site in found.sites] == list(SITES)
    assert max(found.sites, key=lambda site: site.sensitivity or 0).name == "second.weight"
    program = gp.transform(fragile(), found.recipe(), fragile_example(), data=BATCHES)
    assert {decision.prefix for _, decision in quantizers(program) if decision.weight} == {
        "first.weight",
        "head.weight",
    }


def test_every_recorded_number_is_that_of_its_recipe() -> None:
    found = tune(relative=1e-9, order="one-off", fallback=("weights=int8:symmetric:tensor activations=dynamic", "off"))
    assert len(found.trials) > 5
    assert all(again(found, trial) == trial.value for trial in found.trials)


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline": "dynamic-quant", "data": None},
        {"pipeline": "dynamic-quant{select=[second.weight,head.weight]}"},
        {"pipeline": "insert-fake-quant,calibrate,freeze-quant"},
        {"pipeline": "smooth-quant,annotate-quant{observer=mse},insert-observers,calibrate,insert-fake-quant"},
        {"pipeline": ["fold-conv-bn", "annotate-quant", "insert-fake-quant", "calibrate{batches=1}", "freeze-quant"]},
        {"fallback": ("weights=int8:symmetric:tensor", "activations=none", "off")},
    ],
)
def test_other_pipelines(options: dict[str, object]) -> None:
    found = tune(**options)
    assert found.met
    assert "second.weight" in found.best.levels  # type: ignore[union-attr]
    assert again(found) == found.best.value  # type: ignore[union-attr]


def test_nothing_falls_back_where_the_goal_is_met_at_once() -> None:
    found = tune(absolute=95, relative=None)
    assert found.met
    assert [trial.levels for trial in found.trials] == [{}]
    assert all(site.sensitivity is None for site in found.sites)
    assert found.recipe().text() == TunedPipeline.of(STATIC).text()
    assert "3 of 3 sites quantized, 0 float" in found.summary()


def test_a_loss() -> None:
    found = tune(error, lower_is_better=True, absolute=0.03, relative=None)
    assert found.met
    assert found.best.levels == _SECOND  # type: ignore[union-attr]
    assert found.baseline == 1.0
    assert found.goal == 1.03
    assert found.drop(1.01) == pytest.approx(0.01)


def test_the_best_is_kept_where_the_goal_cannot_be_met() -> None:
    found = tune(relative=1e-9)
    assert not found.met
    best = found.best
    assert best is not None
    assert best.value == max(trial.value for trial in found.trials)
    assert again(found) == best.value
    assert all(len(trial.levels) < 3 for trial in found.trials)  # the float model is no answer
    assert f"goal not met: best {best.value:.4f} of 100.0000, drop" in str(found)
    assert "goal 1e-07 %" in found.summary()


@pytest.mark.parametrize("order", ["error", "one-off", "one-on"])
def test_orders(order: str) -> None:
    found = tune(order=order)
    assert found.best.levels == _SECOND  # type: ignore[union-attr]
    sensitivity = {site.name: site.sensitivity for site in found.sites}
    values = {tuple(trial.levels): trial.value for trial in found.trials}
    if order == "one-off":
        assert all(sensitivity[name] == values[(name,)] - values[()] for name in SITES)
    if order == "one-on":
        alone = {name: tuple(item for item in SITES if item != name) for name in SITES}
        assert all(sensitivity[name] == 100 - values[alone[name]] for name in SITES)
    assert max(sensitivity, key=lambda name: sensitivity[name] or 0) == "second.weight"


def test_levels_in_between_come_first() -> None:
    found = tune(fallback=("weights=int8:symmetric:tensor", "weights=none", "off"), relative=0.03)
    assert found.best.levels == {"second.weight": "weights=none"}  # type: ignore[union-attr]
    assert "1 in between, 0 float" in found.summary()
    assert "name second.weight: weights=none" in found.recipe().text()


def test_a_level_that_fits_not_every_site_is_told() -> None:
    found = tune(fallback=("weights=int4:symmetric:channel:group32", "off"))
    assert found.notes[0].startswith(
        "1 of 3 operators are float at the level 'weights=int4:symmetric:channel:group32' (first."
    )


def test_sites_are_taken_back(tmp_path: Path) -> None:
    """Only `second` matters, but a wrong ranking puts another site before it."""
    path = tmp_path / "tune.json"
    found = tune(max_trials=1)
    for name, value in {"first.weight": 3.0, "second.weight": 2.0, "head.weight": 1.0}.items():
        found = found.with_sensitivity(name, value)
    found.save(path)
    found = tune(path=path)
    both = {"first.weight": "off", **_SECOND}
    assert [trial.levels for trial in found.trials] == [{}, {"first.weight": "off"}, both, _SECOND]
    assert found.best.levels == _SECOND  # type: ignore[union-attr]


def test_calibration_data_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run_on = Calibrate.run_on

    def counted(self: Calibrate, program: gp.Program, batches: object) -> object:
        calls.append(1)
        return run_on(self, program, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Calibrate, "run_on", counted)
    assert len(tune(relative=1e-9, order="one-on").trials) >= 5
    assert len(calls) == 1


@pytest.mark.parametrize(("group", "count"), [("none", 6), ("input", 4), ("module", 4)])
def test_groups_move_together(group: str, count: int) -> None:
    inputs = {"input_ids": torch.arange(24).view(3, 8) % 99}
    pipeline = "annotate-quant{select=[*.layer.0.*]},insert-observers,calibrate,insert-fake-quant,freeze-quant"
    found = gp.tune(
        MODELS["bert_sequence"](), lambda program: program(**inputs).logits.sum(), [inputs], pipeline=pipeline, group=group,
        relative=0.9, max_trials=1,
    )  # fmt: skip
    assert len(found.sites) == count
    names = [name for site in found.sites for name in site.members]
    assert len(set(names)) == 6
    if group != "none":
        assert [name.split(".")[-2] for name in found.sites[0].members] == ["query", "key", "value"]
        assert found.sites[0].name.endswith("query.weight and 2 more")
    assert found.members({found.sites[0].name: "off"}) == dict.fromkeys(found.sites[0].members, "off")


def test_batch_normalization_is_folded_first() -> None:
    (x,) = example("conv_bn") or ()
    found = gp.tune(MODELS["conv_bn"](), lambda program: program(x).norm(), [x], (x,), relative=0.9)
    assert found.settings.pipeline.startswith("fold-conv-bn,annotate-quant")
    assert found.met


def test_the_model_is_left_alone() -> None:
    model = fragile().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = gp.trace(model, fragile_example())
    text = str(program)
    found = gp.tune(program, likeness, BATCHES, relative=0.03)
    assert program.training
    assert str(program) == text
    assert found.best.levels == _SECOND  # type: ignore[union-attr]
    gp.tune(model, likeness, BATCHES, fragile_example(), max_trials=1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    found = tune(relative=1e-9, max_trials=2, path=path)
    assert len(found.trials) == 2
    assert not found.met
    assert found.stopped == "stopped after 2 trials, as max_trials says"
    assert found.summary().endswith("2 trials; stopped after 2 trials, as max_trials says")
    more = tune(relative=1e-9, path=path)
    assert len(more.trials) > 2
    assert not more.stopped
    assert more.trials[:2] == found.trials
    timed = tune(timeout=1e-9)
    assert (timed.trials, timed.best, timed.baseline) == ((), None, 100.0)
    assert timed.summary() == "float model 100.0000, goal 97.0000: nothing was tried yet"
    with pytest.raises(gp.GraphPruneError, match="nothing was tried yet, so there is no recipe"):
        timed.recipe()


@pytest.mark.parametrize("order", ["error", "one-off"])
def test_an_interrupted_search_goes_on(tmp_path: Path, order: str) -> None:
    path = tmp_path / "tune.json"
    whole = tune(relative=1e-9, order=order)
    with pytest.raises(KeyboardInterrupt):
        tune(Counting(fail_at=4), relative=1e-9, order=order, path=path)
    assert len(Tuning.load(path).trials) == 2
    rest = Counting()
    seen: list[tuple[int, int, str]] = []
    found = tune(rest, relative=1e-9, order=order, path=path, watch=lambda *state: seen.append(state))
    assert [(item.levels, item.value) for item in found.trials] == [(item.levels, item.value) for item in whole.trials]
    assert found.sites == whole.sites
    assert rest.calls == len(whole.trials) - 2 + 1  # the float model too, to see that the metric is still the same
    assert any("sites quantized; best" in what for _, _, what in seen)
    assert seen[-1] == (len(whole.trials), 100, "done")
    assert Tuning.load(path) == found
    assert json.loads(path.read_text())["best"]["value"] == found.best.value  # type: ignore[union-attr]
    nothing_left = Counting()
    assert tune(nothing_left, relative=1e-9, order=order, path=path) == found
    assert nothing_left.calls == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"relative": 0.01}, r"tolerance 0\.03 and not 0\.01"),
        ({"relative": None, "absolute": 0.03}, r"relative True and not False"),
        ({"metric_name": "f1"}, r"metric 'likeness' and not 'f1'"),
        ({"name": "bert"}, r"model 'mlp' and not 'bert'"),
        ({"data": BATCHES[:1]}, r"data '3 batches \w{16}' and not '1 batches \w{16}'"),
        ({"data": [*BATCHES[:2], {"x": BATCHES[2]["x"].flip(0)}]}, r"data '3 batches \w{16}' and not '3 batches"),
        ({"pipeline": "dynamic-quant"}, r"pipeline 'annotate-quant.*' and not 'dynamic-quant"),
        ({"fallback": ("weights=none",)}, r"fallback \('off',\) and not \('weights=none',\)"),
        ({"order": "one-on"}, r"order 'error' and not 'one-on'"),
    ],
)
def test_a_file_of_other_settings_is_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    path = tmp_path / "tune.json"
    tune(path=path, max_trials=1)
    before = path.read_bytes()
    with pytest.raises(gp.GraphPruneError, match=rf"was tuned with .*{message}.*; choose another file, or delete it"):
        tune(path=path, **other)
    assert path.read_bytes() == before


def test_a_file_of_another_metric_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    tune(path=path, max_trials=1)
    with pytest.raises(gp.GraphPruneError, match=r"of the float model was 100 when the file was begun and is 200 now"):
        tune(lambda program: 2 * likeness(program), path=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no tuning file"),
        ('{"format": 7}', "has format 7; this graphprune reads 1"),
        ('{"format": 1}', "is no tuning file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tune.json"
    path.write_text(text)
    with pytest.raises(gp.GraphPruneError, match=message):
        tune(path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["trials"][0].update(value=math.nan), "a value is not finite"),
        (lambda data: data["trials"][0].update(levels={"x": "off"}), "a trial names x, which is no site"),
        (lambda data: data["sites"].pop(), "has 2 other sites than the 3 that the pipeline quantizes now"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, list[dict[str, object]]]], object], message: str
) -> None:
    path = tmp_path / "tune.json"
    tune(path=path, max_trials=1)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(gp.GraphPruneError, match=message):
        tune(path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": -0.1}, r"relative tolerance -0\.1 is out of range"),
        ({"relative": 1.0}, r"a fraction in \[0, 1\)"),
        ({"absolute": math.inf, "relative": None}, r"absolute tolerance inf is out of range"),
        ({"absolute": 1.0}, "not both"),
        ({"max_trials": 0}, "max_trials=0 is below 1"),
        ({"timeout": 0}, "timeout=0 is not above 0"),
        ({"group": "inputs"}, "group 'inputs' is unknown; did you mean 'input'"),
        ({"order": "eror"}, "order 'eror' is unknown; did you mean 'error'"),
        ({"order": "error", "data": None, "pipeline": "dynamic-quant"}, "order 'error' runs calibration data"),
        ({"data": None}, "calibrate needs calibration data: give data=batches, on the command line --data FILE"),
        ({"data": []}, "calibration got no batches"),
        ({"data": INPUT}, "one batch and not several"),
        ({"data": [{"y": INPUT}]}, "batch 0: .*'y'"),
        ({"data": [INPUT * math.nan]}, "batch 0: input 'x' has NaN"),
        ({"pipeline": "fold-conv-bn"}, "one pass must decide what is quantized.* and none does"),
        ({"pipeline": "annotate-quant,dynamic-quant"}, r"2 do: pipeline\[0\].annotate-quant, pipeline\[1\].dynamic-quant"),
        ({"pipeline": "insert-fake-quant,insert-fake-quant"}, "2 do: "),
        ({"pipeline": "annotate-quant,insert-fake-quant{exclude=[head]}"}, r"pipeline\[1\].insert-fake-quant chooses what"),
        ({"pipeline": "annotate-quant,calibrate"}, "requires observed"),
        ({"pipeline": "annotate-quant{select=[haed]}"}, "did you mean 'head'"),
        ({"pipeline": "annotate-qaunt"}, "did you mean 'annotate-quant'"),
        ({"fallback": ()}, "fallback is empty"),
        ({"fallback": ("off", "off")}, "fallback 'off'"),
        ({"fallback": ("off", "weights=none")}, "fallback 'off' is the highest precision; put it last"),
        ({"fallback": ("weights=none", "weights=none")}, "is given twice"),
        ({"fallback": ("on",)}, "says 'on'"),
        ({"fallback": ("off weights=none",)}, "what is off needs no other setting"),
        ({"fallback": ("float32",)}, "fallback 'float32': rule .* unknown setting 'float32'"),
        ({"fallback": ("weights=none activations=none",)}, "nothing is left to quantize: neither.*; leave it out, or write 'off'"),
        ({"fallback": ("weights=int9",)}, "fallback 'weights=int9': unknown quantization scheme 'int9'"),
        ({"pipeline": "insert-fake-quant,calibrate", "fallback": ("weights=none",)}, "insert-fake-quant can only leave sites out"),
    ],
)  # fmt: skip
def test_wrong_options_are_explained_before_anything_is_measured(options: dict[str, object], message: str) -> None:
    metric = Counting()
    with pytest.raises(gp.GraphPruneError, match=message):
        tune(metric, **options)
    assert metric.calls == 0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda program: None, "of the float model returned None; it must return a finite number"),
        (lambda program: 0.0, "of the float model is 0, of which no fraction can be taken; give an absolute tolerance"),
        (lambda program: 1 / 0, "of the float model failed with ZeroDivisionError"),
    ],
)
def test_wrong_metrics_are_explained(metric: Callable[[gp.Program], object], message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        tune(metric)


def test_a_metric_that_fails_later_names_the_trial() -> None:
    metric = Counting()

    def failing(program: gp.Program) -> float:
        return metric(program) if metric.calls < 2 else math.nan

    with pytest.raises(gp.GraphPruneError, match="metric likeness with 2 of 3 sites quantized returned nan"):
        tune(failing)


def test_wrong_models_are_explained() -> None:
    program = gp.transform(fragile(), "dynamic-quant", fragile_example())
    with pytest.raises(gp.RecipeError, match=r"the Program is fake-quant, frozen, planned.* already"):
        gp.tune(program, likeness, BATCHES)
    with torch.device("meta"):
        empty = MODELS["mlp"]()
    with pytest.raises(gp.GraphPruneError, match="has no weights"):
        gp.tune(empty, likeness, BATCHES, (torch.zeros(4, 16, device="meta"),))
