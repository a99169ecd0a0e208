"""Neural Compressor's and Optimum-Intel's files: YAML of 1.x and 2.x, config objects, ``inc_config.json``."""

from __future__ import annotations

from graphprune.importing.document import Node
from graphprune.importing.draft import Options, RecipeDraft, StageDraft, Step
from graphprune.importing.fields import Fields, Ledger
from graphprune.importing.inc_config import import_inc_config, looks_like_inc_config
from graphprune.importing.inc_distillation import DEFAULT, criterion_settings
from graphprune.importing.inc_legacy import legacy_steps
from graphprune.importing.inc_pruning import KNOWN, pruning_steps
from graphprune.importing.inc_quantization import mixed_steps, object_plan, yaml_plan
from graphprune.importing.quantity import Quantity

_SECTIONS = ("pruning", "quantization", "distillation")
_TUNING = "graphprune tune quantizes as far as a metric allows: --relative, --absolute, --max-trials, --max-seconds"


def looks_like_inc(root: Node) -> bool:
    """Whether a document has sections or keys of Neural Compressor's configurations."""
    if any(name in root.mapping and root.mapping[name].mapping for name in _SECTIONS) or looks_like_inc_config(root):
        return True
    keys = {*root.mapping} | {key for item in root.items for key in item.mapping}
    return bool(keys & KNOWN - {"names", "pattern", "parameters", "backend"})


def import_inc(root: Node, ledger: Ledger) -> RecipeDraft:
    """Turn a YAML or JSON file into a draft; lists what has no place in it."""
    if looks_like_inc_config(root):
        return RecipeDraft(stages=[import_inc_config(root, ledger)])
    if root.items or not any(name in root.mapping for name in _SECTIONS):
        node = Node(root.line, {"pruning_configs": root}) if root.items else root
        return RecipeDraft(stages=[StageDraft("main", pruning_steps(node, "", ledger))])
    fields = Fields(root, "", ledger)
    stage = StageDraft("main")
    after: list[Step] = []
    pruning = fields.take("pruning")
    if pruning is not None:
        _pruning(Fields(pruning, "pruning", ledger), stage, ledger)
    distillation = fields.take("distillation")
    if distillation is not None:
        _distillation(Fields(distillation, "distillation", ledger), stage, ledger)
    quantization = fields.take("quantization")
    if quantization is not None:
        after = yaml_plan(quantization, "quantization", ledger).steps()
    _surroundings(fields, stage)
    fields.close()
    return RecipeDraft(stages=_joined(stage, after))


def import_objects(nodes: tuple[Node, ...], ledger: Ledger) -> RecipeDraft:
    """Turn config objects, in the order of their making, into a draft."""
    stage = StageDraft("main")
    after: list[Step] = []
    for node in nodes:
        if node.tag == "WeightPruningConfig":
            stage.steps += pruning_steps(Node(node.line, node.value), node.tag, ledger)
        elif node.tag == "DistillationConfig":
            stage.distillation = {**(stage.distillation or {}), **_teaching(node, ledger)}
        elif node.tag == "MixedPrecisionConfig":
            after += mixed_steps(node, node.tag, ledger)
        else:
            after += object_plan(node, node.tag, ledger).steps()
    return RecipeDraft(stages=_joined(stage, after))


def _joined(stage: StageDraft, after: list[Step]) -> list[StageDraft]:
    """Quantization while training goes with the rest; after training it is a stage of its own, which keeps the zeros."""
    names = {step.name for step in after}
    trains = bool(stage.steps or {*stage.training} - {"seed"} or stage.distillation)
    if trains and names & {"freeze-quant", "dynamic-quant", "cast-mixed"}:
        keep = [Step("lock-masks")] if any(step.name in ("insert-masks", "lock-masks") for step in stage.steps) else []
        stage.name = "train"
        return [stage, StageDraft("quantize", [*keep, *after])]
    stage.steps += after
    return [stage]


def _pruning(fields: Fields, stage: StageDraft, ledger: Ledger) -> None:
    approach = fields.take("approach")
    if approach is not None:
        inner = Fields(approach, fields.at("approach"), ledger)
        first, second = (
            inner.take("weight_compression"),
            inner.take("weight_compression_v2", "weight_compression_pytorch"),
        )
        if first is not None:
            stage.steps += legacy_steps(first, inner.at("weight_compression"), ledger)
        if second is not None:
            stage.steps += pruning_steps(second, inner.at("weight_compression_v2"), ledger)
        inner.close()
    train = fields.take("train")
    if train is not None:
        _train(Fields(train, fields.at("train"), ledger), stage.training)
    fields.close()


