"""Sweep: prune one layer at a time, evaluate a metric, and record what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from graphprune.artifact.evaluation import Metric, check_repeats, evaluate, fingerprint, metric_title
from graphprune.artifact.sensitivity import MeasuredSite, Sensitivity, SweepSettings
from graphprune.errors import RecipeError, SparsityError
from graphprune.ir.choosing import initial_scores, update_masks
from graphprune.ir.masking import MaskedSite, masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.pipeline.transform import transform
from graphprune.sparsity.criteria import parse_criterion

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
"""Sparsities that a sweep measures unless it is told others."""


def sensitivity(
    model: nn.Module | Program,
    metric: Metric,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    pattern: str = "4x1",
    criterion: str = "magnitude",
    lower_is_better: bool = False,
    select: Iterable[str] = (),
    exclude: Iterable[str] = (),
    ops: Iterable[str] = (),
    include_last: bool = False,
    path: Path | str | None = None,
    name: str | None = None,
    metric_name: str | None = None,
    in_place: bool = False,
    watch: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Measure what pruning each layer alone does to a metric.

    Every layer is pruned once to every sparsity, without training, while all others stay dense. The metric is called
    once for the dense model and once for each layer and sparsity, in eval mode and without gradients.

    Args:
        model: A module with weights, which is traced first, or a Program without masks. Its weights are not changed.
        metric: Function of a Program that returns a finite number; the same one for the same Program.
        example_inputs: As for ``trace``.
        sparsities: Fractions in (0, 1), each once.
        pattern: Sparsity pattern, as for ``insert-masks``.
        criterion: What ranks the weights; one that needs no data.
        lower_is_better: The metric is a loss.
        select: Layers to measure, as for ``insert-masks``. Empty takes all.
        exclude: Layers to leave out, in the same form.
        ops: Operators to take, such as ``linear``.
        include_last: Take the last layer before the output too.
        path: JSON file that is written after every measurement. Where it is there already, with the same model, metric,
            pattern, criterion and layers, only what it lacks is measured; it may hold other sparsities too.
        name: What to call the model in the file; default: its class, in snake case.
        metric_name: What to call the metric; default: ``module:function``.
        in_place: Insert the masks into ``model`` where it is a Program, rather than into a copy.
        watch: Called before each measurement with how many are done, how many there are, and what comes next.

    Returns:
        All measurements, those that the file held included.

    Raises:
        GraphPruneError: The metric fails or returns no finite number, or the file is of other settings or unreadable.
        SparsityError: The model has masks or no weights, the criterion needs data, or a layer cannot reach a sparsity.
        RecipeError: A sparsity is out of range or comes twice, or a name matches nothing.
        TraceError: The model cannot be traced.
    """
    _check(model, sparsities, criterion)
    options = {"select": select, "exclude": exclude, "ops": ops}
    step = {
        "pattern": pattern,
        "sparsity": max(sparsities),
        "max_sparsity": 1.0,
        "criterion": criterion,
        "schedule": "cubic",  # all is kept until somebody updates the masks
        "scope": "local",
        "include_last": include_last,
        **{key: list(texts) for key, texts in options.items()},
    }
    program = transform(model, [{"insert-masks": step}], example_inputs, in_place=in_place).eval()
    layers = _layers(program)
    _check_reachable(layers, sparsities)
    settings = SweepSettings(
        model=name or program.name,
        weights=fingerprint(program),
        metric=metric_name or metric_title(metric),
        lower_is_better=lower_is_better,
        pattern=pattern,
        criterion=str(parse_criterion(criterion)),
    )
    empty = tuple(
        MeasuredSite(title, tuple(site.name for site in sites), sum(site.weight.numel() for site in sites), {})
        for title, sites in layers.items()
    )
    found = _continued(path, Sensitivity(settings, math.nan, empty))
    return _measure(program, layers, metric, sorted(sparsities), found, path, watch)


