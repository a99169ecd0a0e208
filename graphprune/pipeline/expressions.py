"""Recipe variables: ``${name}`` and arithmetic such as ``${target / 2}``, evaluated by a whitelist."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

from graphprune.errors import RecipeError, suggest

_BINARY: dict[type[ast.operator], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "round": round,
    "abs": abs,
    "int": int,
    "float": float,
}
_WHOLE = re.compile(r"\$\{([^{}]*)\}")


def substitute(value: object, variables: Mapping[str, object], where: str) -> object:
    """Replace every ``${...}`` in a recipe value.

    Args:
        value: A scalar, list or mapping of them.
        variables: Values by name; they may themselves refer to each other.
        where: Path in the recipe, for messages.

    Returns:
        ``value`` with references replaced: a string that is one reference becomes the value itself, one inside a longer
        string its text.

    Raises:
        RecipeError: An unknown variable, a circle, or an expression that is not plain arithmetic.
    """
    if isinstance(value, Mapping):
        return {key: substitute(item, variables, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [substitute(item, variables, f"{where}[{index}]") for index, item in enumerate(value)]
    return _replace(value, variables, where, ()) if isinstance(value, str) else value


def _replace(text: str, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> object:
    whole = _WHOLE.fullmatch(text.strip())
    if whole:
        return _evaluate(whole.group(1), variables, where, open_names)
    return _WHOLE.sub(lambda match: str(_evaluate(match.group(1), variables, where, open_names)), text)


def _evaluate(text: str, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> object:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise RecipeError(f"{where}: {text!r} is no expression") from None
    try:
        return _walk(tree, variables, where, open_names)
    except (TypeError, ArithmeticError, ValueError) as error:
        raise RecipeError(f"{where}: {text!r} cannot be computed: {error}") from None


def _walk(tree: ast.expr, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> object:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)) and not isinstance(tree.value, bool):
        return tree.value
    if isinstance(tree, ast.Name):
        return _variable(tree.id, variables, where, open_names)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_number(tree.operand, variables, where, open_names)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        left = _number(tree.left, variables, where, open_names)
        return _BINARY[type(tree.op)](left, _number(tree.right, variables, where, open_names))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _CALLS and not tree.keywords:
        return _CALLS[tree.func.id](*(_number(item, variables, where, open_names) for item in tree.args))
    raise RecipeError(
        f"{where}: {ast.unparse(tree)!r} is not allowed; an expression has numbers, variables, + - * / // % and "
        f"{', '.join(_CALLS)}"
    )


def _number(tree: ast.expr, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> int | float:
    value = _walk(tree, variables, where, open_names)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return value


def _variable(name: str, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> object:
    if name not in variables:
        raise RecipeError(f"{where}: unknown variable {name!r}{suggest(name, variables)}")
    if name in open_names:
        raise RecipeError(f"{where}: variables refer to each other in a circle: {' -> '.join((*open_names, name))}")
    value = variables[name]
    return _replace(value, variables, where, (*open_names, name)) if isinstance(value, str) else value
