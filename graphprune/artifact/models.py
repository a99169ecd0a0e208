"""Find the model that a text names: a Python factory, a folder, a bare config file, or a Hugging Face hub id."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.artifact.checkpoint import load_program
from graphprune.artifact.files import MANIFEST, PROGRAM
from graphprune.errors import GraphPruneError, suggest
from graphprune.ir.program import Program

_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_CHECKPOINT = ("model.safetensors", "model.safetensors.index.json")
"""What an artifact has that is a Hugging Face checkpoint too, of the target torch."""
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model that was named by text.

    Attributes:
        model: The module, in eval mode, float32; on the meta device where there are no weights. Or a saved Program.
        factory: ``package.module:function`` where that is what the text is, for ``trace``.
        notes: What the caller should tell the user, such as that there are no weights.
    """

    model: nn.Module | Program
    factory: str | None = None
    notes: tuple[str, ...] = ()


def load_model(text: str) -> LoadedModel:
    """Find and build the model that a text names.

    Args:
        text: One of
            ``package.module:factory``, a callable without arguments that returns an ``nn.Module`` (the current
            directory is searched too); a folder that ``graphprune.save`` wrote; a folder with a Hugging Face
            ``config.json``, with weights or without; the path of a config ``.json``; a Hugging Face hub id.

    Returns:
        The model. Without weights it is built on the meta device, and ``notes`` says so.

    Raises:
        GraphPruneError: The text names nothing, or what it names cannot be built; says what was tried.
    """
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix != ".json":
            raise GraphPruneError(f"{text} is a file but no .json config; give the folder that it lies in")
        return _without_weights(path)
    if _FACTORY.fullmatch(text):
        return _from_factory(text)
    if path.suffix == ".json" or path.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.fullmatch(text):
        raise GraphPruneError(
            f"no such model: {text} is no file or folder here; give package.module:factory, a folder with config.json, "
            f"a config .json, or a Hugging Face hub id"
        )
    return _from_hub(text)


