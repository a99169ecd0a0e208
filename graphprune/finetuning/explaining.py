"""One message for what cannot be loaded, whichever of its files is the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from graphprune.errors import GraphPruneError


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Say which model, config or tokenizer could not be loaded.

    Raises:
        GraphPruneError: In place of what transformers raises.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise GraphPruneError(f"{name} cannot be loaded: {reason}; give a folder or a hub id") from error
