"""Optimum-Intel's ``inc_config.json``, which tells what was done to a model: reading it as a recipe, and writing one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import RecipeError
from graphprune.importing.document import Node
from graphprune.importing.draft import Options, StageDraft, Step
from graphprune.importing.fields import Fields, Ledger
from graphprune.importing.inc_pruning import pruning_steps
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe import Recipe

_VERSIONS = ("neural_compressor_version", "optimum_version", "torch_version", "transformers_version")


def looks_like_inc_config(root: Node) -> bool:
    """Whether a document is such a record."""
    keys = {*root.mapping}
    quantization = root.mapping.get("quantization")
    return bool(keys & {*_VERSIONS, "save_onnx_model"}) or (
        quantization is not None and "is_static" in quantization.mapping
    )


def import_inc_config(root: Node, ledger: Ledger) -> StageDraft:
    """The recipe that does the same; what was measured is a note."""
    fields = Fields(root, "", ledger)
    stage = StageDraft("main")
    pruning = fields.take("pruning")
    if pruning is not None:
        stage.steps += _pruning(pruning, ledger)
    quantization = fields.take("quantization")
    if quantization is not None:
        stage.steps += _quantization(Fields(quantization, "quantization", ledger), trained=pruning is not None)
    distillation = fields.take("distillation")
    if distillation is not None:
        inner = Fields(distillation, "distillation", ledger)
        teacher, temperature = inner.text("teacher_model_name_or_path", "teacher"), inner.number("temperature")
        stage.distillation = {
            **({"teacher": teacher} if teacher else {}),
            "temperature": temperature.value if temperature else 1.0,
        }
        inner.close()
    if fields.flag("save_onnx_model"):
        fields.refuse("save_onnx_model", "add target: onnx, or export with graphprune export --target onnx")
    fields.describe("it was written by", *_VERSIONS, "framework", "backend")
    fields.close()
    return stage


def _pruning(node: Node, ledger: Ledger) -> list[Step]:
    given = dict(node.mapping)
    measured = given.pop("sparsity", None)
    values: dict[str, Node] = {}
    for theirs, mine in (("approach", "pruning_type"), ("pattern", "pattern"), ("target_sparsity", "target_sparsity")):
        if theirs in given:
            values[mine] = given.pop(theirs)
    percent = measured.value if measured is not None else None
    if isinstance(percent, (int, float)) and "target_sparsity" not in values and measured is not None:
        fraction = percent / 100 if percent > 1 else percent
        ledger.note(
            f"sparsity {percent} was measured over all matrices, embeddings too; it is the target of the pruned layers here"
        )
        if fraction:
            values["target_sparsity"] = Node(measured.line, round(float(fraction), 6))
        else:
            ledger.add(
                measured.line,
                "pruning.sparsity",
                "nothing was pruned; Neural Compressor's default target 0.9 was taken",
            )
    return pruning_steps(Node(node.line, {**values, **given}), "pruning", ledger)


def _quantization(fields: Fields, *, trained: bool) -> list[Step]:
    static, samples = fields.flag("is_static"), fields.number("dataset_num_samples")
    if samples is not None:
        fields.refuse(
            "dataset_num_samples", f"give it where the recipe is run: --num_calibration_samples {samples.value}"
        )
    fields.close()
    if static is False:
        return [Step("dynamic-quant")]
    if trained:
        return [Step("insert-fake-quant")]
    return [
        Step(name) for name in ("annotate-quant", "insert-observers", "calibrate", "insert-fake-quant", "freeze-quant")
    ]


def write_inc_config(
    recipe: Recipe, path: Path, *, stage: str | None = None, sparsity: float | None = None, teacher: str | None = None
) -> None:
    """Write what a recipe did as Optimum-Intel recorded it.

    Args:
        recipe: What was done.
        path: The file; an existing one is replaced.
        stage: The stage that was the last; by default the recipe's last.
        sparsity: Fraction of zeros that was measured over all matrices, if it was.
        teacher: Who taught, where the recipe does not say.

    Raises:
        RecipeError: The stage has neither masks nor quantization nor distillation, so that there is nothing to record.
    """
    from graphprune.artifact.files import written

    chosen = recipe.stages[-1] if stage is None else recipe.stage(stage)
    data: dict[str, Any] = {}
    names = {step.name: step for step in chosen.passes}
    if "dynamic-quant" in names or "insert-fake-quant" in names:
        data["quantization"] = {"is_static": "dynamic-quant" not in names, "dataset_num_samples": None}
    masks = names.get("insert-masks") or names.get("lock-masks")
    if masks is not None:
        data["pruning"] = _recorded(masks, sparsity)
    if chosen.distillation is not None:
        data["distillation"] = {
            "teacher_model_name_or_path": _teacher(chosen.distillation.teacher) or teacher,
            "temperature": chosen.distillation.temperature,
        }
    if not data:
        raise RecipeError(
            f"stage {chosen.name} neither prunes nor quantizes nor distills: inc_config.json would be empty"
        )
    data["save_onnx_model"] = recipe.target is not None and recipe.target.name == "onnx"
    with written(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _recorded(masks: Pass, sparsity: float | None) -> Options:
    options: Mapping[str, Any] = vars(masks)
    if masks.name == "lock-masks":
        found: Options = {"approach": "pattern_lock", "pattern": _theirs(str(options["pattern"]))}
        return found if sparsity is None else {**found, "sparsity": round(100 * sparsity, 4)}
    name = str(options["criterion"]).partition("(")[0]
    progressive = "_progressive" if options["progressive"] else ""
    return {
        "approach": f"{name}{progressive}",
        "pattern": _theirs(str(options["pattern"])),
        "sparsity": round(100 * (options["sparsity"] if sparsity is None else sparsity), 4),
    }


def _theirs(pattern: str) -> str:
    """A pattern in Neural Compressor's words: N:M counts the pruned."""
    kept, colon, group = pattern.partition(":")
    if colon:
        return f"{int(group) - int(kept)}:{group}"
    return {"unstructured": "1x1", "head": "mha"}.get(pattern, pattern)


def _teacher(teacher: str | tuple[str, ...] | None) -> str | None:
    return teacher if isinstance(teacher, str) or teacher is None else ", ".join(teacher)
