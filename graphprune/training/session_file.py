"""A session's state in a file of a checkpoint: whole, or one error that says what is wrong with it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError
from graphprune.training.session import Session

SESSION_FILE = "graphprune_session.pt"


def write_session(path: Path, session: Session) -> None:
    """Write a session's state; the file is whole or not there.

    Raises:
        GraphPruneError: The operating system refuses.
    """
    with written(path) as temporary:
        torch.save(session.state_dict(), temporary)


def read_session(path: Path, session: Session, *, random: bool = True) -> None:
    """Load a session's state from its file.

    Args:
        path: As it was given to ``write_session``.
        session: Of the same Program, and not yet trained.
        random: Restore the random generators too.

    Raises:
        GraphPruneError: The file is missing, or is not a session's state.
        SparsityError: The state is of another Program or run.
    """
    if not path.is_file():
        raise GraphPruneError(
            f"{path.parent} has no {path.name}, so masks and schedule cannot go on from it: the checkpoint was written without a "
            f"session, or not to its end; resume from another checkpoint, or start anew"
        )
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise GraphPruneError(_damaged(path, error)) from error
    if not isinstance(state, dict):
        raise GraphPruneError(_damaged(path, f"it holds a {type(state).__name__}"))
    try:
        session.load_state_dict(state, random=random)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphPruneError(_damaged(path, f"{type(error).__name__} {error}")) from error


def _damaged(path: Path, reason: object) -> str:
    first = str(reason).strip().split("\n")[0] or type(reason).__name__
    return f"{path} is damaged or no session's state ({first}); resume from another checkpoint, or start anew"
