"""Pruning modifiers of SparseML as insert-masks and lock-masks."""

from __future__ import annotations

import re

from graphprune.errors import RecipeError
from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields
from graphprune.importing.quantity import Quantity, evaluate, expression_of
from graphprune.importing.sparseml_plan import Lock, Origin, Plan, Pruning, end_of, every_of, start_of

_ALL = ("__ALL__", "__ALL_PRUNABLE__")
_TYPES = {"Linear": "linear", "Conv1d": "conv1d", "Conv2d": "conv2d", "Conv3d": "conv3d"}
_CURVES = {"linear": "linear", "cubic": "cubic", "inverse_cubic": "inverse-cubic"}
Amount = tuple[Quantity, Options]
"""A sparsity and the sites that get it."""


def constant(fields: Fields, plan: Plan) -> None:
    """``ConstantPruningModifier``: the zeros that are there."""
    if end_of(fields) is not None:
        fields.refuse(
            fields.name_of("end_epoch", "end"), "lock-masks holds to the end of its stage; end the stage there"
        )
    if every_of(fields) is not None:
        fields.ledger.note("update_frequency of a constant mask has no effect: lock-masks holds at every step")
    plan.locks.append(Lock(Origin.of(fields, "start_epoch", "start"), start_of(fields), sites_of(fields)))


def magnitude(fields: Fields, plan: Plan) -> None:
    """``GMPruningModifier``, ``MagnitudePruningModifier`` and ``GlobalMagnitudePruningModifier``."""
    everywhere = fields.path.endswith("GlobalMagnitudePruningModifier")
    fields.drop("SparseML itself removed it", "phased", unless=(None, False))
    _score_type(fields)
    if plan.one_shot or not ({"init_sparsity", "start_epoch", "start"} & {*fields.node.mapping}):
        _one_shot_magnitude(fields, plan, everywhere)
        return
    gradual(fields, plan, "magnitude", everywhere)


def _score_type(fields: Fields) -> None:
    fields.drop(
        "write the modifier of that criterion, such as MovementPruningModifier",
        "score_type",
        unless=(None, "magnitude"),
    )


def _one_shot_magnitude(fields: Fields, plan: Plan, everywhere: bool) -> None:
    schedule = {"criterion": "magnitude", "schedule": "one-shot", "scope": _scope(fields, everywhere)}
    fields.drop("the sparsity is reached at once", "init_sparsity", unless=(None, 0, 0.0, "__FROM_PARAM__"))
    for amount, sites in amounts_of(fields, "sparsity", "final_sparsity"):
        _add(fields, plan, amount, sites, schedule, timed=not plan.one_shot)


def gradual(fields: Fields, plan: Plan, criterion: str, everywhere: bool) -> None:
    """A sparsity that grows from ``init_sparsity`` to ``final_sparsity``."""
    curve = fields.text("inter_func", "update_scheduler") or "cubic"
    schedule = _CURVES.get(curve.removesuffix("_decay"), "")
    if not schedule:
        fields.refuse(fields.name_of("inter_func", "update_scheduler"), f"no curve {curve!r}; cubic was taken")
        schedule = "cubic"
    first = _initial(fields)
    fields.drop("curves take no arguments here", "scheduler_args", unless=(None, {}))
    named = schedule if first is None else f"{schedule}(initial={first.plain()})"
    scope = _scope(fields, everywhere)
    for amount, sites in amounts_of(fields, "final_sparsity", "sparsity"):
        _add(fields, plan, amount, sites, {"criterion": criterion, "schedule": named, "scope": scope})


def movement(fields: Fields, plan: Plan) -> None:
    """``MovementPruningModifier``."""
    gradual(fields, plan, "movement", everywhere=False)


def obs(fields: Fields, plan: Plan) -> None:
    """``OBSPruningModifier`` (oBERT); its options are those of the criterion."""
    options = []
    for theirs, mine, default in (
        ("num_grads", "samples", 1024),
        ("damp", "damping", 1e-7),
        ("fisher_block_size", "block", 50),
        ("num_recomputations", "recomputations", 1),
    ):
        found = fields.number(theirs)
        if found is not None and (found.text or found.value != default):
            options.append(f"{mine}={found.plain()}")
    fields.drop(
        "gradients are sampled by the training tool, with its own batch size; in Python, by GradientSampler",
        "grad_sampler_kwargs",
        unless=(None, {}),
    )
    gradual(fields, plan, f"obs({','.join(options)})" if options else "obs", everywhere=True)


