"""Learning rates of SparseML as those of ``transformers.TrainingArguments``, for one stretch of training."""

from __future__ import annotations

from dataclasses import replace

from graphprune.importing.draft import Options
from graphprune.importing.fields import Ledger
from graphprune.importing.quantity import Quantity
from graphprune.importing.sparseml_plan import Plan, Rate


def fold_warm_up(plan: Plan, ledger: Ledger) -> Quantity | None:
    """Take a rate that rises from the start away, where another follows it; the epochs that it takes."""
    if len(plan.rates) < 2:
        return None
    rise, after = plan.rates[:2]
    if rise.kind != "linear" or rise.start.value or rise.end is None or rise.first.value >= rise.last.value:
        return None
    if after.start.value != rise.end.value or after.first.value != rise.last.value:
        return None
    if rise.first.value:
        ledger.note(f"the warm-up starts from a learning rate of 0, not of {rise.first.value}")
    plan.rates[:2] = [replace(after, start=rise.start, falls_from=rise.end)]
    return rise.end


def rate_at(rates: list[Rate], start: Quantity, end: Quantity | None) -> Rate | None:
    """The rate of a stretch: the last one that began by its start, else the first that begins inside."""
    begun = [rate for rate in rates if rate.start.value <= start.value]
    inside = [rate for rate in rates if end is None or rate.start.value < end.value]
    return begun[-1] if begun else inside[0] if inside else None


def rate_options(rate: Rate, start: Quantity, end: Quantity | None, ledger: Ledger) -> Options:
    """``learning_rate`` and its schedule from ``start`` to ``end``."""
    whole = start.value <= rate.start.value and (end is None or rate.end is None or rate.end.value >= end.value)
    if rate.kind == "constant":
        return _checked(
            rate, {"learning_rate": rate.first.plain(), "lr_scheduler_type": "constant"}, rate.first, ledger
        )
    if rate.kind == "restarts":
        length = (end or rate.end or rate.start) - start
        period = rate.cycle.value if rate.cycle is not None and rate.cycle.value > 0 else 1
        cycles = max(1, int(length.value / period))
        kwargs: Options = {"num_cycles": cycles}
        options: Options = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": kwargs}
        return _checked(rate, {"learning_rate": rate.first.plain(), **options}, rate.first, ledger)
    if rate.kind == "cosine":
        if not whole or (end is not None and rate.end is not None and rate.end.value != end.value):
            ledger.add(
                rate.origin.line, rate.origin.key, "the cosine does not cover its stage: the stage goes all the way"
            )
        options = {"learning_rate": rate.first.plain(), "lr_scheduler_type": "cosine"}
        if rate.last.value or rate.last.text:
            options |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": rate.last.plain()}}
        return _checked(rate, options, rate.first, ledger)
    if rate.kind == "cyclic_linear" and _several(rate):
        reason = "the rate goes down once and is not wound up again: transformers has no linear cycles"
        ledger.add(rate.origin.line, rate.origin.key, reason)
    return _linear(rate, start, end, ledger)


def _several(rate: Rate) -> bool:
    if rate.cycle is None or rate.cycle.value <= 0:
        return False
    return rate.end is None or (rate.end.value - rate.start.value) / rate.cycle.value > 1


def _linear(rate: Rate, start: Quantity, end: Quantity | None, ledger: Ledger) -> Options:
    first, last = _value(rate, start), _value(rate, end or rate.end or start)
    if end is not None and rate.end is not None and rate.end.value < end.value:
        ledger.add(
            rate.origin.line, rate.origin.key, "it ends before its stage does: the rate goes down to the stage's end"
        )
    if first == last:
        return _checked(rate, {"learning_rate": first.plain(), "lr_scheduler_type": "constant"}, first, ledger)
    if first.value < last.value:
        ledger.add(
            rate.origin.line, rate.origin.key, "a rate rises only in warm-up: the last one was taken for all of it"
        )
        return _checked(rate, {"learning_rate": last.plain(), "lr_scheduler_type": "constant"}, last, ledger)
    if not last.text and last.value == 0:
        return _checked(rate, {"learning_rate": first.plain(), "lr_scheduler_type": "linear"}, first, ledger)
    kwargs: Options = {"lr_end": last.plain(), "power": 1.0}
    options: Options = {
        "learning_rate": first.plain(),
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": kwargs,
    }
    return _checked(rate, options, first, ledger)


def _value(rate: Rate, at: Quantity) -> Quantity:
    """The rate of a linear function at an epoch."""
    start = rate.falls_from or rate.start
    if at.value <= start.value or rate.end is None:
        return rate.first
    if at.value >= rate.end.value:
        return rate.last
    return rate.last + (rate.first - rate.last) * ((rate.end - at) / (rate.end - start))


def _checked(rate: Rate, options: Options, first: Quantity, ledger: Ledger) -> Options:
    if first.value > 0:
        return options
    ledger.add(rate.origin.line, rate.origin.key, "a learning rate of 0 trains nothing; give --learning_rate")
    return {}
