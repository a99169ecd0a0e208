"""SparseML recipes, of both generations, as recipes of graphprune."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.errors import suggest
from graphprune.importing import sparseml_pruning as pruning
from graphprune.importing import sparseml_quant as quant
from graphprune.importing import sparseml_training as training
from graphprune.importing.document import Node
from graphprune.importing.draft import RecipeDraft
from graphprune.importing.fields import Fields, Ledger
from graphprune.importing.sparseml_plan import Plan
from graphprune.importing.sparseml_source import SourceStage, read_stages
from graphprune.importing.sparseml_stages import stages_of

_READERS: dict[str, Callable[[Fields, Plan], None]] = {
    "EpochRangeModifier": training.epoch_range,
    "SetLearningRateModifier": training.set_rate,
    "LearningRateFunctionModifier": training.rate_function,
    "LearningRateModifier": training.rate_class,
    "SetWeightDecayModifier": training.weight_decay,
    "DistillationModifier": training.distillation,
    "PerLayerDistillationModifier": training.layer_distillation,
    "OutputDistillationModifier": training.output_distillation,
    "ConstantPruningModifier": pruning.constant,
    "GMPruningModifier": pruning.magnitude,
    "MagnitudePruningModifier": pruning.magnitude,
    "GlobalMagnitudePruningModifier": pruning.magnitude,
    "MovementPruningModifier": pruning.movement,
    "OBSPruningModifier": pruning.obs,
    "ACDCPruningModifier": pruning.acdc,
    "TopKASTPruningModifier": pruning.top_kast,
    "RigLPruningModifier": pruning.rigl,
    "StructuredPruningModifier": pruning.structured,
    "SparseGPTModifier": pruning.second_order,
    "WandaPruningModifier": pruning.second_order,
    "QuantizationModifier": quant.quantization,
    "GPTQModifier": quant.quantization,
    "SmoothQuantModifier": quant.smooth_quant,
}
WITHOUT: dict[str, str] = {
    "MFACPruningModifier": "M-FAC has no equivalent; insert-masks with criterion=obs ranks by second-order information too",
    "LayerThinningModifier": "weights keep their shape while training; nothing is removed physically by a recipe",
    "LayerPruningModifier": "whole layers are not replaced by identities; load a model that has fewer",
    "PowerpropagationModifier": "weights are not reparametrized",
    "ASRegModifier": "activations are not regularized",
    "TrainableParamsModifier": "all parameters train; freeze some in your own loop (requires_grad)",
    "SetParamModifier": "attributes of modules are set in the model's config or code",
    "GradualParamModifier": "attributes of modules are set in the model's config or code",
    "SparsificationLoggingModifier": "sparsity is logged by the training tool's report_to",
    "LogarithmicEqualizationModifier": "it has no equivalent; smooth-quant moves outliers of activations, equalize evens out weights",
}
"""Modifiers that have no equivalent, and what to do instead."""
_ONE_SHOT = ("SparseGPTModifier", "WandaPruningModifier", "GPTQModifier", "SmoothQuantModifier")
_TRAINS = ("EpochRangeModifier", "SetLearningRateModifier", "LearningRateFunctionModifier", "LearningRateModifier")
_ORDER = ("index", "group", "args", "log_types")


def import_sparseml(root: Node, ledger: Ledger) -> RecipeDraft:
    """Turn a SparseML recipe into a draft; lists what has no place in it."""
    variables, stages = read_stages(root, ledger)
    draft = RecipeDraft(dict(variables))
    for stage in stages:
        draft.stages += stages_of(_plan(stage, ledger), stage.name, ledger)
    return draft


def _plan(stage: SourceStage, ledger: Ledger) -> Plan:
    names = {modifier.name for modifier in stage.modifiers}
    plan = Plan(one_shot=stage.one_shot or bool(names & {*_ONE_SHOT} and not names & {*_TRAINS}))
    for modifier in stage.modifiers:
        fields = Fields(modifier.node, modifier.path, ledger, stage.scope)
        reader = _READERS.get(modifier.name)
        if reader is None:
            known = suggest(modifier.name, [*_READERS, *WITHOUT])
            hint = known if known.startswith("; did you mean") else ""
            reason = WITHOUT.get(modifier.name, f"no modifier of this name is known{hint}; nothing was made of it")
            ledger.add(modifier.node.line, modifier.path, reason)
            continue
        for name in _ORDER:
            if name in fields:
                fields.take(name)
                ledger.note(f"{name} of a modifier has no effect here: passes run in a fixed order")
        reader(fields, plan)
        fields.close()
    return plan
