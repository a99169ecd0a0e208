"""The libraries of the extra ``train``, which only fine-tuning needs."""

from __future__ import annotations

from importlib.util import find_spec

from graphprune.errors import GraphPruneError

_LIBRARIES = ("datasets", "torchmetrics", "seqeval")


def require_train_extra(*names: str) -> None:
    """Check that libraries of the extra ``train`` are installed.

    Args:
        names: Modules that are needed; all of the extra's where none is named.

    Raises:
        GraphPruneError: One is missing; the message says how to install it.
    """
    missing = [name for name in names or _LIBRARIES if find_spec(name) is None]
    if missing:
        raise GraphPruneError(f'fine-tuning needs {", ".join(missing)}; run: pip install "graphprune[train]"')
