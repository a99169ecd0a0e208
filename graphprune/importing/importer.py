"""``import_recipe``: recognize a file by its content, read it, and say what it could not carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphprune.errors import RecipeError, suggest
from graphprune.importing.document import Node, read_document
from graphprune.importing.draft import RecipeDraft, drop_unused, write_draft
from graphprune.importing.fields import Ledger, NotCarried
from graphprune.importing.inc import import_inc, import_objects, looks_like_inc
from graphprune.importing.snippets import is_snippet, mentions_config, read_snippet
from graphprune.importing.sparseml import import_sparseml
from graphprune.importing.sparseml_source import looks_like_sparseml
from graphprune.pipeline.recipe import Recipe

Kind = Literal["inc", "sparseml"]
KINDS: tuple[Kind, ...] = ("inc", "sparseml")


@dataclass(frozen=True)
class Imported:
    """A recipe that was read from another tool's file.

    Attributes:
        recipe: The recipe; ``Recipe.parse(yaml)`` equals it.
        yaml: Its text, under a comment that names the source, what to know, and what is missing.
        not_carried: What the recipe does not have, by line of the source.
        notes: What was carried in another way.
        kind: ``inc`` (Neural Compressor and Optimum-Intel) or ``sparseml``.
    """

    recipe: Recipe
    yaml: str
    not_carried: tuple[NotCarried, ...]
    notes: tuple[str, ...]
    kind: Kind


def import_recipe(source: Path | str, *, kind: Kind | None = None) -> Imported:
    """Turn a configuration of Neural Compressor or a recipe of SparseML into a recipe.

    Args:
        source: A file, or its text: YAML, JSON, markdown that begins with YAML, or a Python snippet such as
            ``WeightPruningConfig([...], target_sparsity=0.9)``, which is parsed and never run. A text of one line that names a
            file is that file.
        kind: Whose it is; recognized from the content where it is not said.

    Raises:
        RecipeError: It cannot be read or recognized, has a tag that asks for an object, or says something that no recipe can be
            (a sparsity above 1, for example); names the line where there is one.
    """
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"unknown kind {kind!r}{suggest(kind, KINDS)}")
    name, text = _text_of(source)
    ledger = Ledger()
    try:
        draft, found = _draft(text, kind, ledger)
        drop_unused(draft, ledger)
        ledger.entries.sort(key=lambda entry: entry.line)
        written = write_draft(draft, name, found, ledger)
        recipe = Recipe.parse(written)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
    return Imported(recipe, written, tuple(ledger.entries), tuple(ledger.notes), found)


def _text_of(source: Path | str) -> tuple[str, str]:
    """The name and the text of a source."""
    if isinstance(source, str):
        single = "\n" not in source and len(source) < 1000
        if not single or not Path(source).is_file():
            return "text", source
    path = Path(source)
    try:
        return path.name, path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from None


def _draft(text: str, kind: Kind | None, ledger: Ledger) -> tuple[RecipeDraft, Kind]:
    if kind != "sparseml" and is_snippet(text):
        nodes, ignored = read_snippet(text)
        for line, source in ignored:
            ledger.add(line, source, "neither a configuration nor plain data; nothing was made of it")
        return import_objects(nodes, ledger), "inc"
    try:
        root = read_document(text)
        found = _recognized(root) if kind is None else kind
    except RecipeError:
        if mentions_config(text):
            read_snippet(text)  # says where the Python is wrong
        raise
    return _from_document(root, kind, found, ledger)


def _from_document(root: Node, said: Kind | None, kind: Kind, ledger: Ledger) -> tuple[RecipeDraft, Kind]:
    if said is not None and not {"inc": looks_like_inc, "sparseml": looks_like_sparseml}[said](root):
        raise RecipeError(f"nothing in it belongs to a {kind} file; leave the kind out to recognize it by its content")
    return (import_sparseml if kind == "sparseml" else import_inc)(root, ledger), kind


def _recognized(root: Node) -> Kind:
    if "pipeline" in root.mapping or "stages" in root.mapping:
        raise RecipeError("it is a recipe of graphprune already; graphprune recipe show prints it")
    if looks_like_sparseml(root):
        return "sparseml"
    if looks_like_inc(root):
        return "inc"
    raise RecipeError(
        "neither a SparseML recipe (a key with 'modifiers') nor a Neural Compressor configuration (pruning, quantization or "
        "distillation; keys such as pruning_configs or target_sparsity; WeightPruningConfig(...)) is in it"
    )
