"""Numbers that stay expressions of a recipe's variables while they are computed with."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphprune.errors import RecipeError
from graphprune.pipeline.expressions import substitute

_EVAL = re.compile(r"\s*eval\((.*)\)\s*", re.DOTALL)
_SYMBOLS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_MOST_POWER = 8


@dataclass(frozen=True)
class Quantity:
    """A number, and where it comes from.

    Attributes:
        value: What it is now.
        text: The expression of variables that makes it; empty for a plain number.
    """

    value: int | float
    text: str = ""

    def plain(self) -> int | float | str:
        """As a recipe has it: the number, or ``${expression}``."""
        return f"${{{self.text}}}" if self.text else self.value

    def epochs(self) -> int | str:
        """As a time of a recipe: ``2 epochs``; 0 where it is the beginning."""
        if self.text:
            return f"${{{self.text}}} epochs"
        return f"{decimal(self.value)} epoch{'' if self.value == 1 else 's'}" if self.value else 0

    def written(self) -> str:
        """As part of a larger expression."""
        if not self.text:
            return f"({self.value!r})" if self.value < 0 else repr(self.value)
        return self.text if re.fullmatch(r"\w+(\([^()]*\))?", self.text) else f"({self.text})"

    def _with(self, symbol: str, other: Quantity | float) -> Quantity:
        right = other if isinstance(other, Quantity) else Quantity(other)
        if not right.text and ((symbol in "+-" and right.value == 0) or (symbol in "*/" and right.value == 1)):
            return self
        if not self.text and symbol == "+" and self.value == 0:
            return right
        if not self.text and symbol == "*" and self.value == 1:
            return right
        if symbol == "/" and self == right and self.value:
            return Quantity(1)
        if not right.value and symbol == "/":
            raise RecipeError(f"{self.written()} / {right.written()} divides by zero")
        try:
            value = _whole(_SYMBOLS[symbol](self.value, right.value))
        except (OverflowError, ValueError):
            raise RecipeError(f"{self.written()} {symbol} {right.written()} is too large to compute with") from None
        if not self.text and not right.text:
            return Quantity(value)
        return Quantity(value, f"{self.written()} {symbol} {right.written()}")

    def __add__(self, other: Quantity | float) -> Quantity:
        return self._with("+", other)

    def __sub__(self, other: Quantity | float) -> Quantity:
        return self._with("-", other)

    def __mul__(self, other: Quantity | float) -> Quantity:
        return self._with("*", other)

    def __truediv__(self, other: Quantity | float) -> Quantity:
        return self._with("/", other)


def _whole(value: float) -> int | float:
    rounded = round(value, 12)
    return int(rounded) if isinstance(value, int) or rounded == int(rounded) else rounded


def decimal(value: float) -> str:
    """A number without an exponent, as short as it is exact."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def expression_of(value: object) -> str | None:
    """What stands in ``eval(...)``; None where a value is no such text."""
    match = _EVAL.fullmatch(value) if isinstance(value, str) else None
    return match[1].strip() if match is not None else None


def evaluate(text: str, variables: Mapping[str, object]) -> object:
    """The value of an expression: of a variable whatever it holds, else a number.

    Raises:
        RecipeError: An unknown variable, a circle, or anything but arithmetic.
    """
    name = text.strip()
    held = variables.get(name)
    if name in variables and not isinstance(held, str):
        return held
    return substitute(f"${{{allowed(text)}}}", variables, f"eval({name})")


def allowed(text: str) -> str:
    """The expression in graphprune's spelling: small whole powers written out as products.

    Raises:
        RecipeError: It is no expression, or has a power that cannot be written out.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        raise RecipeError(f"eval({text}) is no expression") from None
    return ast.unparse(_Powers().visit(tree))


class _Powers(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        times = node.right.value if isinstance(node.right, ast.Constant) else None
        if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= _MOST_POWER:
            raise RecipeError(
                f"{ast.unparse(node)}: only powers from 1 to {_MOST_POWER} can be written as products; put the number there"
            )
        product: ast.expr = node.left
        for _ in range(times - 1):
            product = ast.BinOp(product, ast.Mult(), node.left)
        return product
