"""Pruners of Neural Compressor 1.x (``weight_compression`` with ``!Pruner``), whose times are epochs."""

from __future__ import annotations

from graphprune.importing.document import Node
from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields, Ledger
from graphprune.importing.quantity import Quantity

_KINDS = ("basic_magnitude", "pattern_lock", "gradient_sensitivity", "group_lasso")
_TIMES = ("start_epoch", "end_epoch", "initial_sparsity", "target_sparsity", "update_frequency")


def legacy_steps(node: Node, path: str, ledger: Ledger) -> list[Step]:
    """The passes, one a pruner."""
    common = Fields(node, path, ledger)
    listed = common.take("pruners")
    defaults = {name: common.number(name) for name in _TIMES}
    steps: list[Step] = []
    for index, item in enumerate(listed.items if listed is not None else ()):
        fields = Fields(Node(item.line, item.value), f"{path}.pruners[{index}]", ledger)
        if item.tag not in ("Pruner", ""):
            ledger.add(item.line, fields.path, f"the tag !{item.tag} is not one of this version's; read as !Pruner")
        steps += _step(fields, defaults, ledger)
        fields.close()
    if listed is None or not listed.items:
        ledger.add(common.line("pruners"), common.at("pruners"), "no pruner is given, so nothing is pruned")
    common.close()
    return steps


def _step(fields: Fields, defaults: dict[str, Quantity | None], ledger: Ledger) -> list[Step]:
    kind = fields.text("prune_type") or "basic_magnitude"
    if kind not in _KINDS:
        fields.refuse("prune_type", f"no prune_type {kind!r} is known; basic_magnitude was taken")
        kind = "basic_magnitude"
    said = {name: fields.number(name) or default for name, default in defaults.items()}
    sites = _sites(fields)
    if kind == "pattern_lock":
        fields.drop("pattern_lock keeps every zero by itself", "pattern", "method", "parameters")
        return [Step("lock-masks", sites)]
    options: Options = {"pattern": _pattern(fields), **_amount(fields, said)}
    options |= _criterion(fields, kind, ledger)
    options |= _window(said, ledger)
    return [Step("insert-masks", {**options, **sites})]


def _sites(fields: Fields) -> Options:
    names = fields.texts("names")
    return {"select": list(names)} if names else {}


def _pattern(fields: Fields) -> str:
    text = (fields.text("pattern") or "tile_pattern_1x1").split("_")[-1]
    return "unstructured" if text == "1x1" else text


def _amount(fields: Fields, said: dict[str, Quantity | None]) -> Options:
    amount = said["target_sparsity"]
    if amount is None:
        fields.ledger.add(fields.node.line, fields.path, "no target_sparsity; 0.9 was taken")
        amount = Quantity(0.9)
    first = said["initial_sparsity"]
    jump = first is not None and first.value > 0
    start, end = said["start_epoch"], said["end_epoch"]
    once = start is not None and end is not None and start.value == end.value
    named = f"linear(initial={first.value})" if jump and first is not None else "linear"
    return {"sparsity": amount.value, "schedule": "one-shot" if once else named}


def _criterion(fields: Fields, kind: str, ledger: Ledger) -> Options:
    method = fields.text("method") or "per_tensor"
    if method != "per_tensor" and kind != "gradient_sensitivity":
        fields.refuse("method", "a threshold for each channel: take scope=local, or a pattern of channels")
    node = fields.take("parameters")
    inner = Fields(node, fields.at("parameters"), ledger) if node is not None else None
    if kind != "gradient_sensitivity":
        strength = inner.number("alpha", "reg_coeff") if inner is not None else None
        if inner is not None:
            inner.close()
        lasso: Options = {}
        if kind == "group_lasso" and strength is not None:
            ledger.note("group_lasso is Yuan and Lin's here: choose its strength anew")
            lasso = {"regularizer": f"group_lasso(strength={strength.value})"}
        return {"criterion": "magnitude", "scope": "local", **lasso}
    inputs = inner.texts("importance_inputs") if inner is not None else None
    if inner is not None:
        inner.drop("weights keep their shape: they are masked, and nothing is cut out", "stride", "transpose")
        inner.drop("scores are compared as they are", "normalize", unless=(None, True, False))
        inner.drop(
            "heads are ranked by taylor, whose score is squared", "importance_metric", unless=(None, "abs_gradient")
        )
        inner.close()
    if inputs:
        return {"pattern": "head", "criterion": "taylor", "scope": "global"}
    ledger.note("gradient_sensitivity summed |W x G| over all steps; here it is a moving sum that forgets slowly")
    return {"criterion": "snip_momentum(decay=0.999)", "scope": "local"}


def _window(said: dict[str, Quantity | None], ledger: Ledger) -> Options:
    """Times: updates at the beginning of the epochs from ``start_epoch`` to ``end_epoch``."""
    start, end = said["start_epoch"] or Quantity(0), said["end_epoch"]
    options: Options = {"warm_up": start.epochs()}
    if end is not None and end.value == start.value:
        return options
    if end is None:
        ledger.note("no end_epoch: masks reach the target at the end of training")
        return {**options, "cool_down": 0, "frequency": "1 epoch"}
    frequency = said["update_frequency"] or Quantity(1)
    return {**options, "end": end.epochs(), "frequency": frequency.epochs()}
