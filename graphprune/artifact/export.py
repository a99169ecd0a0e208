"""Lower a Program to a target, measure what was written, and verify it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.artifact.bisection import bisect
from graphprune.artifact.companions import config_text, copy_companions
from graphprune.artifact.files import sha256, written_folder
from graphprune.artifact.manifest import (
    FORMAT,
    FileEntry,
    InputEntry,
    Manifest,
    Parity,
    SiteEntry,
    checked_metrics,
    versions,
)
from graphprune.artifact.nodes import SIZES, record
from graphprune.artifact.samples import make_inputs, run_program, write_samples
from graphprune.artifact.training_file import write_training
from graphprune.artifact.verification import measure_parity, measure_site, verify, verify_afresh
from graphprune.errors import LoweringError, VerifyError
from graphprune.ir.formats import formats_of
from graphprune.ir.interface import Input
from graphprune.ir.masking import Masking, Pruned, masked_sites
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.sites import find_sites
from graphprune.pipeline.legalize import legalized
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.remote import stored_weights
from graphprune.pipeline.target import Lowered, Support, Target
from graphprune.sparsity.layout import to_logical

_TOLERANCE = {"float": 1e-4, "bf16": 2e-2, "quantized": 5e-2}  # of the outputs' largest value


@dataclass(frozen=True)
class Artifact:
    """A lowered model on disk, and what is said of it."""

    folder: Path
    manifest: Manifest

    def with_metrics(self, metrics: Mapping[str, float]) -> Artifact:
        """Write what you measured of the lowered model into the manifest, in place of metrics of the same names.

        Raises:
            GraphPruneError: A value is no finite number, or the manifest cannot be written.
        """
        manifest = self.manifest.model_copy(update={"metrics": {**self.manifest.metrics, **checked_metrics(metrics)}})
        manifest.write(self.folder)
        return Artifact(self.folder, manifest)


def export(
    program: Program,
    target: str | Target = "onnx",
    out: Path | str = "out",
    *,
    processor: Any | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    per_node: bool | None = None,
    fresh: bool | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Artifact:
    """Lower a Program, measure the lowered file, and verify it.

    Args:
        program: Any Program; it is left as it is.
        target: Name of a target, or a target with its options.
        out: Folder of the artifact, new or empty.
        processor: Tokenizer or image processor to save beside the model (anything with ``save_pretrained``). None copies the one that
            lies in the folder that the model was loaded from.
        tolerance: Largest allowed difference to the Program's outputs, as a fraction of their largest value. Default: 1e-4
            in float; 2e-2 in bfloat16, whose roundings a target may leave out; 5e-2 where activations are quantized, because a
            rounding that falls the other way moves a value by one quantization step. Targets that compute in fewer bits allow
            more.
        overwrite: Replace the folder as a whole where there is one.
        per_node: Record what the Program computes inside for a small sample (one example, eight tokens), in
            ``nodes.safetensors``, for ``verify(..., per_node=True)``. None does so for quantized Programs, where the target
            can tell which value is where.
        fresh: Verify once more in a new process. None does so for targets that say they need it.
        metrics: What you measured of the model, such as ``{"accuracy": 0.871}``, for the manifest; not measured again.

    Returns:
        The artifact.

    Raises:
        LoweringError: The target cannot express the Program, or its libraries are not installed.
        VerifyError: What was written is not what the Program is; nothing is left in ``out``.
        PassError: A legalizing pass refused, for example because training did not reach the target sparsity.
        GraphPruneError: A metric is no finite number, or the folder cannot be written.
    """
    goal = make_target(target) if isinstance(target, str) else target
    lacking = goal.requires & ~program.properties
    if lacking:
        raise LoweringError(f"target {goal.name} requires {lacking}; run the pass that establishes it first")
    stated = checked_metrics(metrics or {})
    legal = legalized(program, goal.legalize)
    _refuse_formats(legal, goal)
    with written_folder(out, overwrite=overwrite, ours=overwrite) as folder:
        lowered = goal.lower(legal, folder)
        dropped = frozenset(legal.interface.names) - frozenset(lowered.inputs)
        if dropped:
            legal.drop_inputs(dropped)
        inputs = make_inputs(legal)
        outputs = [run_program(legal, sample, lowered.outputs) for sample in inputs]
        write_samples(folder, inputs, outputs)
        if per_node or (per_node is None and Property.FAKE_QUANT in legal.properties):
            _record_nodes(folder, legal, goal, lowered, required=bool(per_node))
        _write_companions(folder, legal, processor)
        write_training(folder, program.training_log)
        scale = max(
            float(np.abs(value[np.isfinite(value)]).max(initial=0.0)) for item in outputs for value in item.values()
        )
        quantized = Property.FAKE_QUANT in legal.properties
        kind = "quantized" if quantized else "bf16" if "bf16" in formats_of(legal) else "float"
        tolerance = max(_TOLERANCE[kind], goal.tolerance() or 0.0) if tolerance is None else tolerance
        allowed = tolerance * max(scale, 1e-6)
        parity = measure_parity(goal, folder, allowed, in_steps=kind == "quantized")
        if parity.max_abs > allowed:
            _explain(legal, goal, inputs, parity, scale)
        manifest = Manifest(
            format=FORMAT,
            target=goal.name,
            options=json.loads(json.dumps(vars(goal), default=str)),
            recipe=",".join(legal.history),
            versions=dict(versions()),
            model=program.source.model,
            inputs=[_input_entry(item) for item in legal.interface.inputs],
            outputs=list(lowered.outputs),
            files=[
                FileEntry(name=str(path.relative_to(folder)), bytes=path.stat().st_size, sha256=sha256(path))
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ],
            sites=_measure_sites(legal, goal, folder),
            parity=parity,
            coverage={key: list(names) for key, names in lowered.coverage.items()},
            passes=dict(lowered.passes),
            metrics=stated,
        )
        manifest.write(folder)
        try:
            verify(folder)
            if goal.fresh if fresh is None else fresh:
                verify_afresh(folder)
        except VerifyError as error:
            raise VerifyError(str(error).replace(str(folder), f"the {goal.name} export"), *error.args[1:]) from None
    return Artifact(Path(out), manifest)


def _record_nodes(folder: Path, program: Program, target: Target, lowered: Lowered, *, required: bool) -> None:
    sample = make_inputs(program, sizes=SIZES)[0]
    recording = record(program, target.nodes(folder), sample, run_program(program, sample, lowered.outputs))
    if recording.inner:
        recording.write(folder)
    elif required:
        raise LoweringError(
            f"per_node: nothing that {program.name} computes inside can be found in what target {target.name} wrote; "
            f"export without per_node"
        )


def _refuse_formats(program: Program, target: Target) -> None:
    """Raise LoweringError where the Program has a number format that the target's capability table refuses."""
    table = target.capabilities()
    for row, names in formats_of(program).items():
        if table.get(row) is Support.REFUSED:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            runs = ", ".join(key for key, support in table.items() if support is Support.EXPLOITED)
            raise LoweringError(
                f"target {target.name} cannot run {row}, which {names[0]}{more} is in: its table says {row!r}: refused. It runs "
                f"{runs}; plan another scheme for it, or choose another target (graphprune targets)"
            )


