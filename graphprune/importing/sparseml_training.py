"""Modifiers of SparseML that train: learning rates, weight decay, length, distillation."""

from __future__ import annotations

from graphprune.importing.draft import Options
from graphprune.importing.fields import Fields
from graphprune.importing.quantity import Quantity
from graphprune.importing.sparseml_plan import Origin, Plan, Rate, Teaching, end_of, start_of

_LOGITS = ("logits", "start_logits", "end_logits")


def epoch_range(fields: Fields, plan: Plan) -> None:
    """``EpochRangeModifier``: the length of training."""
    start, end = start_of(fields), end_of(fields)
    if end is not None and (plan.epochs is None or end.value > plan.epochs.value):
        plan.epochs = end
    if start.value:
        fields.refuse(fields.name_of("start_epoch", "start"), "training starts at epoch 0 of its stage")


def set_rate(fields: Fields, plan: Plan) -> None:
    """``SetLearningRateModifier``: one rate."""
    rate = fields.number("learning_rate")
    fields.drop("all parameters have one learning rate", "param_groups", unless=(None, []))
    _constant(fields, plan, rate)


def _constant(fields: Fields, plan: Plan, rate: Quantity | None) -> None:
    if rate is None:
        fields.ledger.add(fields.node.line, fields.path, "no learning rate; nothing was made of it")
        return
    plan.rates.append(
        Rate(Origin.of(fields, "start_epoch", "start"), start_of(fields), end_of(fields), "constant", rate, rate)
    )


def rate_function(fields: Fields, plan: Plan) -> None:
    """``LearningRateFunctionModifier``: linear, cosine, cyclic_linear."""
    kind = fields.text("lr_func") or "linear"
    first, last = fields.number("init_lr"), fields.number("final_lr")
    fields.drop("all parameters have one learning rate", "param_groups", unless=(None, []))
    cycle = fields.number("cycle_epochs")
    if first is None or last is None:
        fields.ledger.add(fields.node.line, fields.path, "init_lr or final_lr is missing; nothing was made of it")
        return
    if kind not in ("linear", "cosine", "cyclic_linear"):
        fields.refuse("lr_func", f"no function {kind!r}; linear was taken")
        kind = "linear"
    origin = Origin.of(fields, "lr_func", "init_lr")
    plan.rates.append(Rate(origin, start_of(fields), end_of(fields), kind, first, last, cycle or Quantity(1)))


def rate_class(fields: Fields, plan: Plan) -> None:
    """``LearningRateModifier``: schedulers of torch. Only restarts of the cosine have an equivalent; of the others the first rate."""
    kind = fields.text("lr_class") or "StepLR"
    node = fields.take("lr_kwargs")
    arguments = Fields(node, fields.at("lr_kwargs"), fields.ledger, fields.scope) if node is not None else None
    rate = fields.number("init_lr")
    fields.drop("it belongs to a deprecated writing", "constant_logging", unless=(None, True, False))
    period = arguments.number("T_0") if arguments is not None and kind == "CosineAnnealingWarmRestarts" else None
    if period is not None and arguments is not None and rate is not None:
        arguments.drop("cycles are equally long", "T_mult", unless=(None, 1))
        arguments.drop("it goes down to 0", "eta_min", unless=(None, 0, 0.0))
        arguments.close()
        origin = Origin.of(fields, "lr_class")
        plan.rates.append(Rate(origin, start_of(fields), end_of(fields), "restarts", rate, Quantity(0), period))
        return
    fields.refuse("lr_class", f"transformers has no {kind}; the first rate stays: write one stage for each rate")
    _constant(fields, plan, rate)


def weight_decay(fields: Fields, plan: Plan) -> None:
    """``SetWeightDecayModifier``."""
    found = fields.number("weight_decay")
    if start_of(fields).value or (end_of(fields) is not None):
        fields.refuse(fields.name_of("start_epoch", "start"), "weight decay is one number of a stage")
    fields.drop("all parameters have one weight decay", "param_groups", unless=(None, []))
    if found is not None:
        plan.training["weight_decay"] = found.plain()


