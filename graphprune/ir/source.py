"""Where a Program came from: its class, and with what that was built and traced."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """Where a Program came from, as data, so that it can be traced again when it is loaded.

    Attributes:
        model: ``package.module:ClassName`` of the source model.
        factory: ``package.module:function`` that builds the source model, where it has no Hugging Face config.
        trace: Options of the trace: constants, and shapes and dtypes of the example inputs.
        options: Arguments that the class takes beside its Hugging Face config.
    """

    model: str
    factory: str | None
    trace: Mapping[str, object]
    options: Mapping[str, bool] = field(default_factory=dict)


def constructor_options(model: nn.Module) -> dict[str, bool]:
    """Switches of a Hugging Face model that its config does not hold, such as ``add_pooling_layer=False``.

    They are told from the names of its tensors: the fewest that give a model the same names.

    Args:
        model: Of any class; not mutated.

    Returns:
        Arguments of its constructor that do not have their defaults. Empty for classes that are not of transformers.
    """
    kind, config = type(model), getattr(model, "config", None)
    if config is None or not kind.__module__.startswith("transformers."):
        return {}
    defaults = {name: item.default for name, item in inspect.signature(kind).parameters.items()}
    switches = [name for name, default in defaults.items() if isinstance(default, bool)]
    if not switches:
        return {}
    wanted = model.state_dict().keys()
    for changed in itertools.chain.from_iterable(itertools.combinations(switches, n) for n in range(len(switches) + 1)):
        options = {name: not defaults[name] for name in changed}
        with torch.device("meta"):
            built = kind(copy.deepcopy(config), **options)
        if built.state_dict().keys() == wanted:
            return options
    return {}
