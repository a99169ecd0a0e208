"""Which tensor of a checkpoint is which parameter of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

_OLD_NAMES = ((".weight", ".gamma"), (".bias", ".beta"))
"""How old checkpoints call the parameters of a normalization."""


def match_names(model: nn.Module, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the tensors of a checkpoint for every parameter and buffer of a model.

    Names are the same, or differ by the name of the base model in front, or as transformers renames them when it loads that kind of
    model. Tensors that it would fuse, split or transpose are left out.

    Args:
        model: A Hugging Face model, with or without weights.
        keys: Names in the checkpoint.

    Returns:
        For the first name of each parameter and buffer the tensors that are stored for it under any of its names: none where the
        checkpoint lacks it, several where a tied weight is stored several times.
    """
    known = dict.fromkeys(keys)
    renamed = _renamed(model, known)
    prefix = str(getattr(model, "base_model_prefix", ""))
    return {name: _stored(names, known, renamed, prefix) for name, names in _aliases(model).items()}


def _renamed(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Names in the model, to names in the checkpoint, by the rules that transformers loads with."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before version 5 there were no such rules
        return {}
    rules: list[Any] = get_model_conversion_mapping(cast(Any, model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    found: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters)
        if converted is None:
            found.setdefault(name, key)
    return found


def _stored(names: list[str], keys: Mapping[str, None], renamed: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        forms = [name]
        if prefix:
            forms.append(name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")
        forms += [renamed[form] for form in list(forms) if form in renamed]
        for form in list(forms):
            forms += [form.removesuffix(new) + old for new, old in _OLD_NAMES if form.endswith(new)]
        found += [form for form in forms if form in keys][:1]
    return tuple(dict.fromkeys(found))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter and buffer, to all of its names."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(first.setdefault(id(value), name), []).append(name)
    return names
