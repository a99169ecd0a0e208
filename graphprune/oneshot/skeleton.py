"""A model without weights whose buffers have values: those of positions and the like are in no checkpoint."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.artifact.models import class_of, read_config
from graphprune.errors import GraphPruneError

_LOCK = threading.Lock()


def build_skeleton(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build the model that a folder's config describes, without reading weights.

    Args:
        folder: A folder with a Hugging Face ``config.json``.

    Returns:
        The model on the meta device in eval mode; the values of its buffers by name.

    Raises:
        GraphPruneError: There is no config, or the class cannot be built from it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise GraphPruneError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    config = read_config(str(folder), str(path))
    kind, _ = class_of(config)
    try:
        with _parameters_on_meta():
            model: nn.Module = kind(config) if kind.__name__ != "AutoModel" else kind.from_config(config)
    except Exception as error:  # a model class raises whatever its code runs into with a config that makes no sense
        reason = (str(error).strip().splitlines() or [""])[0]
        raise GraphPruneError(f"{path}: {kind.__name__} cannot be built: {type(error).__name__}: {reason}") from error
    buffers = {name: value.detach().clone() for name, value in model.named_buffers() if not value.is_meta}
    return model.to("meta").eval(), buffers


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules keep their parameters on the meta device; what is allocated for one is freed before it is touched."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            kept: dict[str, Any] = dict(param.__dict__)
            param = type(param)(param.to("meta"), requires_grad=param.requires_grad)
            param.__dict__.update(kept)
        original(self, name, param)

    with _LOCK:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
