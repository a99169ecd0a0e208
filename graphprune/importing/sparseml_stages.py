"""Cut what a SparseML stage asks for into stages of a recipe.

SparseML changes everything along one axis of epochs; a recipe's stage quantizes, learns from a teacher and follows one learning rate
from its beginning to its end. So a stage of SparseML is cut where one of these changes, unless masks are being driven there.
"""

from __future__ import annotations

from dataclasses import replace

from graphprune.importing.draft import Options, StageDraft, Step
from graphprune.importing.fields import Ledger
from graphprune.importing.quantity import Quantity
from graphprune.importing.sparseml_plan import ZERO, Lock, Plan, Pruning, Quantizing, Rate, Teaching
from graphprune.importing.sparseml_rates import fold_warm_up, rate_at, rate_options

_KEPT: Options = {"include_last": True}


def stages_of(plan: Plan, name: str, ledger: Ledger) -> list[StageDraft]:
    """The stages of a recipe for one of SparseML's."""
    plan.rates.sort(key=lambda rate: rate.start.value)
    if plan.one_shot:
        return _one_shot(plan, name, ledger)
    if plan.smoothing:
        ledger.note("smooth-quant needs calibration data when the recipe is run")
    warm_up = fold_warm_up(plan, ledger)
    length = _length(plan)
    plan.locks = [lock for lock in plan.locks if not _superfluous(plan, lock.start, lock.sites, ledger)]
    cuts = _cuts(plan, length, ledger)
    edges = [ZERO, *cuts]
    drafts = []
    for index, start in enumerate(edges):
        end = edges[index + 1] if index + 1 < len(edges) else length
        draft = _stretch(plan, start, end, name, ledger)
        if index == 0 and warm_up is not None and end is not None:
            draft.training["warmup_ratio"] = (warm_up / end).plain()
        drafts.append(draft)
    if cuts:
        at = ", ".join(f"{cut.value:g}" for cut in cuts)
        ledger.note(f"training is cut into stages at epoch {at}; the optimizer's moments start anew in each")
    return drafts


def _length(plan: Plan) -> Quantity | None:
    asked: list[Pruning | Rate | Teaching] = [*plan.prunings, *plan.rates, *plan.teaching]
    ends = [item.end for item in asked if item.end is not None]
    return plan.epochs or max(ends, key=lambda end: end.value, default=None)


def _superfluous(plan: Plan, start: Quantity, sites: Options, ledger: Ledger) -> bool:
    """Whether zeros that a constant mask should hold are held by the masks that made them."""
    made = any(
        pruning.end is not None and pruning.end.value <= start.value and pruning.sites == sites and pruning.stays
        for pruning in plan.prunings
    )
    if made:
        ledger.note("a constant mask after pruning is left out: masks hold by themselves")
    return made


def _cuts(plan: Plan, length: Quantity | None, ledger: Ledger) -> list[Quantity]:
    """Epochs at which something changes that a stage cannot change, ascending."""
    begins: list[Quantizing | Teaching | Rate | Lock] = [*plan.quantizing, *plan.teaching, *plan.rates, *plan.locks]
    wanted = [(item.start, item.origin) for item in begins]
    wanted += [(item.end, item.origin) for item in plan.teaching if item.end is not None]
    found: dict[float, Quantity] = {}
    for at, origin in wanted:
        if at.value <= 0 or (length is not None and at.value >= length.value):
            continue
        driven = [
            item
            for item in plan.prunings
            if item.start.value < at.value and (item.end is None or at.value < item.end.value)
        ]
        if driven:
            line = driven[0].origin.line
            reason = (
                f"a stage begins there, but masks are driven then (line {line}); it applies to the whole stage instead"
            )
            ledger.add(origin.line, origin.key, reason)
        else:
            found.setdefault(at.value, at)
    return [found[value] for value in sorted(found)]


def _stretch(plan: Plan, start: Quantity, end: Quantity | None, name: str, ledger: Ledger) -> StageDraft:
    def inside(begin: Quantity) -> bool:
        return end is None or begin.value < end.value

    steps = _masks(plan, start, end, ledger)
    quantizing = [item for item in plan.quantizing if inside(item.start)]
    steps += plan.smoothing if quantizing else []
    for item in quantizing:
        steps += _training_steps(item, start, end)
    draft = StageDraft(_name(name, steps, bool(quantizing)), steps)
    if end is not None:
        draft.training["num_train_epochs"] = (end - start).plain()
    rate = rate_at(plan.rates, start, end)
    if rate is not None:
        draft.training |= rate_options(rate, start, end, ledger)
    draft.training |= plan.training
    for teaching in plan.teaching:
        if inside(teaching.start) and (teaching.end is None or teaching.end.value > start.value):
            draft.distillation = {**(draft.distillation or {}), **teaching.settings}
    _merge_weights(plan, draft)
    return draft