def search_current_directory() -> str:
    """Let imports find modules in the current directory, as ``python -m`` does; returns that directory."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return here


def find_object(text: str) -> Any:
    """Import what ``package.module:name`` names; the current directory is searched too.

    Raises:
        GraphPruneError: There is no such module or name (with close matches), or importing the module failed.
    """
    module_name, _, name = text.partition(":")
    here = search_current_directory()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        found = "" if f"{module_name}.".startswith(f"{missing}.") else f" ({module_name} imports it)"
        raise GraphPruneError(
            f"{text}: no module named {missing!r}{found}; searched the installed packages and {here}"
        ) from error
    except Exception as error:  # a user's module may raise anything when it is imported
        raise GraphPruneError(f"{text}: importing {module_name} failed with {type(error).__name__}: {error}") from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            own = [key for key, item in vars(value).items() if getattr(item, "__module__", "") == module_name]
            known = [key for key in own if callable(getattr(value, key)) and not key.startswith("_")]
            raise GraphPruneError(f"{text}: {module_name} has no {part!r}{suggest(part, known)}")
        value = getattr(value, part)
    return value


def find_function(text: str, purpose: str) -> Callable[..., Any]:
    """Import the function that ``package.module:function`` names.

    Args:
        text: The text.
        purpose: What the function must do, for messages, such as ``takes a Program and returns a number``.

    Raises:
        GraphPruneError: The text is malformed, or names nothing or no function.
    """
    if not _FACTORY.fullmatch(text):
        raise GraphPruneError(f"{text} is not of the form package.module:function")
    value = find_object(text)
    if not callable(value) or isinstance(value, (nn.Module, type)):
        raise GraphPruneError(f"{text} is a {type(value).__name__}, not a function that {purpose}")
    function: Callable[..., Any] = value
    return function


def _from_factory(text: str) -> LoadedModel:
    factory = find_object(text)
    name = text.partition(":")[2]
    if isinstance(factory, nn.Module):
        raise GraphPruneError(f"{text} is a model, not a function; write one: def build(): return {name}")
    if not callable(factory):
        raise GraphPruneError(f"{text} is a {type(factory).__name__}, not a function that returns an nn.Module")
    try:
        model = factory()
    except Exception as error:  # a user's factory may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise GraphPruneError(f"{text}() failed with {reason}; it is called without arguments") from error
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"{text}() returned a {type(model).__name__}, not an nn.Module")
    return LoadedModel(model, None if isinstance(model, Program) else text)


def _from_folder(folder: Path) -> LoadedModel:
    if (folder / PROGRAM).is_file():
        search_current_directory()  # the saved Program may name a factory there
        return LoadedModel(load_program(folder))
    if (folder / MANIFEST).is_file() and not any((folder / name).is_file() for name in _CHECKPOINT):
        raise GraphPruneError(f"{folder} is an exported artifact and cannot be traced; see graphprune verify")
    if not (folder / _CONFIG).is_file():
        raise GraphPruneError(f"{folder} has no {_CONFIG} (a Hugging Face model) and no {PROGRAM} (a saved Program)")
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return _without_weights(folder / _CONFIG)
    try:
        return _with_weights(str(folder), str(folder / _CONFIG))
    except OSError as error:
        raise GraphPruneError(f"{folder}: the weights cannot be loaded: {_first_line(error)}") from error


def _from_hub(name: str) -> LoadedModel:
    try:
        return _with_weights(name, name)
    except OSError as error:
        hint = "; a factory is written package.module:factory" if "." in name and "/" not in name else ""
        raise GraphPruneError(
            f"no such model: {name!r} is neither a local folder nor a model that the Hugging Face hub gives "
            f"({_first_line(error)}); check the spelling, the network and HF_HUB_OFFLINE{hint}"
        ) from error


def _without_weights(config_path: Path) -> LoadedModel:
    try:
        config = read_config(str(config_path), str(config_path))
    except OSError as error:
        raise GraphPruneError(f"{config_path} cannot be read: {_first_line(error)}") from error
    kind, notes = class_of(config)
    try:
        with torch.device("meta"):
            model = kind(config) if kind.__name__ != "AutoModel" else kind.from_config(config)
    except Exception as error:  # a model class raises whatever its code runs into with a config that makes no sense
        raise GraphPruneError(f"{config_path}: {kind.__name__} cannot be built: {_first_line(error)}") from error
    return LoadedModel(model.eval(), notes=(*notes, "no weights: meta device, so there is no sparsity to measure"))


def _with_weights(name: str, where: str) -> LoadedModel:
    config = read_config(name, where)
    kind, notes = class_of(config)
    try:
        model, info = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except OSError:
        raise
    except Exception as error:  # damaged or misfitting weights make the loader fail in any way
        raise GraphPruneError(f"{where}: the weights cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes = (*notes, f"{len(missing)} weights are not in the checkpoint and have random values: {listed}")
    return LoadedModel(model.eval(), notes=notes)


def read_config(name: str, where: str) -> Any:
    """Read a Hugging Face config.

    Args:
        name: Folder, path of a config file, or hub id.
        where: How messages call it; where it is a file, its form is checked first.

    Raises:
        GraphPruneError: It is no config that transformers knows.
        OSError: It is not there.
    """
    from transformers import AutoConfig

    _check_json(Path(where))
    try:
        return AutoConfig.from_pretrained(name)
    except OSError:
        raise
    except Exception as error:  # transformers raises several kinds for a config that it does not know
        raise GraphPruneError(f"{where} is no config that transformers knows: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _check_json(path: Path) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GraphPruneError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise GraphPruneError(f"{path} is no Hugging Face config: it has no model_type")


def class_of(config: Any) -> tuple[Any, tuple[str, ...]]:
    """The class that the config asks for, and a note where it asks for none that transformers has."""
    import transformers

    wanted = (getattr(config, "architectures", None) or [None])[0]
    if wanted is None:
        return transformers.AutoModel, ("the config names no architecture, so the bare model is used (AutoModel)",)
    kind = getattr(transformers, wanted, None)
    if kind is None:
        return transformers.AutoModel, (f"transformers has no {wanted}, so the bare model is used (AutoModel)",)
    return kind, ()
