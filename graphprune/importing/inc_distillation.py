"""Neural Compressor's distillation configurations as ``distillation`` of a recipe."""

from __future__ import annotations

from graphprune.importing.document import Node
from graphprune.importing.draft import Options
from graphprune.importing.fields import Fields, Ledger

_LOSSES = {
    "KnowledgeDistillationLoss": "logits",
    "IntermediateLayersKnowledgeDistillationLoss": "layers",
    "SelfKnowledgeDistillationLoss": "self",
}
DEFAULT: Options = {"temperature": 1.0, "task": 0.5, "logits": 0.5, "loss": "ce"}
"""What a configuration without criterion means."""
_KINDS = {"CE": "ce", "KL": "kl", "MSE": "mse", "L1": "l1", "L2": "mse"}


def criterion_settings(node: Node, path: str, ledger: Ledger) -> Options:
    """The settings of a criterion: one key that names the loss, or a tagged call of its configuration."""
    name = node.tag.removesuffix("Config")
    if name in _LOSSES:
        return _settings(name, Fields(Node(node.line, node.value), path, ledger))
    settings: Options = {}
    for key, item in node.mapping.items():
        if key in _LOSSES:
            settings |= _settings(key, Fields(item, f"{path}.{key}", ledger))
        else:
            ledger.add(item.line, f"{path}.{key}", "no loss of this name is known; nothing was made of it")
    if not node.mapping:
        ledger.add(node.line, path, f"{node.plain()!r} names no loss")
    return settings


def _settings(name: str, fields: Fields) -> Options:
    settings = {"logits": _logits, "layers": _layers, "self": _self}[_LOSSES[name]](fields)
    fields.close()
    return settings


def _logits(fields: Fields) -> Options:
    temperature = fields.number("temperature")
    task, teacher = _weights(fields)
    return {
        "temperature": 1.0 if temperature is None else temperature.value,
        "task": task,
        "logits": teacher,
        "loss": _loss(fields),
    }


def _loss(fields: Fields) -> str:
    """The loss against the teacher; the one against the labels is the model's own."""
    kinds = fields.texts("loss_types") or ("CE", "CE")
    if kinds[0] not in ("CE", "KL"):
        fields.refuse("loss_types", f"the loss against the labels is the model's own, not {kinds[0]}")
    if len(kinds) < 2 or kinds[1] not in ("CE", "KL", "MSE"):
        fields.refuse("loss_types", f"{list(kinds)}: the second one is CE, KL or MSE; CE was taken")
        return "ce"
    return _KINDS[kinds[1]]


def _weights(fields: Fields) -> tuple[float, float]:
    node = fields.take("loss_weights")
    values = [item.value for item in node.items] if node is not None else [0.5, 0.5]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    if len(numbers) == 2 and min(numbers) >= 0:
        return numbers[0], numbers[1]
    fields.refuse(
        "loss_weights", "two numbers belong here, those of the labels and of the teacher; 0.5 and 0.5 were taken"
    )
    return 0.5, 0.5


def _layers(fields: Fields) -> Options:
    node = fields.take("layer_mappings")
    pairs: list[list[str]] = []
    for item in node.items if node is not None else ():
        names = [_layer(part, fields, index) for index, part in enumerate(item.items)]
        pairs.append(names if len(names) == 2 else names * 2)
    kinds = {kind.upper() for kind in fields.texts("loss_types") or ("MSE",)}
    if len(kinds) > 1 or not kinds <= {"MSE", "KL", "L1"}:
        fields.refuse("loss_types", f"{sorted(kinds)}: all layers have one loss, MSE, KL or L1; mse was taken")
    kind = _KINDS[kinds.pop()] if len(kinds) == 1 and kinds <= {"MSE", "KL", "L1"} else "mse"
    weights = fields.take("loss_weights")
    values = {item.value for item in weights.items} if weights is not None else set()
    if len(values) > 1:
        fields.refuse("loss_weights", "all layers have one weight, distillation.hidden")
    total = (
        sum(item.value for item in weights.items if isinstance(item.value, (int, float)))
        if weights is not None
        else 1.0
    )
    task = 1.0 if fields.flag("add_origin_loss") else 0.0
    return {"task": task, "logits": 0.0, "hidden": float(total) or 1.0, "hidden_loss": kind, "layers": pairs}


def _layer(part: Node, fields: Fields, index: int) -> str:
    """A layer's name; what is taken from its output (a key, an index) is listed."""
    if part.items:
        name, *rest = part.items
        said = str(rest[0].plain()) if rest else ""
        if said not in ("", "0"):
            side = "teacher's" if index else "student's"
            fields.ledger.add(
                part.line,
                fields.at("layer_mappings"),
                f"the {side} output {said!r} of {name.value}: the first is taken",
            )
        return str(name.value)
    return str(part.value)


def _self(fields: Fields) -> Options:
    fields.drop(
        "layers of one model are not compared with each other; the teacher is the model as it was", "layer_mappings"
    )
    fields.drop("the loss of logits is kl", "loss_types", "loss_weights")
    temperature = fields.number("temperature")
    task = 1.0 if fields.flag("add_origin_loss") else 0.0
    return {
        "teacher": "self",
        "temperature": 1.0 if temperature is None else temperature.value,
        "task": task,
        "logits": 1.0,
    }
