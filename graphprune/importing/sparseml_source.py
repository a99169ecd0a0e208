"""The parts of a SparseML recipe: variables, groups of modifiers, stages; of both generations of its grammar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from graphprune.errors import RecipeError
from graphprune.importing.document import Node
from graphprune.importing.fields import Ledger, Scope
from graphprune.importing.quantity import allowed, expression_of

_GROUP = "modifiers"
_STAGE_KEYS = ("run_type", "enabled", "args", "exclude_default")


@dataclass(frozen=True)
class Modifier:
    """One modifier as it was written."""

    name: str
    node: Node
    path: str


@dataclass
class SourceStage:
    """One stage as it was written; a recipe without stages is one."""

    name: str
    modifiers: list[Modifier] = field(default_factory=list)
    scope: Scope = field(default_factory=Scope)
    one_shot: bool = False


def looks_like_sparseml(root: Node) -> bool:
    """Whether a document has modifiers, in groups, in stages or as tags."""
    groups = [key for key in root.mapping if _GROUP in key]
    staged = [key for node in root.mapping.values() for key in node.mapping if _GROUP in key]
    return bool(groups or staged) or any(node.tag.endswith("Modifier") for node in root.items)


def read_stages(root: Node, ledger: Ledger) -> tuple[dict[str, object], list[SourceStage]]:
    """Take a recipe apart.

    Returns:
        The variables in graphprune's spelling, and the stages in order.
    """
    variables: dict[str, object] = {}
    plain: dict[str, object] = {}
    loose = SourceStage("main")
    stages: list[SourceStage] = []
    if root.items:
        loose.modifiers += _modifiers(root, _GROUP, ledger)
    for key, node in root.mapping.items():
        if _GROUP not in key and not any(_GROUP in inner for inner in node.mapping):
            _variable(key, node, key, variables, plain, ledger)
    for key, node in root.mapping.items():
        if _GROUP in key:
            loose.modifiers += _modifiers(node, key, ledger)
        elif any(_GROUP in inner for inner in node.mapping):
            stages += _stage(key, node, variables, plain, ledger)
    loose.scope = Scope({**variables, **plain}, frozenset(plain))
    return variables, [loose, *stages] if loose.modifiers or not stages else stages


def _variable(
    key: str, node: Node, path: str, variables: dict[str, object], plain: dict[str, object], ledger: Ledger
) -> None:
    """Sort a top-level value into variables of the recipe and values that are only put in."""
    if key.startswith("__"):
        return
    if key == "version":
        ledger.note(f"the source's version: {node.plain()}")
        return
    if isinstance(node.value, Mapping):
        ledger.add(node.line, path, "neither a variable, nor a group of modifiers, nor a stage; nothing was made of it")
    elif node.items or node.value is None or not key.isidentifier():
        plain[key] = node.plain()
        if not node.items:
            ledger.add(node.line, path, "a recipe's variables are numbers, texts, true or false under a plain name")
    else:
        inside = expression_of(node.value)
        try:
            variables[key] = node.value if inside is None else f"${{{allowed(inside)}}}"
        except RecipeError as error:
            ledger.add(node.line, path, f"cannot be evaluated: {error}")


def _stage(
    key: str, node: Node, variables: dict[str, object], plain: Mapping[str, object], ledger: Ledger
) -> Iterator[SourceStage]:
    given = node.mapping
    if "enabled" in given and given["enabled"].value is False:
        ledger.note(f"stage {key} is switched off (enabled: false) and was left out")
        return
    own: dict[str, object] = {}
    listed: dict[str, object] = {}
    arguments = given["args"].mapping if "args" in given else {}
    for name, item in [*given.items(), *arguments.items()]:
        if _GROUP not in name and name not in _STAGE_KEYS:
            _variable(name, item, f"{key}.{name}", own, listed, ledger)
    if "exclude_default" in given and given["exclude_default"].value:
        ledger.note(f"{key}.exclude_default: stages here are chosen by name when they are run")
    clashing = {name for name, value in own.items() if variables.setdefault(name, value) != value}
    if clashing:
        ledger.note(f"{', '.join(sorted(clashing))}: differs between stages; in {key} the value was put in")
    stage = SourceStage(
        key, scope=Scope({**variables, **plain, **listed, **own}, frozenset(clashing | {*listed, *plain}))
    )
    kind = given["run_type"].value if "run_type" in given else None
    if kind not in (None, "oneshot", "train"):
        ledger.add(given["run_type"].line, f"{key}.run_type", f"{kind!r} is neither oneshot nor train; taken as train")
    stage.one_shot = kind == "oneshot"
    for name, item in given.items():
        if _GROUP in name:
            stage.modifiers += _modifiers(item, f"{key}.{name}", ledger)
    yield stage


def _modifiers(node: Node, path: str, ledger: Ledger) -> Iterator[Modifier]:
    """The modifiers of a group: tagged entries, or names with their options."""
    for item in node.items:
        if item.tag:
            yield Modifier(item.tag, Node(item.line, item.value), f"{path}.{item.tag}")
        elif item.mapping:
            yield from _named(item.mapping, path)
        else:
            ledger.add(item.line, path, f"{item.plain()!r} is no modifier; nothing was made of it")
    yield from _named(node.mapping, path)
    if not node.items and not node.mapping and node.value is not None:
        ledger.add(node.line, path, f"{node.plain()!r} is no group of modifiers; nothing was made of it")


def _named(modifiers: Mapping[str, Node], path: str) -> Iterator[Modifier]:
    for name, node in modifiers.items():
        yield Modifier(name, Node(node.line, node.value), f"{path}.{name}")
