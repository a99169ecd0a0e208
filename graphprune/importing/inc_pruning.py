"""Neural Compressor's pruning configurations (``WeightPruningConfig``, ``weight_compression_v2``) as insert-masks and lock-masks.

Steps are shifted by one: Neural Compressor updates before a step's forward, graphprune after a step, so its step 1 is step 0 here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from graphprune.importing.document import Node
from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields, Ledger
from graphprune.importing.quantity import Quantity

_DECAYS = {"exp": "exponential", "cos": "cosine", "cube": "cube", "linear": "linear"}
_GRADIENT = ("snip_momentum", "snip", "gradient", "block_mask", "retrain_free")
_CRITERIA = ("magnitude", *_GRADIENT)
_OPERATORS = {"Linear": ("linear",), "Conv": ("conv1d", "conv2d", "conv3d", "addmm"), "Conv1D": ("addmm",)}
_OPERATORS |= {"Conv1d": ("conv1d",), "Conv2d": ("conv2d",), "Conv3d": ("conv3d",)}
_NAMES: dict[str, tuple[str, ...]] = {
    "pruning_type": ("pruning_type", "prune_type"),
    "pattern": ("pattern",),
    "target_sparsity": ("target_sparsity",),
    "op_names": ("op_names", "names"),
    "excluded_op_names": ("excluded_op_names", "exclude_names", "extra_excluded_names"),
    "start_step": ("start_step",),
    "end_step": ("end_step",),
    "pruning_scope": ("pruning_scope", "prune_domain"),
    "pruning_frequency": ("pruning_frequency", "prune_frequency", "update_frequency_on_step"),
    "min_sparsity_ratio_per_op": ("min_sparsity_ratio_per_op",),
    "max_sparsity_ratio_per_op": ("max_sparsity_ratio_per_op", "max_sparsity_ratio_per_layer"),
    "sparsity_decay_type": ("sparsity_decay_type",),
    "pruning_op_types": ("pruning_op_types", "prune_layer_type"),
    "criterion_type": ("criterion_type",),
    "criterion_reduce_type": ("criterion_reduce_type",),
    "reg_type": ("reg_type",),
    "reg_coeff": ("reg_coeff",),
    "parameters": ("parameters",),
    "low_memory_usage": ("low_memory_usage",),
    "lock_init_sparsity": ("lock_init_sparsity",),
    "resume_from_pruned_checkpoint": ("resume_from_pruned_checkpoint",),
    "backend": ("backend",),
}
KNOWN = frozenset(name for names in _NAMES.values() for name in names) | {"pruning_configs", "pruners"}
"""Every key of such a configuration, with those of earlier versions."""
_LOCAL_ONLY = ("op_names",)


@dataclass(frozen=True)
class Layered:
    """A local configuration over the global one: the local one wins, and each part remembers where it stands."""

    local: Fields
    common: Fields | None = None

    def find(self, key: str) -> Fields:
        """The part that gives an option; the local one where none does."""
        names = _NAMES[key]
        if self.common is None or any(name in self.local for name in names) or key in _LOCAL_ONLY:
            return self.local
        return self.common if any(name in self.common for name in names) else self.local

    def number(self, key: str, default: float) -> Quantity:
        """A number."""
        return self.find(key).number(*_NAMES[key]) or Quantity(default)

    def given(self, key: str) -> bool:
        """Whether an option is said and not null."""
        fields = self.find(key)
        return any(name in fields and fields.node.mapping[name].value is not None for name in _NAMES[key])

    def text(self, key: str, default: str) -> str:
        """A text."""
        return self.find(key).text(*_NAMES[key]) or default

    def texts(self, key: str) -> tuple[str, ...]:
        """Texts."""
        return self.find(key).texts(*_NAMES[key]) or ()

    def refuse(self, key: str, reason: str) -> None:
        """List an option as not carried."""
        fields = self.find(key)
        fields.refuse(fields.name_of(*_NAMES[key]), reason)


def pruning_steps(node: Node, path: str, ledger: Ledger) -> list[Step]:
    """The passes for one configuration, one for each local one."""
    common = Fields(node, path, ledger)
    listed = common.take("pruning_configs", "pruners")
    name = common.name_of("pruning_configs", "pruners")
    if listed is not None and not listed.items and not listed.mapping:
        common.refuse(name, f"{listed.value!r} is no list of configurations; write it out")
    entries = (listed,) if listed is not None and listed.mapping else listed.items if listed is not None else ()
    locals_ = [item for item in entries if item.mapping]
    for item in entries:
        if not item.mapping and item.value not in (None, {}):
            ledger.add(item.line, common.at(name), f"{item.value!r} is no configuration; write it out")
    if not locals_:
        steps = _step(Layered(common), ledger)
        common.close(tuple(KNOWN))
        return steps
    steps = []
    for index, item in enumerate(locals_):
        local = Fields(item, f"{common.at(name)}[{index}]", ledger)
        steps += _step(Layered(local, common), ledger)
        local.close(tuple(KNOWN))
    if "op_names" in common and common.texts("op_names"):
        common.refuse("op_names", "with local configurations the global op_names are ignored, in Neural Compressor too")
    common.close(tuple(KNOWN))
    return steps


def _step(config: Layered, ledger: Ledger) -> list[Step]:
    kind = config.text("pruning_type", "snip_momentum")
    progressive = kind.endswith("_progressive")
    kind = kind.removesuffix("_progressive")
    pattern = _pattern(config)
    _without(config, kind, ledger)
    sites = _sites(config)
    if kind == "pattern_lock":
        return [_lock(config, pattern, sites, ledger)]
    if kind == "sparse_gpt":
        amount = _sparsity(config, pattern)
        _unused(
            config,
            "a one-shot criterion has no schedule",
            "pruning_frequency",
            "sparsity_decay_type",
            "start_step",
            "end_step",
        )
        options: Options = {"criterion": "sparsegpt", "schedule": "one-shot", "scope": "local", **sites}
        return [Step("insert-masks", {"pattern": pattern, "sparsity": amount.plain(), **options})]
    if kind not in _CRITERIA:
        config.refuse("pruning_type", f"no criterion {kind!r} is known; snip_momentum was taken")
        kind = "snip_momentum"
    amount = _sparsity(config, pattern)
    options = {"pattern": pattern, "sparsity": amount.plain(), "criterion": kind, "scope": _scope(config)}
    options |= _times(config, kind, ledger)
    options |= _parts(config, options, ledger) if progressive else {}
    options |= _caps(config, amount, pattern)
    options |= _regularizer(config, ledger)
    return [Step("insert-masks", {**options, **sites})]


def _lock(config: Layered, pattern: str, sites: Options, ledger: Ledger) -> Step:
    """Zeros as they are. Neural Compressor's default pattern for it loses most of them, so only a written one is taken."""
    if not config.given("pattern"):
        pattern = "unstructured"
        ledger.note(
            "pattern_lock without a pattern locks every zero; Neural Compressor's default there is 4x1, which lost zeros"
        )
    if config.given("target_sparsity"):
        config.number("target_sparsity", 0.0)
        ledger.note("pattern_lock keeps the sparsity that is there; target_sparsity had no effect")
    for key in ("start_step", "end_step", "pruning_frequency", "pruning_scope", "sparsity_decay_type"):
        if config.given(key):
            config.find(key).take(*_NAMES[key])
            ledger.note(f"pattern_lock has no schedule; {key} was left out")
    return Step("lock-masks", {**({"pattern": pattern} if pattern != "unstructured" else {}), **sites})


