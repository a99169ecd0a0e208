"""YAML as recipes use it: plain data, no tags, no key twice, numbers as YAML 1.2 reads them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from graphprune.errors import RecipeError


def read_yaml(text: str) -> object:
    """Read a document.

    Raises:
        RecipeError: Not YAML, a tab, a tag, or a key given twice; says line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = "; indent with spaces" if "\\t" in problem else ""
        hint = "; a recipe is plain data, tags are not allowed" if "tag" in problem else hint
        raise RecipeError(f"{where}{problem}{hint}") from None


def read_value(text: str) -> object:
    """Read one value as a recipe would: 0.8 is a number, true a bool, 4x1 and 2:4 are texts.

    Raises:
        RecipeError: It is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r} cannot be read as a YAML value") from None


def write_yaml(data: object) -> str:
    """Write a document that ``read_yaml`` reads back to equal data, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads numbers as YAML 1.2 does: 2:4 is a text, 1e-3 a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that puts a text in quotes where YAML 1.1 or 1.2 would read a number."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    _side.add_implicit_resolver(_NUMBERS[1], _FLOAT, list("-+0123456789."))
_Loader.add_constructor(_NUMBERS[0], lambda loader, node: int(node.value))  # 010 is ten