def _merge_weights(plan: Plan, draft: StageDraft) -> None:
    """With both kinds of distillation, the task's weight and the logits' are those of the kind that speaks of logits."""
    if draft.distillation is None or len(plan.teaching) < 2:
        return
    for teaching in plan.teaching:
        if "hidden" not in teaching.settings:
            draft.distillation |= {
                key: teaching.settings[key] for key in ("task", "logits") if key in teaching.settings
            }


def _name(name: str, steps: list[Step], quantized: bool) -> str:
    """What a stage does, after the name of SparseML's stage where it has one."""
    names = {step.name for step in steps}
    does = (
        "prune"
        if "insert-masks" in names
        else "quantize"
        if quantized
        else "keep"
        if "lock-masks" in names
        else "train"
    )
    return does if name == "main" else f"{name}-{does}" if does == "quantize" else name


def _masks(plan: Plan, start: Quantity, end: Quantity | None, ledger: Ledger) -> list[Step]:
    """Masks that are driven in a stretch, and those that hold what earlier ones made."""
    steps: list[Step] = []
    locked: list[Options] = [lock.sites for lock in plan.locks if end is None or lock.start.value < end.value]
    for pruning in plan.prunings:
        if end is not None and pruning.start.value >= end.value:
            continue
        if pruning.start.value >= start.value or pruning.end is None or pruning.end.value > start.value:
            steps.append(_timed(pruning, start))
            if not pruning.stays and pruning.end is not None:
                ledger.add(
                    pruning.origin.line,
                    pruning.origin.key,
                    "leave_enabled: false: masks hold to the end of the stage here",
                )
        elif pruning.stays:
            locked.append(pruning.sites)
    if locked:
        steps.insert(0, Step("lock-masks", _union(locked)))
    return steps


def _union(sites: list[Options]) -> Options:
    """Sites of any of these."""
    if any("select" not in item and "ops" not in item for item in sites):
        return dict(_KEPT)
    select = [text for item in sites for text in _texts(item, "select")]
    operators = [text for item in sites for text in _texts(item, "ops")]
    if select and operators:
        return dict(_KEPT)  # one rule takes both conditions, and a lock of more than has zeros changes nothing
    chosen: Options = {"select": list(dict.fromkeys(select))} if select else {"ops": list(dict.fromkeys(operators))}
    return {**chosen, **_KEPT}


def _texts(options: Options, name: str) -> list[str]:
    found = options.get(name, [])
    return [str(item) for item in found] if isinstance(found, list) else []


def _timed(pruning: Pruning, start: Quantity) -> Step:
    options = dict(pruning.step.options)
    if not pruning.timed:
        return Step(pruning.step.name, options)
    options["warm_up"] = (pruning.start - start).epochs() if pruning.start.value > start.value else 0
    if options.get("schedule") == "one-shot":
        return Step(pruning.step.name, options)
    if pruning.end is None:
        options["cool_down"] = 0
    else:
        options["end"] = (pruning.end - start).epochs()
    options["frequency"] = 1 if pruning.every is None else pruning.every.epochs()
    return Step(pruning.step.name, options)


def _training_steps(item: Quantizing, start: Quantity, end: Quantity | None) -> list[Step]:
    options: Options = {}
    for name, at in (("freeze_observers", item.observers), ("freeze_batch_norm", item.batch_norm)):
        if at is None or at.value < 0 or (end is not None and at.value > end.value):
            continue
        options[name] = (at - start).epochs() if at.value > start.value else 0
    return [*item.before, item.plan, Step("insert-fake-quant", options)]


def _one_shot(plan: Plan, name: str, ledger: Ledger) -> list[StageDraft]:
    """Stages in which nothing is trained: first the masks, then the integers."""
    drafts = []
    if plan.prunings or not plan.quantizing:
        masks = [replace(item, timed=False) for item in plan.prunings]
        steps = [Step("lock-masks", _union([lock.sites for lock in plan.locks]))] if plan.locks else []
        drafts.append(
            StageDraft(name if name != "main" else "prune", [*steps, *(_timed(item, ZERO) for item in masks)])
        )
    for item in plan.quantizing:
        sites = [lock.sites for lock in plan.locks] + [pruning.sites for pruning in plan.prunings]
        batches: Options = {} if item.batches is None else {"batches": item.batches.plain()}
        steps = [Step("lock-masks", _union(sites))] if sites else []
        steps += [*item.before, *plan.smoothing, item.plan, Step("insert-observers"), Step("calibrate", batches)]
        steps += [Step("insert-fake-quant"), Step("freeze-quant")]
        drafts.append(
            StageDraft(
                f"{name}-quantize" if name != "main" and drafts else "quantize" if name == "main" else name, steps
            )
        )
    for draft in drafts:
        draft.train = False
        ledger.note(f"stage {draft.name} trains nothing (train: false)")
    if not plan.quantizing and plan.smoothing:
        drafts[-1].steps = [*plan.smoothing, *drafts[-1].steps]
    return drafts