def _pattern(config: Layered) -> str:
    """The pattern, N:M turned into kept:group."""
    text = config.text("pattern", "4x1").split("_")[-1]
    if text == "mha":
        return "head"
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        pruned, group = int(match[1]), int(match[2])
        if not 0 < pruned < group:
            config.refuse("pattern", f"{text} prunes {pruned} of {group}, which leaves nothing; 4x1 was taken")
            return "4x1"
        return f"{group - pruned}:{group}"
    if re.fullmatch(r"(\d+|channel)x(\d+|channel)", text):
        return "unstructured" if text == "1x1" else text
    config.refuse("pattern", f"no pattern {text!r} is known; 4x1 was taken")
    return "4x1"


def _most(pattern: str) -> float:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return 1 - int(match[1]) / int(match[2]) if match else 1.0


def _sparsity(config: Layered, pattern: str) -> Quantity:
    most = _most(pattern)
    amount = config.number("target_sparsity", min(0.9, most))
    if not 0 <= amount.value < 1:
        config.refuse("target_sparsity", f"{amount.value} is no fraction below 1; {min(0.9, most):g} was taken")
        return Quantity(min(0.9, most))
    if amount.value > most + 1e-9:
        reason = f"{amount.value} cannot be had where {pattern} keeps {1 - most:g}; Neural Compressor refuses it. {most:g} was taken"
        config.refuse("target_sparsity", reason)
        return Quantity(most)
    return amount


def _scope(config: Layered) -> str:
    scope = config.text("pruning_scope", "global")
    if scope in ("global", "local"):
        return scope
    config.refuse("pruning_scope", f"no scope {scope!r}; global was taken")
    return "global"