def acdc(fields: Fields, plan: Plan) -> None:
    """``ACDCPruningModifier``: phases of ``update_frequency`` epochs, the last one compressed."""
    start, end, phase = start_of(fields), end_of(fields), every_of(fields)
    cycles, last = 4, end
    if end is not None and phase is not None:
        cycles = max(1, int((end.value - start.value) / phase.value) // 2)
        last = start + phase * (2 * cycles)
    else:
        fields.ledger.add(
            fields.node.line, fields.path, "end_epoch or update_frequency is missing: four cycles were taken"
        )
    fields.drop("moments always start anew here when weights come back", "momentum_buffer_reset", unless=(None, True))
    options = {"criterion": "magnitude", "schedule": f"acdc(cycles={cycles})", "scope": _scope(fields, everywhere=True)}
    every = None if phase is None else phase / 2
    for amount, sites in amounts_of(fields, "compression_sparsity", "final_sparsity"):
        _add(fields, plan, amount, sites, options, times=(start, last, every))


def top_kast(fields: Fields, plan: Plan) -> None:
    """``TopKASTPruningModifier``."""
    backward = fields.number("backward_sparsity") or Quantity(0.5)
    fields.drop(
        "the optimizer's weight_decay acts on the weights that are trained; set training.weight_decay",
        "active_weight_decay",
        unless=(None, 0, 0.0),
    )
    options = {
        "criterion": f"top_kast(backward_sparsity={backward.plain()})",
        "schedule": "constant",
        "scope": _scope(fields, everywhere=True),
    }
    for amount, sites in amounts_of(fields, "forward_sparsity", "final_sparsity"):
        _add(fields, plan, amount, sites, options)


def rigl(fields: Fields, plan: Plan) -> None:
    """``RigLPruningModifier``; unstructured and per layer."""
    strategy = (fields.text("sparsity_strategy") or "erdos_renyi_kernel").replace("_", "-")
    scope = "local" if strategy == "uniform" else strategy
    if scope not in ("local", "erdos-renyi", "erdos-renyi-kernel"):
        fields.refuse("sparsity_strategy", f"no strategy {strategy!r}; erdos-renyi-kernel was taken")
        scope = "erdos-renyi-kernel"
    fraction = fields.number("init_update_fraction")
    fields.drop("growth reads the gradient of the last step", "num_grads", unless=(None, 1))
    fields.drop("growth reads the training's own gradient", "grad_sampler_kwargs", unless=(None, {}))
    fields.drop("moments of pruned weights are zero here in any case", "momentum_buffer_reset", unless=(None, True))
    fields.drop("RigL is per layer in both tools", "global_sparsity", unless=(None, False))
    criterion = "rigl" if fraction is None else f"rigl(fraction={fraction.plain()})"
    options = {"criterion": criterion, "schedule": "constant", "scope": scope}
    for amount, sites in amounts_of(fields, "final_sparsity", "sparsity"):
        _add(fields, plan, amount, sites, options)


def structured(fields: Fields, plan: Plan) -> None:
    """``StructuredPruningModifier``: whole channels or filters by magnitude."""
    fields.drop(
        "groups of weights that lose the same channels are not given by hand; pattern head and neuron find theirs in the graph",
        "param_groups",
        unless=(None, []),
    )
    fields.drop("channels are ranked by their mean magnitude", "score_type", "mask_creator", unless=(None, "magnitude"))
    gradual(fields, plan, "magnitude", everywhere=False)


def second_order(fields: Fields, plan: Plan) -> None:
    """``SparseGPTModifier`` and ``WandaPruningModifier``: once, layer by layer, from the layer's inputs."""
    name = "wanda" if fields.path.endswith("WandaPruningModifier") else "sparsegpt"
    options = []
    for theirs, mine, default in (("dampening_frac", "damping", 0.01), ("block_size", "block", 128)):
        found = fields.number(theirs) if name == "sparsegpt" else None
        if found is not None and (found.text or found.value != default):
            options.append(f"{mine}={found.plain()}")
    fields.drop("give each layer its sparsity with insert-masks' targets", "sparsity_profile", "owl_m", "owl_lmbda")
    fields.drop("layers are pruned one after the other in any case", "sequential_update", unless=(None, True, False))
    fields.drop("write a stage that quantizes after this one", "quantize", unless=(None, False))
    fields.drop(
        "offloading is chosen by graphprune prune", "offload_hessians", "sequential_targets", unless=(None, False)
    )
    if fields.flag("preserve_sparsity_mask"):
        fields.refuse("preserve_sparsity_mask", "zeros count as the least important here, and are not bound to stay")
    said = fields.node.mapping.get("sparsity")
    if said is not None and said.items:
        fields.refuse("sparsity", "one sparsity a layer: write them as insert-masks' targets, name=0.5")
        return
    criterion = f"{name}({','.join(options)})" if options else name
    schedule = {"criterion": criterion, "schedule": "one-shot", "scope": "local"}
    amounts = amounts_of(fields, "sparsity")
    if not amounts and (group := re.fullmatch(r"(\d+):(\d+)", fields.text("mask_structure") or "")):
        amounts = [(Quantity(int(group[1]) / int(group[2])), sites_of(fields))]
    for amount, sites in amounts:
        _add(fields, plan, amount, sites, schedule, timed=False, pruned_first=True)


def amounts_of(fields: Fields, *names: str) -> list[Amount]:
    """The sparsities and which sites get each; empty, and listed, where none is said."""
    name = fields.name_of(*names)
    node = fields.node.mapping.get(name)
    if node is None:
        fields.ledger.add(fields.node.line, fields.path, f"no {name}; nothing was pruned")
        return []
    if not node.mapping:
        found = fields.number(*names)
        return [] if found is None else [(found, sites_of(fields))]
    fields.take(name)
    amounts = []
    for text, listed in node.mapping.items():
        inside = expression_of(text)
        try:
            value = evaluate(text if inside is None else inside, fields.scope.values)
        except RecipeError as error:
            fields.ledger.add(listed.line, f"{fields.at(name)}.{text}", f"cannot be evaluated: {error}")
            continue
        texts = [str(item.plain()) for item in listed.items] or [str(listed.plain())]
        if isinstance(value, (int, float)):
            amounts.append((fields.quantity(value, inside), _sites(fields, name, texts)))
    if "params" in fields or "targets" in fields:
        fields.texts("params", "targets")
        fields.ledger.note(f"{fields.at(name)} names the weights; params of the same modifier repeats them")
    return amounts


def sites_of(fields: Fields) -> Options:
    """``select``, ``ops`` and ``include_last`` for ``params`` or ``targets``."""
    return _sites(fields, fields.name_of("params", "targets"), fields.texts("params", "targets") or _ALL)


def _sites(fields: Fields, name: str, texts: tuple[str, ...] | list[str]) -> Options:
    options: Options = {"include_last": True}
    if any(text in _ALL for text in texts):
        return options
    select = [select_text(text) for text in texts if text not in _TYPES]
    operators = [_TYPES[text] for text in texts if text in _TYPES]
    if operators and select:
        fields.refuse(
            name, "types and names together: a rule of insert-masks takes both conditions; only the names were taken"
        )
        operators = []
    return {**({"select": select} if select else {}), **({"ops": operators} if operators else {}), **options}


def select_text(text: str) -> str:
    """A name or expression as ``select`` takes it; SparseML's expressions match from the beginning of the name."""
    if not text.startswith("re:") or text[3:].startswith(("^", ".*")):
        return text
    return f"re:^(?:{text[3:]})" if "|" in text else f"re:^{text[3:]}"


def _initial(fields: Fields) -> Quantity | None:
    node = fields.node.mapping.get("init_sparsity")
    if node is not None and node.value == "__FROM_PARAM__":
        fields.take("init_sparsity")
        return None
    found = fields.number("init_sparsity")
    return None if found is None or (not found.text and found.value == 0) else found


def _scope(fields: Fields, everywhere: bool) -> str:
    said = fields.flag("global_sparsity", "apply_globally")
    return "global" if (everywhere if said is None else said) else "local"


def _pattern(fields: Fields, pruned_first: bool) -> Options:
    """``pattern`` and ``ragged`` for a mask type."""
    name = fields.name_of("mask_type", "mask_structure")
    said = fields.plain("mask_type", "mask_structure")
    text = "unstructured" if said in (None, "0:0") else str(said)
    if isinstance(said, list) and len(said) == 2:
        text = f"block_{said[0]},{said[1]}"
    if text in ("block4", "block"):
        return {"pattern": "1x4", "ragged": "pad"}
    if text in ("channel", "filter"):
        return {"pattern": "channelx1" if text == "channel" else "1xchannel"}
    if match := re.fullmatch(r"\^?block_(-?\d+),\s*(-?\d+)", text):
        rows, columns = (part if int(part) > 0 else "channel" for part in match.groups())
        return {"pattern": f"{rows}x{columns}"}
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(match[1]), int(match[2])
        return {"pattern": f"{group - kept if pruned_first else kept}:{group}"}
    if text != "unstructured":
        fields.refuse(name, f"no pattern {text!r}; unstructured was taken")
    return {"pattern": "unstructured"}


def _add(
    fields: Fields,
    plan: Plan,
    amount: Quantity,
    sites: Options,
    options: dict[str, str],
    *,
    times: tuple[Quantity, Quantity | None, Quantity | None] | None = None,
    timed: bool = True,
    pruned_first: bool = False,
) -> None:
    start, end, every = times or (start_of(fields), end_of(fields), every_of(fields))
    shape = _pattern(fields, pruned_first)
    stays = fields.flag("leave_enabled")
    fields.drop("a pruned weight comes back only by its criterion", "allow_reintroduction", unless=(None, False))
    if not 0 <= amount.value < 1:
        fields.ledger.add(
            fields.node.line, fields.path, f"sparsity {amount.value} is no fraction below 1; nothing was pruned"
        )
        return
    step: Options = {**shape, "sparsity": amount.plain(), **options}
    if not amount.text and amount.value > 0.98:
        step["max_sparsity"] = 1.0
    plan.prunings.append(
        Pruning(
            Origin.of(fields, "start_epoch", "start"),
            start,
            end,
            Step("insert-masks", {**step, **sites}),
            every,
            sites,
            stays=stays is not False,
            timed=timed,
        )
    )
