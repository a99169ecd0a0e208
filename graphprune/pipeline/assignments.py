"""Texts ``NAME=VALUE``, as flags of commands have them."""

from __future__ import annotations

from graphprune.errors import RecipeError
from graphprune.pipeline.plain_yaml import read_value


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Split texts ``NAME=VALUE``; the option's name is for messages.

    Raises:
        RecipeError: A text has no name or no equals sign, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RecipeError(f"{option} {text}: write NAME=VALUE")
        if name in found:
            raise RecipeError(f"{option}: {name!r} is given twice")
        found[name] = value
    return found


def assignments(texts: list[str] | None, option: str) -> dict[str, object]:
    """Split texts ``NAME=VALUE`` and read the values as YAML: 0.8 is a number, true a bool, 4x1 a string.

    Raises:
        RecipeError: A text is malformed, a name comes twice, or a value is no YAML.
    """
    values: dict[str, object] = {}
    for name, text in pairs(texts, option).items():
        try:
            values[name] = read_value(text)
        except RecipeError as error:
            raise RecipeError(f"{option} {name}: {error}") from None
    return values
