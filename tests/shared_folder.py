"""Folders for what several tests share; all go when the session ends."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def _session() -> str:
    folder = tempfile.mkdtemp(prefix="graphprune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def shared_folder() -> Path:
    """A new empty folder that outlives the test."""
    return Path(tempfile.mkdtemp(dir=_session()))
