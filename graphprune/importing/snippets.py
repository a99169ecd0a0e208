"""Python snippets such as ``WeightPruningConfig([...], target_sparsity=0.9)`` as nodes; parsed, never evaluated.

A call becomes a mapping of its keywords whose tag is the name of the class; positional arguments get the names that the class
gives them. Names stand for what was assigned to them above.
"""

from __future__ import annotations

import ast
import re

from graphprune.errors import RecipeError
from graphprune.importing.document import Node

POSITIONS: dict[str, tuple[str, ...]] = {
    "WeightPruningConfig": (
        "pruning_configs",
        "target_sparsity",
        "pruning_type",
        "pattern",
        "op_names",
        "excluded_op_names",
        "backend",
        "start_step",
        "end_step",
        "pruning_scope",
        "pruning_frequency",
        "min_sparsity_ratio_per_op",
        "max_sparsity_ratio_per_op",
        "sparsity_decay_type",
        "pruning_op_types",
    ),
    "DistillationConfig": ("teacher_model", "criterion", "optimizer"),
    "KnowledgeDistillationLossConfig": ("temperature", "loss_types", "loss_weights"),
    "IntermediateLayersKnowledgeDistillationLossConfig": (
        "layer_mappings",
        "loss_types",
        "loss_weights",
        "add_origin_loss",
    ),
    "SelfKnowledgeDistillationLossConfig": (
        "layer_mappings",
        "temperature",
        "loss_types",
        "loss_weights",
        "add_origin_loss",
    ),
    "QuantizationAwareTrainingConfig": (),
    "PostTrainingQuantConfig": ("device", "backend"),
    "MixedPrecisionConfig": (),
    "TuningCriterion": (),
    "AccuracyCriterion": (),
}
"""Classes that are known, with the names of their positional arguments."""
CONFIGS = (
    "WeightPruningConfig",
    "DistillationConfig",
    "QuantizationAwareTrainingConfig",
    "PostTrainingQuantConfig",
    "MixedPrecisionConfig",
)
"""Those that say something by themselves."""
_CALL = re.compile(rf"\b({'|'.join(POSITIONS)})\s*\(")


def mentions_config(text: str) -> bool:
    """Whether a text calls one of the known classes somewhere."""
    return _CALL.search(text) is not None


def is_snippet(text: str) -> bool:
    """Whether a text calls one of the known classes, as Python does."""
    if not mentions_config(text):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def read_snippet(text: str) -> tuple[tuple[Node, ...], tuple[tuple[int, str], ...]]:
    """Read a snippet.

    Returns:
        The configurations, in order; and lines with their source that are neither configuration nor plain data.

    Raises:
        RecipeError: It is no Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise RecipeError(f"{line}no Python: {error.msg if isinstance(error, SyntaxError) else error}") from None
    reader = _Reader()
    for statement in tree.body:
        reader.statement(statement)
    inside = {id(item) for found in reader.found for item in found.walk() if item is not found}
    return tuple(found for found in reader.found if id(found) not in inside), tuple(reader.ignored)


class _Reader:
    def __init__(self) -> None:
        self.found: list[Node] = []
        self.ignored: list[tuple[int, str]] = []
        self.names: dict[str, Node] = {}

    def statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return
        value = statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr)) else None
        node = None if value is None else self.node(value)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if node is None:
            self.ignored.append((statement.lineno, ast.unparse(statement).splitlines()[0]))
        for target in targets:
            if isinstance(target, ast.Name) and node is not None:
                self.names[target.id] = node

    def node(self, tree: ast.expr) -> Node | None:
        """The tree as a node; None where it is neither plain data nor a known class."""
        if isinstance(tree, ast.Constant) and isinstance(tree.value, (str, int, float, bool, type(None))):
            return Node(tree.lineno, tree.value)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            inner = self.node(tree.operand)
            number = inner.value if inner is not None else None
            return Node(tree.lineno, -number) if isinstance(number, (int, float)) else None
        if isinstance(tree, (ast.List, ast.Tuple)):
            return Node(tree.lineno, tuple(self.part(item) for item in tree.elts))
        if isinstance(tree, ast.Dict):
            return self.pairs(tree.lineno, [(key, item) for key, item in zip(tree.keys, tree.values, strict=True)])
        if isinstance(tree, ast.Name) and tree.id in self.names:
            return self.names[tree.id]
        if isinstance(tree, ast.Call):
            return self.call(tree)
        return None

    def part(self, tree: ast.expr) -> Node:
        """A node also for what is not known: its source, tagged ``python``."""
        return self.node(tree) or Node(tree.lineno, ast.unparse(tree), "python")

    def pairs(self, line: int, items: list[tuple[ast.expr | None, ast.expr]]) -> Node:
        found: dict[str, Node] = {}
        for key, item in items:
            name = key.value if isinstance(key, ast.Constant) else ast.unparse(key) if key is not None else "**"
            value = self.part(item)
            found[str(name)] = Node(key.lineno if key is not None else item.lineno, value.value, value.tag)
        return Node(line, found)

    def call(self, tree: ast.Call) -> Node | None:
        name = tree.func.id if isinstance(tree.func, ast.Name) else ""
        name = tree.func.attr if isinstance(tree.func, ast.Attribute) else name
        if name == "dict" and not tree.args:
            return self.keywords(tree, {}, "")
        if name not in POSITIONS:
            return None
        known = POSITIONS[name]
        if len(tree.args) > len(known):
            raise RecipeError(
                f"line {tree.lineno}: {name} takes {len(known)} positional arguments, not {len(tree.args)}"
            )
        node = self.keywords(tree, dict(zip(known, map(self.part, tree.args), strict=False)), name)
        if name in CONFIGS:
            self.found.append(node)
        return node

    def keywords(self, tree: ast.Call, found: dict[str, Node], tag: str) -> Node:
        for keyword in tree.keywords:
            value = self.part(keyword.value)
            found[keyword.arg or "**"] = Node(keyword.value.lineno, value.value, value.tag)
        return Node(tree.lineno, found, tag)
