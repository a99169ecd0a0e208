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
_CALLS: dict[str, Callable[..., float]] = {"min": min, "max": max, "round": round, "abs": abs, "int": int, "float": float}
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
    if not isinstance(value, str):
        return value
    whole = _WHOLE.fullmatch(value.strip())
    if whole:
        return _evaluate(whole.group(1), variables, where, ())
    return _WHOLE.sub(lambda match: str(_evaluate(match.group(1), variables, where, ())), value)


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
        return -_walk(tree.operand, variables, where, open_names)  # type: ignore[operator]
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        left = _walk(tree.left, variables, where, open_names)
        return _BINARY[type(tree.op)](left, _walk(tree.right, variables, where, open_names))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _CALLS and not tree.keywords:
        return _CALLS[tree.func.id](*(_walk(item, variables, where, open_names) for item in tree.args))
    raise RecipeError(
        f"{where}: {ast.unparse(tree)!r} is not allowed; an expression has numbers, variables, + - * / // % and "
        f"{', '.join(_CALLS)}"
    )


def _variable(name: str, variables: Mapping[str, object], where: str, open_names: tuple[str, ...]) -> object:
    if name not in variables:
        raise RecipeError(f"{where}: unknown variable {name!r}{suggest(name, variables)}")
    if name in open_names:
        raise RecipeError(f"{where}: variables refer to each other in a circle: {' -> '.join((*open_names, name))}")
    value = variables[name]
    reference = _WHOLE.fullmatch(value.strip()) if isinstance(value, str) else None
    return _evaluate(reference.group(1), variables, where, (*open_names, name)) if reference else value