def _distillation(fields: Fields, stage: StageDraft, ledger: Ledger) -> None:
    train = fields.take("train")
    if train is not None:
        inner = Fields(train, fields.at("train"), ledger)
        criterion = inner.take("criterion")
        _train(inner, stage.training)
        stage.distillation = (
            dict(DEFAULT) if criterion is None else criterion_settings(criterion, inner.at("criterion"), ledger)
        )
    if stage.distillation is None:
        stage.distillation = dict(DEFAULT)
    fields.close()


def _train(fields: Fields, training: Options) -> None:
    """Length, batch size and optimizer of a section ``train``."""
    end = fields.number("end_epoch", "epoch")
    start = fields.number("start_epoch") or Quantity(0)
    if end is not None and end.value > start.value:
        training["num_train_epochs"] = (end - start).plain()
    loader = fields.take("dataloader")
    if loader is not None:
        inner = Fields(loader, fields.at("dataloader"), fields.ledger)
        batch = inner.number("batch_size")
        if batch is not None:
            training["per_device_train_batch_size"] = batch.plain()
        inner.drop("the training tool reads its own data", "dataset", "num_workers", "shuffle")
        inner.close()
    optimizer = fields.take("optimizer")
    for name, item in (optimizer.mapping if optimizer is not None else {}).items():
        inner = Fields(item, f"{fields.at('optimizer')}.{name}", fields.ledger)
        for theirs, mine in (
            ("learning_rate", "learning_rate"),
            ("lr", "learning_rate"),
            ("weight_decay", "weight_decay"),
        ):
            found = inner.number(theirs)
            if found is not None:
                training[mine] = found.plain()
        kind = {"SGD": "sgd", "Adam": "adamw_torch", "AdamW": "adamw_torch"}.get(name)
        if kind is None:
            fields.ledger.add(item.line, inner.path, "no optimizer of this name; adamw_torch is the default")
        elif kind != "adamw_torch":
            training["optim"] = kind
        inner.drop(
            "transformers' sgd has none: pass your own optimizer to a session",
            "momentum",
            "nesterov",
            unless=(None, 0, False),
        )
        inner.close()
    for name in ("criterion", "iteration", "frequency", "execution_mode", "postprocess", "hostfile"):
        if fields.unread(name):
            fields.refuse(name, "the model's own loss and the training tool's loop take its place")
    fields.close()


def _teaching(node: Node, ledger: Ledger) -> Options:
    fields = Fields(Node(node.line, node.value), node.tag, ledger)
    teacher = fields.take("teacher_model")
    settings: Options = {}
    if teacher is not None and not teacher.tag and isinstance(teacher.value, str):
        settings["teacher"] = teacher.value
    elif teacher is not None:
        fields.refuse("teacher_model", "a model in memory; name it on the command line: --teacher_model_name_or_path")
    criterion = fields.take("criterion")
    if criterion is not None:
        settings |= criterion_settings(criterion, fields.at("criterion"), ledger)
    else:
        settings |= DEFAULT
    if fields.take("optimizer") is not None:
        fields.refuse("optimizer", "nobody read it in hooks either; give training.learning_rate and optim")
    fields.close()
    return settings


def _surroundings(fields: Fields, stage: StageDraft) -> None:
    """What a file says beside its three sections."""
    model = fields.take("model")
    if model is not None:
        inner = Fields(model, "model", fields.ledger)
        inner.describe("the source is for", "name", "framework")
        inner.drop("names of the model stay", "inputs", "outputs", unless=(None, []))
        inner.close()
    fields.describe("the source's", "version", "device")
    tuning = fields.take("tuning")
    if tuning is not None:
        inner = Fields(tuning, "tuning", fields.ledger)
        seed = inner.number("random_seed")
        if seed is not None:
            stage.training["seed"] = seed.plain()
        for name in (
            "accuracy_criterion",
            "exit_policy",
            "strategy",
            "objective",
            "multi_objectives",
            "workspace",
            "tensorboard",
        ):
            if inner.take(name) is not None:
                inner.refuse(name, _TUNING)
        inner.close()
    if fields.take("evaluation") is not None:
        fields.refuse("evaluation", "metrics are those of the training tool: graphprune train qa, glue or ner")