def _times(config: Layered, kind: str, ledger: Ledger) -> Options:
    decay = config.text("sparsity_decay_type", "exp")
    if decay not in _DECAYS:
        config.refuse("sparsity_decay_type", f"no curve {decay!r}; exponential was taken")
    schedule = _DECAYS.get(decay, "exponential")
    start, end = int(config.number("start_step", 0).value), int(config.number("end_step", 0).value)
    frequency = int(config.number("pruning_frequency", 1).value)
    if not config.given("end_step") or (start == end == 0 and kind in _GRADIENT) or end < start:
        reason = "no end_step that can work: masks are driven over the whole training, and reach the target at its end"
        if config.given("end_step") and end < start:
            config.refuse("end_step", f"it comes before start_step. {reason}")
        else:
            ledger.note(reason)
        return {"schedule": schedule, "warm_up": max(0, start - 1), "cool_down": 0, "frequency": max(1, frequency)}
    if start == end:
        return {"schedule": "one-shot", "warm_up": max(0, start - 1)}
    window = {"warm_up": max(0, start - 1), "end": max(0, end - 1), "frequency": max(1, frequency)}
    return {"schedule": schedule, **window}


def _parts(config: Layered, options: Options, ledger: Ledger) -> Options:
    """``progressive``, as often as Neural Compressor really divided an update."""
    frequency = cast("int", options.get("frequency", 1))
    start, end = config.number("start_step", 0).value, config.number("end_step", 0).value
    if (
        frequency == 1
        or options["schedule"] == "one-shot"
        or 0 < end - start <= 4
        or options["pattern"] == "unstructured"
    ):
        reason = "an update cannot be divided into parts here (frequency 1, a short window, or single weights); masks change at once"
        config.refuse("pruning_type", f"{reason}, as they did in Neural Compressor")
        return {}
    return {"progressive": min(4, frequency)}


def _caps(config: Layered, amount: Quantity, pattern: str) -> Options:
    most = min(config.number("max_sparsity_ratio_per_op", 0.98).value, 1.0)
    least = config.number("min_sparsity_ratio_per_op", 0.0).value
    options: Options = {}
    if most < amount.value:
        if config.given("max_sparsity_ratio_per_op"):
            config.refuse("max_sparsity_ratio_per_op", f"it lies below target_sparsity {amount.value}, which was taken")
        most = amount.value
    if most != 0.98 and _most(pattern) == 1.0:
        options["max_sparsity"] = most
    if least > amount.value:
        config.refuse("min_sparsity_ratio_per_op", f"it lies above target_sparsity {amount.value}")
    elif least:
        options["min_sparsity"] = least
    return options


def _regularizer(config: Layered, ledger: Ledger) -> Options:
    kind = config.text("reg_type", "none")
    strength = config.number("reg_coeff", 0.0).value
    if config.given("parameters"):
        fields = config.find("parameters")
        node = fields.take("parameters")
        if node is not None:
            inner = Fields(node, fields.at("parameters"), ledger)
            found = inner.number("reg_coeff")
            strength = strength if found is None else found.value
            inner.close()
    if kind in ("none", "None"):
        return {}
    if kind != "group_lasso":
        config.refuse("reg_type", f"no regularizer {kind!r} is known")
        return {}
    ledger.note(
        "group_lasso is Yuan and Lin's here; Neural Compressor divided by the gradient's norm: choose its strength anew"
    )
    return {"regularizer": f"group_lasso(strength={strength})"} if strength else {}


def _sites(config: Layered) -> Options:
    options: Options = {}
    for key, option in (("op_names", "select"), ("excluded_op_names", "exclude")):
        texts = config.texts(key)
        if texts:
            options[option] = [f"re:{text}" for text in texts]
    kinds = config.texts("pruning_op_types")
    unknown = [kind for kind in kinds if kind not in _OPERATORS]
    if unknown:
        config.refuse("pruning_op_types", f"{', '.join(unknown)}: not among {', '.join(_OPERATORS)}")
    operators = [name for kind in kinds for name in _OPERATORS.get(kind, ())]
    if operators and {*kinds} != {"Conv", "Linear"}:
        options["ops"] = list(dict.fromkeys(operators))
    return options


def _without(config: Layered, kind: str, ledger: Ledger) -> None:
    """Options that have no equivalent."""
    criterion = config.text("criterion_type", kind)
    if criterion != kind and config.given("criterion_type") and kind != "pattern_lock":
        config.refuse("criterion_type", f"pruning_type says {kind}, and that was taken")
    reduce = config.text("criterion_reduce_type", "mean")
    if reduce == "sum":
        ledger.note("criterion_reduce_type: blocks are ranked by their mean, in the same order as by their sum")
    elif reduce != "mean":
        config.refuse("criterion_reduce_type", "blocks are ranked by their mean")
    if config.text("backend", "default") != "default":
        config.refuse("backend", "name a target where the recipe is exported")
    for key, reason in (
        ("low_memory_usage", "scores are float32"),
        ("lock_init_sparsity", "a schedule starts from the zeros that are there in any case"),
        (
            "resume_from_pruned_checkpoint",
            "nobody read it in Neural Compressor either; runs are resumed from checkpoints",
        ),
    ):
        if config.given(key) and config.find(key).flag(*_NAMES[key]):
            config.refuse(key, reason)


def _unused(config: Layered, reason: str, *keys: str) -> None:
    for key in keys:
        if config.given(key):
            config.refuse(key, reason)
