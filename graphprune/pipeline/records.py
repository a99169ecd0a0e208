"""Records that targets write beside a model: JSON objects with a format number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.errors import LoweringError


def read_record(path: Path, version: int) -> dict[str, Any]:
    """Read a record.

    Args:
        path: The file.
        version: What its ``format`` must be.

    Raises:
        LoweringError: It is missing or damaged, or another version wrote it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoweringError(f"{path.parent} holds no {path.name}; lower a Program into it first") from error
    except (OSError, ValueError) as error:
        raise LoweringError(f"cannot read {path}: {error}; export it again") from error
    if not isinstance(record, dict) or record.get("format") != version:
        raise LoweringError(f"{path} is not of the form that this version reads; export it again")
    return record
