"""The text form of criteria and schedules: ``name`` or ``name(option=value,option=value)``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from graphprune.errors import SparsityError, suggest

T = TypeVar("T")
_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def format_named(name: str, value: Any) -> str:
    """Write a frozen dataclass as text; options that have their default are left out.

    Args:
        name: The name under which the class is registered.
        value: The dataclass instance; every field has a default.

    Returns:
        Text that ``parse_named`` turns back into an equal instance.
    """
    options = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{name}({','.join(options)})" if options else name


def parse_named(text: str, known: Mapping[str, type[T]], kind: str) -> T:
    """Read ``name`` or ``name(option=value,...)`` into an instance of the class registered under ``name``.

    Args:
        text: The text; spaces around its parts do not matter.
        known: Registered dataclasses by name; their fields have int or float defaults.
        kind: What is being read ("criterion"), for messages.

    Returns:
        The instance.

    Raises:
        SparsityError: The text is malformed, or the name, an option or a value is not known.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise SparsityError(f"cannot read {kind} {text!r}; write name or name(option=value,...){suggest(text, known)}")
    name, listed = match[1], match[2] or ""
    if name not in known:
        raise SparsityError(f"unknown {kind} {name!r}{suggest(name, known)}")
    cls = known[name]
    defaults = {field.name: field.default for field in dataclasses.fields(cast(Any, cls))}
    options: dict[str, float | int] = {}
    for item in filter(None, (part.strip() for part in listed.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise SparsityError(f"{kind} {name}: unknown option {key!r}{suggest(key, defaults)}")
        if key in options:
            raise SparsityError(f"{kind} {name}: option {key!r} is given twice; leave one out")
        try:
            options[key] = int(value) if isinstance(defaults[key], int) else float(value)
        except ValueError as error:
            example = f"write for example {key}={defaults[key]}"
            raise SparsityError(f"{kind} {name}: {key}={value!r} is no number of its kind; {example}") from error
    return cls(**options)
