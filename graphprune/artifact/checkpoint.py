"""Save a Program and load it again, without pickle: weights as safetensors, structure as the recipe that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from graphprune.artifact.companions import config_text, copy_companions, remember_folder
from graphprune.artifact.files import PROGRAM, written_folder
from graphprune.artifact.training_file import read_training, write_training
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.ir.interface import Fill
from graphprune.ir.masking import check_patterns
from graphprune.ir.program import Program
from graphprune.ir.source import Source
from graphprune.ir.source_model import build_source, resolve
from graphprune.ir.trace import trace
from graphprune.ir.training_log import TrainingLog
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe

_FORMAT = 1
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def save_program(program: Program, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a Program to a folder: ``program.json``, ``model.safetensors`` and, where there is one, ``config.json``.

    Tokenizer and image processor of the model's own folder are copied too.

    What sessions logged of its training is in ``training.jsonl``.

    Args:
        program: Any Program.
        folder: Replaced as a whole where graphprune wrote it.
        overwrite: Replace a folder with other content too.

    Returns:
        The folder.

    Raises:
        GraphPruneError: The folder cannot be written.
    """
    record = {
        "format": _FORMAT,
        "transformers": version("transformers"),
        "source": asdict(program.source),
        "fills": {item.name: asdict(item.fill) for item in program.interface.inputs if item.fill is not None},
        "dynamic": {
            item.name: [dim for dim, size in enumerate(item.shape) if isinstance(size, str)]
            for item in program.interface.inputs
        },
        "passes": list(program.history),
        "training": program.training,
        "frozen": sorted(program.frozen),
    }
    config = getattr(program, "config", None)
    if config is not None:
        record["config_class"] = f"{type(config).__module__}:{type(config).__qualname__}"
        record["attention"] = getattr(config, "_attn_implementation", None)
    with written_folder(folder, overwrite=overwrite) as temporary:
        (temporary / PROGRAM).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in program.state_dict().items()}
        safetensors.torch.save_file(state, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_training(temporary, program.training_log)
        if config is not None:
            (temporary / _CONFIG).write_text(config_text(config, whole=True), encoding="utf-8")
        copy_companions(program, temporary)
    return Path(folder)


def load_program(folder: Path | str, model: nn.Module | None = None) -> Program:
    """Load a saved Program: build its source, trace it, replay its passes, load its weights.

    Args:
        folder: Where ``save_program`` wrote.
        model: A module like the source, for sources that have neither a Hugging Face config nor a factory.

    Returns:
        The Program, in the mode it was saved in.

    Raises:
        GraphPruneError: The folder is no saved Program or is damaged, or its source cannot be built.
    """
    folder = Path(folder)
    record = _read(folder)
    source = Source(**record["source"])
    built = model if model is not None else _build(folder, record, source)
    inputs = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in source.trace["inputs"].items()  # type: ignore[attr-defined]
    }
    shapes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in record["dynamic"].items()}
    constants: Mapping[str, Any] = source.trace["constants"]  # type: ignore[assignment]
    program = trace(built, inputs, shapes, factory=source.factory, check=False, **constants)
    fills = {name: Fill(**entry) for name, entry in record["fills"].items()}
    inputs_with_fills = tuple(replace(item, fill=fills.get(item.name)) for item in program.interface.inputs)
    program.interface = replace(program.interface, inputs=inputs_with_fills)
    program.source = source
    program.recompile()
    kept = _unsaved_buffers(program)
    ties = _ties(program)
    program = program.to("meta")
    program = PassManager(Recipe.of(record["passes"]).passes).run(program, in_place=True).program
    _load_weights(program, folder / _WEIGHTS, record.get("transformers"))
    for name, tensor in kept.items():
        owner, _, leaf = name.rpartition(".")
        program.get_submodule(owner).register_buffer(leaf, tensor, persistent=False)
    for name, first in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(program.get_submodule(owner), leaf, program.get_parameter(first))
    program.frozen = frozenset(record.get("frozen", ()))
    program.training_log = TrainingLog(read_training(folder))
    program.train(bool(record["training"]))
    check_patterns(program)
    return program


def _read(folder: Path) -> dict[str, Any]:
    path = folder / PROGRAM
    if not path.is_file():
        raise GraphPruneError(f"{folder} is no saved Program: it has no {PROGRAM}; graphprune.save writes one")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise GraphPruneError(f"{path} has format {record.get('format')!r}, this version reads {_FORMAT}")
    return record


def _build(folder: Path, record: Mapping[str, Any], source: Source) -> nn.Module:
    config = None
    if "config_class" in record and source.factory is None:
        config = resolve(record["config_class"]).from_dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        remember_folder(config, folder)
        if record.get("attention"):
            config._attn_implementation = record["attention"]
    return build_source(source, config)


def _unsaved_buffers(program: Program) -> dict[str, torch.Tensor]:
    saved = set(program.state_dict())
    return {name: value for name, value in program.named_buffers() if name not in saved}


def _ties(program: Program) -> dict[str, str]:
    first: dict[int, str] = {}
    ties = {}
    for name, value in program.named_parameters(remove_duplicate=False):
        if first.setdefault(id(value), name) != name:
            ties[name] = first[id(value)]
    return ties


def _load_weights(program: Program, path: Path, saved_by: str | None) -> None:
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise GraphPruneError(f"{path} cannot be read: {error}") from error
    expected = program.state_dict()
    odd = sorted(set(state) ^ set(expected))
    if odd:
        here = version("transformers")
        other = (
            ""
            if saved_by in (None, here)
            else f", or transformers {here} names it otherwise than {saved_by}, which saved it"
        )
        raise RecipeError(
            f"{path} does not fit the replayed passes, for example {odd[0]}; the folder is incomplete or edited{other}"
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise RecipeError(
                f"{path}: {name} has shape {tuple(value.shape)}, the Program {tuple(expected[name].shape)}"
            )
    program.load_state_dict(state, assign=True)
