"""Files of other tools as plain nodes that know their line: YAML, JSON, and markdown that begins with YAML.

Nothing is constructed: a tag is kept as text, and one that asks for a Python object is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from graphprune.errors import RecipeError

Scalar = str | int | float | bool | None
_STANDARD = "tag:yaml.org,2002:"
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "value")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FENCE = "---"
_MOST_NODES = 100_000


@dataclass(frozen=True)
class Node:
    """One value of a file.

    Attributes:
        line: Where it stands, counted from 1; a value of a mapping stands where its key does.
        value: A scalar, nodes in order, or nodes by key.
        tag: The tag without its exclamation mark, such as ``Pruner``; empty where there is none.
    """

    line: int
    value: Scalar | tuple[Node, ...] | Mapping[str, Node]
    tag: str = ""

    @property
    def mapping(self) -> Mapping[str, Node]:
        """The nodes by key; empty where it is no mapping."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def items(self) -> tuple[Node, ...]:
        """The nodes in order; empty where it is no list."""
        return self.value if isinstance(self.value, tuple) else ()

    def plain(self) -> object:
        """The value as Python data, without lines and tags."""
        if isinstance(self.value, Mapping):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, tuple) else self.value

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for item in (*self.mapping.values(), *self.items):
            yield from item.walk()


def read_document(text: str) -> Node:
    """Read YAML, JSON, or the YAML at the head of a markdown file.

    Raises:
        RecipeError: It is none of these, holds several documents, gives a key twice, or has a tag that asks for a Python object;
            says the line.
    """
    try:
        root = yaml.compose(_front_matter(_without_tabs(text)), Loader=yaml.SafeLoader)
        if root is None:
            raise RecipeError("the file is empty")
        return _Converter().convert(root)
    except RecursionError:
        raise RecipeError("the file is nested too deeply to be a configuration") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}no YAML or JSON: {getattr(error, 'problem', None) or error}") from None


def _without_tabs(text: str) -> str:
    """JSON may be indented with tabs, which YAML refuses; they cannot be part of a JSON string."""
    if "\t" not in text or not text.lstrip().startswith(("{", "[")):
        return text
    try:
        json.loads(text)
    except ValueError:
        return text
    return text.replace("\t", " ")


def _front_matter(text: str) -> str:
    """What stands between the first two lines ``---``, on the lines where it stood; else the whole text."""
    lines = text.splitlines()
    filled = [index for index, line in enumerate(lines) if line.strip()]
    if not filled or lines[filled[0]].strip() != _FENCE:
        return text
    ends = [index for index in filled[1:] if lines[index].strip() == _FENCE]
    if not ends:
        return text
    return "\n".join(["" if index <= filled[0] else line for index, line in enumerate(lines[: ends[0]])])


class _Converter:
    """Turns what YAML composed into nodes."""

    def __init__(self) -> None:
        self.count = 0
        self.open: set[int] = set()

    def convert(self, node: yaml.Node, line: int | None = None) -> Node:
        """One node; ``line`` where it belongs to a key."""
        here = node.start_mark.line + 1
        line = here if line is None else line
        self.count += 1
        if self.count > _MOST_NODES or id(node) in self.open:
            raise RecipeError(f"line {here}: an alias makes the file endless, or larger than a configuration is")
        tag = _tag(node, here)
        self.open.add(id(node))
        value: Scalar | tuple[Node, ...] | Mapping[str, Node]
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            value = tuple(self.convert(item) for item in node.value)
        elif isinstance(node, yaml.ScalarNode):
            value = _scalar(node)
        else:
            raise RecipeError(f"line {here}: neither a value, nor a list, nor a mapping")
        self.open.discard(id(node))
        return Node(line, value, tag)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {line}: a key is a list or mapping")
            _tag(key, line)
            if key.value in found:
                raise RecipeError(f"line {line}: the key {key.value!r} is given twice; leave one out")
            found[key.value] = self.convert(item, line)
        return found


def _tag(node: yaml.Node, line: int) -> str:
    tag = str(node.tag)
    if tag.startswith(_STANDARD):
        if tag.removeprefix(_STANDARD) in _KINDS:
            return ""
        raise RecipeError(
            f"line {line}: the tag !!{tag.removeprefix(_STANDARD)} asks for an object, which is never made; a configuration is "
            f"plain data"
        )
    name = tag.removeprefix("!")
    if tag.startswith("!") and re.fullmatch(r"\w*", name):
        return name
    raise RecipeError(f"line {line}: the tag {tag} is none of a recipe or configuration")


def _scalar(node: yaml.ScalarNode) -> Scalar:
    text = str(node.value)
    if node.style is not None:
        return text
    if node.tag == f"{_STANDARD}bool":
        return text.lower() in ("true", "yes", "on")
    if node.tag == f"{_STANDARD}null" or (not text and not str(node.tag).startswith(_STANDARD)):
        return None
    return plain_scalar(text)


def plain_scalar(text: str) -> str | int | float:
    """A number where the text is one, read as YAML 1.2 does (2:4 is a text, 1e-3 a number); else the text."""
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
    return text
