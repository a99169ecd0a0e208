"""Names of classes: found in data, checked between splits, and put into the order that a fine-tuned model has."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphprune.errors import GraphPruneError

_log = logging.getLogger(__name__)
_DEFAULT_NAME = re.compile(r"LABEL_\d+")


def model_labels(config: Any) -> tuple[str, ...]:
    """Label names of a model's configuration by index; empty where it has none, or only ``LABEL_0``, ``LABEL_1``, ..."""
    names: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(_DEFAULT_NAME.fullmatch(name) for name in ordered) else ordered


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Different names in a fixed order: by value where all are whole numbers, else by text."""
    different = set(names)
    if all(re.fullmatch(r"-?\d+", name) for name in different):
        return tuple(sorted(different, key=int))
    return tuple(sorted(different))


def match_labels(names: Sequence[str], config: Any, *, training: bool) -> dict[str, int]:
    """Give each label of the data the index that the model knows it under.

    A model whose labels hold all names of the data (whatever their case) keeps its own order; so does one with as many
    labels as the data where the data's are ``0``, ``1``, ... in order. A model with unnamed labels, or with others, gets the
    data's order.

    Args:
        names: Labels of the data, in the order that the data gives them.
        config: The model's configuration, or None.
        training: Whether there is training data, from which a model with other labels learns these.

    Returns:
        Index by name of the data; several names may share none. Order of the keys is that of ``names``.

    Raises:
        GraphPruneError: The model's labels are others and nothing trains it.
    """
    own = model_labels(config)
    by_name = {name.casefold(): index for index, name in enumerate(own)}
    plain = {name: index for index, name in enumerate(names)}
    if not own:
        return plain
    if all(name.casefold() in by_name for name in names):
        return {name: by_name[name.casefold()] for name in names}
    if len(own) == len(names) and list(names) == [str(index) for index in range(len(names))]:
        return plain
    if not training:
        raise GraphPruneError(
            f"the model's labels are {', '.join(own)} and the data's are {', '.join(names)}; evaluate it on data with its "
            f"labels, or train it on this data first"
        )
    _log.warning("the model's labels (%s) are replaced by the data's (%s)", ", ".join(own), ", ".join(names))
    return plain


def label_names(indices: Mapping[str, int], config: Any) -> tuple[str, ...]:
    """Names by index, as the model's configuration spells them where it was matched.

    Args:
        indices: What :func:`match_labels` returned.
        config: The configuration that was matched, or None.
    """
    own = model_labels(config)
    if own and all(index < len(own) for index in indices.values()):
        named = {name.casefold(): index for name, index in indices.items()}
        matched = all(own[index].casefold() == name for name, index in named.items())
        numbered = len(own) == len(indices) and list(indices) == [str(index) for index in indices.values()]
        if matched or numbered:
            return own
    return tuple(sorted(indices, key=indices.__getitem__))
