"""Pipelines as text: ``insert-masks{pattern=4x1,sparsity=0.8},fold-masks``.

Grammar (EBNF)::

    pipeline = [pass {"," pass}]
    pass     = name ["{" [option {"," option}] "}"]
    option   = name "=" value
    value    = "[" [value {"," value}] "]" | quoted | word
    quoted   = a JSON string
    word     = any characters but , { } [ ] = " and white space; true, false, null and numbers are read as such
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.errors import RecipeError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WORD = re.compile(r'[^\s,{}\[\]="]+')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_INTEGER = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?")


def format_pass(name: str, options: Mapping[str, object]) -> str:
    """A pass as text; ``parse_pipeline`` reads it back to the same name and options."""
    if not options:
        return name
    return name + "{" + ",".join(f"{key}={_format(value)}" for key, value in options.items()) + "}"


def format_pipeline(passes: list[tuple[str, dict[str, object]]]) -> str:
    """A pipeline as text."""
    return ",".join(format_pass(name, options) for name, options in passes)


def _format(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_format(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    return text if _WORD.fullmatch(text) and _scalar(text) == text else json.dumps(text)


def _scalar(word: str) -> object:
    if word in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    if word in ("inf", "-inf", "nan"):
        return math.nan if word == "nan" else float(word)
    return word


def parse_pipeline(text: str) -> list[tuple[str, dict[str, object]]]:
    """Read a pipeline.

    Returns:
        Names and options of the passes, in order.

    Raises:
        RecipeError: The text does not follow the grammar; says where.
    """
    reader = _Reader(text)
    passes: list[tuple[str, dict[str, object]]] = []
    while not reader.at_end():
        if passes:
            reader.expect(",")
        passes.append(reader.read_pass())
    return passes


@dataclass
class _Reader:
    text: str
    position: int = 0

    def at_end(self) -> bool:
        self._skip()
        return self.position == len(self.text)

    def _skip(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def peek(self, symbol: str) -> bool:
        self._skip()
        return self.text.startswith(symbol, self.position)

    def expect(self, symbol: str) -> None:
        if not self.peek(symbol):
            raise self.error(f"expected {symbol!r}")
        self.position += len(symbol)

    def error(self, message: str) -> RecipeError:
        found = self.text[self.position : self.position + 12] or "the end"
        return RecipeError(f"pipeline text, column {self.position + 1}: {message}, found {found!r} in {self.text!r}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self._skip()
        match = pattern.match(self.text, self.position)
        if match is None:
            raise self.error(f"expected {what}")
        self.position = match.end()
        return match.group()

    def read_pass(self) -> tuple[str, dict[str, object]]:
        name = self.match(_NAME, "the name of a pass")
        options: dict[str, object] = {}
        if self.peek("{"):
            self.expect("{")
            while not self.peek("}"):
                if options:
                    self.expect(",")
                key = self.match(_NAME, "the name of an option")
                if key in options:
                    raise self.error(f"option {key!r} is given twice")
                self.expect("=")
                options[key] = self.read_value()
            self.expect("}")
        return name, options

    def read_value(self) -> object:
        if self.peek("["):
            self.expect("[")
            items: list[object] = []
            while not self.peek("]"):
                if items:
                    self.expect(",")
                items.append(self.read_value())
            self.expect("]")
            return items
        if self.peek('"'):
            quoted = self.match(_QUOTED, "a closing quote")
            try:
                return str(json.loads(quoted))
            except ValueError as error:
                raise RecipeError(f"pipeline text: {quoted} is no JSON string: {error}") from None
        return _scalar(self.match(_WORD, "a value"))
