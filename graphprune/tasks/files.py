"""Read a file of examples, whatever its format, plain or gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.tasks.conll_files import read_conll
from graphprune.tasks.delimited_files import read_csv, read_tsv
from graphprune.tasks.json_files import read_json
from graphprune.tasks.tables import Table

_GZIP = b"\x1f\x8b"
_READERS: dict[str, Callable[[str, str], Table]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}


def read_table(path: Path | str, *, columns: bool = False) -> Table:
    """Read examples from a file.

    The ending says the format: ``.json``, ``.jsonl`` and ``.ndjson`` (SQuAD, a list, or lines), ``.csv``, ``.tsv``; before
    it may stand nothing else but ``.gz`` behind it. Whether a file is gzip is seen by its first bytes.

    Args:
        path: The file, UTF-8 with or without a byte order mark.
        columns: Read every other ending as CoNLL columns; ``.tsv`` and ``.txt`` too.

    Raises:
        GraphPruneError: The file cannot be read or is empty, its ending is unknown, or its content is malformed (the
            message names the line).
    """
    path = Path(path)
    name = str(path)
    ending = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    reader = _READERS.get(ending)
    if columns and (reader is None or ending == ".tsv"):
        reader = read_conll
    if reader is None:
        known = ", ".join(_READERS)
        raise GraphPruneError(f"{name}: unknown ending {ending!r}; examples are read from {known} (and each with .gz)")
    text = _read_text(path)
    if not text.strip():
        raise GraphPruneError(f"{name} is empty")
    return reader(name, text)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise GraphPruneError(f"{path}, line {line}: no UTF-8 ({error.reason}); store the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GraphPruneError(f"{path} is no whole gzip file: {error}") from error
    except OSError as error:
        raise GraphPruneError(f"{path} cannot be read: {error.strerror or error}") from error