def _measure_sites(program: Program, target: Target, folder: Path) -> list[SiteEntry]:
    sites, _ = find_sites(program)
    stored = stored_weights(target, folder, {site.name: site.layout.value for site in sites})
    masks = {site.name: site.decision for site in masked_sites(program)}
    entries = []
    for site in sites:
        if site.name not in stored:
            raise LoweringError(f"{site.name} cannot be found in the file that target {target.name} wrote")
        node = program.attribute(site.name)
        record = program.annotation(node, Pruned) if node is not None else None
        decision: Masking | Pruned | None = record or masks.get(site.name)
        pruned = (to_logical(program.tensor(site.name).detach(), site.layout) == 0).numpy()
        pattern = decision.pattern if decision is not None else None
        entries.append(measure_site(site, pattern, stored[site.name], pruned))
    return entries


def _explain(
    program: Program, target: Target, inputs: Sequence[Mapping[str, Tensor]], parity: Parity, scale: float
) -> None:
    """Raise VerifyError that names the first operator whose result differs."""
    culprit = bisect(program, target, inputs, parity.tolerance / max(scale, 1e-6)) if target.any_graph else None
    raise VerifyError(
        f"the {target.name} export differs from the Program by {parity.max_abs:.3g} at {parity.worst_node}, which is more than "
        f"{parity.tolerance:.3g}; {culprit or 'no single operator can be named'}. Nothing was written"
    )


def _input_entry(item: Input) -> InputEntry:
    return InputEntry(name=item.name, dtype=str(item.dtype).removeprefix("torch."), shape=list(item.shape))


def _write_companions(folder: Path, program: Program, processor: Any | None) -> None:
    config = getattr(program, "config", None)
    if config is not None and not (folder / "config.json").exists():  # a checkpoint brings its own
        (folder / "config.json").write_text(config_text(config), encoding="utf-8")
    copy_companions(program, folder, processor)