def distillation(fields: Fields, plan: Plan) -> None:
    """``DistillationModifier``: hardness x teacher + (1 - hardness) x task."""
    hardness = fields.number("hardness") or Quantity(0.5)
    temperature = fields.number("temperature") or Quantity(2.0)
    keys = fields.texts("distill_output_keys") or ()
    if any(key not in _LOGITS for key in keys):
        fields.refuse(
            "distill_output_keys", "the logits of the task are compared; others with hidden, attentions and layers"
        )
    fields.drop("the teacher gets the inputs that it takes", "teacher_input_keys", unless=(None, []))
    settings: Options = {
        "temperature": temperature.plain(),
        "logits": hardness.plain(),
        "task": (Quantity(1) - hardness).plain(),
    }
    plan.teaching.append(
        Teaching(Origin.of(fields, "start_epoch", "start"), start_of(fields), end_of(fields), settings)
    )


def layer_distillation(fields: Fields, plan: Plan) -> None:
    """``PerLayerDistillationModifier``: squared errors of features, relative to the teacher's where normalized."""
    gain = fields.number("gain") or Quantity(1.5)
    students, teachers = fields.texts("student_layer_names"), fields.texts("teacher_layer_names")
    relative = fields.flag("normalize")
    project = fields.flag("project_features")
    fields.drop("it keeps a division from zero, as here", "epsilon", unless=(None, 1e-6))
    settings: Options = {
        "task": 1.0,
        "logits": 0.0,
        "hidden": gain.plain(),
        "hidden_loss": "mse" if relative is False else "relative",
        "project": project is not False,
    }
    _pairs(fields, settings, students, teachers or students)
    plan.teaching.append(
        Teaching(Origin.of(fields, "start_epoch", "start"), start_of(fields), end_of(fields), settings)
    )


def _pairs(
    fields: Fields, settings: Options, students: tuple[str, ...] | None, teachers: tuple[str, ...] | None
) -> None:
    if students is None or teachers is None:
        return
    texts = (*students, *teachers)
    if len(students) != len(teachers) or any(text.startswith(("re:", "__")) for text in texts):
        fields.refuse(
            "student_layer_names", "write distillation.layers as pairs of module names; hidden states are spread evenly"
        )
        return
    settings["layers"] = [list(pair) for pair in zip(students, teachers, strict=True)]


def output_distillation(fields: Fields, plan: Plan) -> None:
    """``OutputDistillationModifier`` of the second generation."""
    comparison = fields.text("comparison") or "kl_divergence"
    task = fields.number("orig_scale") or Quantity(1.0)
    scale = fields.number("distill_scale") or Quantity(1.0)
    logits = comparison in ("kl_divergence", "KLDivergence")
    settings: Options = {"task": task.plain(), "logits": scale.plain() if logits else 0.0}
    if not logits:
        known = {"l2": "mse", "mse": "mse", "l1": "l1", "square_head": "relative"}
        if comparison not in known:
            fields.refuse("comparison", f"no comparison {comparison!r}; mse was taken")
        settings |= {"hidden": scale.plain(), "hidden_loss": known.get(comparison, "mse")}
    fields.drop(
        "softmax is part of the loss of logits", "transforms", unless=(None, "softmax", ["softmax"], [], "none")
    )
    fields.drop(
        "distillation has the temperature and the weights only",
        "comparison_args",
        "transforms_args",
        unless=(None, [], {}),
    )
    node = fields.take("targets")
    pairs = [[str(part.plain()) for part in item.items] for item in (node.items if node is not None else ())]
    if node is not None and (logits or not all(len(pair) == 2 and not any(map(_unclear, pair)) for pair in pairs)):
        if not (logits and _is_head(node.plain())):
            reason = "write distillation.layers as pairs of module names"
            fields.refuse("targets", "logits are those of the model's output" if logits else reason)
    elif pairs:
        settings["layers"] = pairs
    plan.teaching.append(Teaching(Origin.of(fields, "start"), start_of(fields), end_of(fields), settings))


def _unclear(text: str) -> bool:
    return text.startswith(("re:", "__"))


def _is_head(said: object) -> bool:
    """Whether targets speak of the output layer."""
    return all(text in ("re:lm_head", "lm_head", "logits", "__OUTPUT__") for text in _flat(said))


def _flat(said: object) -> list[object]:
    return [part for item in said for part in _flat(item)] if isinstance(said, list) else [said]
