"""Files that are whole or not there: written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from graphprune.errors import GraphPruneError

_REFUSED = re.compile(r"os error|PytorchStreamWriter|inline_container|iostream error")
"""How safetensors and ``torch.save`` say that the operating system refused: they raise no OSError."""

MANIFEST = "manifest.json"
PROGRAM = "program.json"


@contextlib.contextmanager
def written(path: Path | str) -> Iterator[Path]:
    """Write one file.

    Args:
        path: Where the file will be; its folder is made.

    Yields:
        A temporary path beside it to write to; it takes the place of ``path`` when the block ends, and is removed where
        the block raises.

    Raises:
        GraphPruneError: The operating system refuses (disk full, no permission); nothing is left behind.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_folder(folder: Path | str, *, overwrite: bool = False, ours: bool = True) -> Iterator[Path]:
    """Write a folder.

    Args:
        folder: Where it will be.
        overwrite: Replace any folder as a whole.
        ours: Replace one that graphprune wrote earlier as a whole.

    Yields:
        A temporary folder beside it; it takes the place of ``folder`` when the block ends.

    Raises:
        GraphPruneError: ``folder`` holds something else, or the operating system refuses; nothing is left behind.
    """
    folder = Path(folder)
    known = any((folder / name).is_file() for name in (MANIFEST, PROGRAM))
    if folder.exists() and not folder.is_dir():
        raise GraphPruneError(f"{folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or (known and ours)):
        content = "an artifact or a saved Program" if known else "files that graphprune did not write"
        raise GraphPruneError(
            f"{folder} holds {content}; choose an empty folder, or replace it (--force, overwrite=True)"
        )
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            if folder.exists():
                old = temporary.with_name(f"{temporary.name}.old")
                folder.rename(old)
                temporary.rename(folder)
                shutil.rmtree(old)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _REFUSED.search(str(error)):
            raise  # something else went wrong while the file was open
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise GraphPruneError(
            f"cannot write {path}: {reason}; nothing was left there. Free space or choose another place"
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