def _check(model: nn.Module | Program, sparsities: Sequence[float], criterion: str) -> None:
    if not sparsities:
        raise RecipeError("sparsities is empty; give one or more, such as 0.5 and 0.8")
    for sparsity, times in Counter(sparsities).items():
        if not 0.0 < sparsity < 1.0:
            raise RecipeError(f"sparsity {sparsity} is not in (0, 1); write a fraction, 0.8 for 80 percent")
        if times > 1:
            raise RecipeError(f"sparsity {sparsity} is given twice")
    if parse_criterion(criterion).needs_data:
        raise SparsityError(f"criterion {criterion} needs data to rank weights; a sweep has none, use magnitude")
    if isinstance(model, Program) and Property.MASKED in model.properties:
        raise SparsityError("the Program has masks already; measure it before insert-masks, or after fold-masks")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SparsityError("the model has no weights (meta device), so there is nothing to measure; load them first")


def _layers(program: Program) -> dict[str, tuple[MaskedSite, ...]]:
    """What is pruned together, by name: single sites by their module where that is unique, and coupled blocks."""
    sites = masked_sites(program)
    modules = Counter(site.name.rpartition(".")[0] for site in sites)
    layers: dict[str, tuple[MaskedSite, ...]] = {}
    for site in sites:
        module = site.name.rpartition(".")[0]
        title = site.decision.coupling or (module if module and modules[module] == 1 else site.name)
        layers[title] = (*layers.get(title, ()), site)
    return layers


def _check_reachable(layers: Mapping[str, tuple[MaskedSite, ...]], sparsities: Sequence[float]) -> None:
    for title, sites in layers.items():
        total = sum(site.weight.numel() for site in sites)
        best = sum(site.pattern.max_sparsity(site.shape) * site.weight.numel() for site in sites) / total
        if max(sparsities) > best + 1e-9:
            raise SparsityError(
                f"{title}: pattern {sites[0].decision.pattern} cannot reach sparsity {max(sparsities)} there; its most is "
                f"{best:.4g}: measure lower sparsities, or exclude the layer"
            )


def _continued(path: Path | str | None, fresh: Sensitivity) -> Sensitivity:
    """What an earlier sweep of the same settings left in a file, or ``fresh``."""

    def differs(found: Sensitivity) -> str:
        if [(site.name, site.weights) for site in found.sites] == [(site.name, site.weights) for site in fresh.sites]:
            return ""
        return f"has {len(found.sites)} layers, not the {len(fresh.sites)} that select and exclude choose now"

    return fresh.continued(path, "measured", differs)


def _measure(
    program: Program,
    layers: Mapping[str, tuple[MaskedSite, ...]],
    metric: Metric,
    sparsities: Sequence[float],
    found: Sensitivity,
    path: Path | str | None,
    watch: Callable[[int, int, str], None] | None,
) -> Sensitivity:
    todo = [(site.name, s) for site in found.sites for s in sparsities if s not in site.values]
    total = len(layers) * len(sparsities) + 1
    if not todo:
        if watch is not None:
            watch(total, total, "all is measured already")
        return found
    called = found.settings.metric
    if watch is not None:
        watch(total - len(todo) - 1, total, "dense")
    dense = evaluate(metric, program, called, "of the dense model")
    if math.isnan(found.dense):
        found = Sensitivity(found.settings, dense, found.sites)
    else:
        check_repeats(dense, found.dense, f"{path}: metric {called} of the dense model")
    for done, (title, sparsity) in enumerate(todo, total - len(todo)):
        if watch is not None:
            watch(done, total, f"{title} at {sparsity:g}")
        sites = layers[title]
        try:
            _prune(sites, sparsity)
            value = evaluate(metric, program, called, f"with {title} pruned to {sparsity:g}")
        finally:
            for site in sites:
                site.mask.fill_(True)
        found = found.with_value(title, sparsity, value)
        if path is not None:
            found.save(path)
    if watch is not None:
        watch(total, total, "done")
    return found


def _prune(sites: Sequence[MaskedSite], sparsity: float) -> None:
    update_masks(sites, sparsity, initial_scores(sites))
