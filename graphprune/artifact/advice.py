"""Say before a model is lowered what its target will not make faster, and which pattern and which target would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from graphprune.artifact.manifest import Manifest
from graphprune.errors import SparsityError
from graphprune.ir.formats import formats_of
from graphprune.ir.masking import Pruned, masked_sites
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.pipeline.registry import find_target, known_targets
from graphprune.pipeline.target import PATTERNS, Support, Target
from graphprune.sparsity.channels import Channel
from graphprune.sparsity.grouped import NM
from graphprune.sparsity.patterns import parse_pattern
from graphprune.sparsity.tiled import Block, Unstructured

_ROWS = {Unstructured: "unstructured", Block: "NxM", NM: "N:M", Channel: "channel"}
_STORED = {"float16": "fp16", "bfloat16": "bf16"}
"""Rows of what a manifest calls by numpy's name."""


def pattern_row(pattern: str) -> str:
    """The row of a capability table that a sparsity pattern belongs to.

    Args:
        pattern: Its text, such as ``4x1``.

    Returns:
        One of ``graphprune.pipeline.target.PATTERNS``.

    Raises:
        SparsityError: The text names no pattern, or one that no row is for.
    """
    kind = type(parse_pattern(pattern))
    if kind not in _ROWS:
        raise SparsityError(f"capability tables have no row for pattern {pattern}")
    return _ROWS[kind]


def support_of(target: str, pattern: str) -> Support:
    """What a target does with weights of a sparsity pattern, by its table; stored only where the table does not say.

    Raises:
        RecipeError: The target is unknown.
        SparsityError: The pattern is.
    """
    return find_target(target).capabilities().get(pattern_row(pattern), Support.STORED)


def remarks_of(target: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """What a target's table adds to the rows of some patterns, such as a condition, each with its name and row."""
    cls = find_target(target)
    rows = dict.fromkeys(pattern_row(pattern) for pattern in patterns)
    return tuple(f"{target}, {row}: {cls.remarks[row]}" for row in rows if row in cls.remarks)


def advise(model: Program | Manifest, target: str | Target) -> tuple[str, ...]:
    """What a target will not make faster of a model, from the capability tables of all installed targets.

    Args:
        model: A Program before or after its masks are folded, or the manifest of an artifact, which knows of the formats of weights
            only.
        target: A target or its name; where the model is to run.

    Returns:
        One sentence or two for each sparsity pattern and number format that the target does not exploit, or exploits under a
        condition; none where there is nothing to say.

    Raises:
        RecipeError: There is no such target.
    """
    goal = find_target(target) if isinstance(target, str) else type(target)
    patterns = dict(_program_patterns(model) if isinstance(model, Program) else _manifest_patterns(model))
    formats = _program_formats(model) if isinstance(model, Program) else _manifest_formats(model)
    return tuple(
        text
        for row, what in (*patterns.items(), *formats.items())
        if (text := _advice(goal, row, what, "sparsity pattern" if row in PATTERNS else "number format"))
    )


def _advice(goal: type[Target], row: str, what: str, kind: str) -> str | None:
    table = goal.capabilities()
    support, remark = table.get(row, Support.STORED), goal.remarks.get(row)
    if support is Support.EXPLOITED:
        return f"{what}: target {goal.name} exploits {row} under a condition: {remark}" if remark else None
    did = {
        Support.STORED: "will not run faster for it, since its table says stored only",
        Support.IGNORED: "leaves it out, since its table says ignored",
        Support.REFUSED: "refuses it",
    }[support]
    text = f"{what}: target {goal.name} {did}{f' ({remark})' if remark else ''}"
    if kind == "sparsity pattern":
        mine = [name for name in PATTERNS if table.get(name) is Support.EXPLOITED]
        text += f"; it exploits {_listed(goal, mine)}" if mine else "; it exploits no sparsity pattern"
    others = _exploiting(goal, row)
    if others:
        return f"{text}. {row} is exploited by {others}"
    found = {name: _exploiting(goal, name) for name in PATTERNS} if kind == "sparsity pattern" else {}
    elsewhere = "".join(f"; {name} is exploited by {targets}" for name, targets in found.items() if targets)
    return f"{text}. No installed target exploits {row}{elsewhere}"


def _exploiting(goal: type[Target], row: str) -> str:
    """Other targets that exploit a row, in words."""
    return ", ".join(
        f"{name} ({cls.remarks[row]})" if row in cls.remarks else name
        for name, cls in known_targets().items()
        if cls is not goal and cls.capabilities().get(row) is Support.EXPLOITED
    )


def _listed(goal: type[Target], rows: list[str]) -> str:
    return ", ".join(f"{row} ({goal.remarks[row]})" if row in goal.remarks else row for row in rows)


def _program_patterns(program: Program) -> Iterator[tuple[str, str]]:
    """Rows with what they are in the Program, in words."""
    found: dict[str, list[tuple[int, int]]] = {}
    for site in masked_sites(program):
        if not site.mask.is_meta:
            kept = int(torch.count_nonzero(site.mask))
            found.setdefault(site.decision.pattern, []).append((site.mask.numel() - kept, site.mask.numel()))
    for item in find_sites(program)[0]:
        node = program.attribute(item.name)
        record = None if node is None else program.annotation(node, Pruned)
        weight = program.tensor(item.name)
        if record is not None and not weight.is_meta:
            zeros = weight.numel() - int(torch.count_nonzero(weight))
            found.setdefault(record.pattern, []).append((zeros, weight.numel()))
    yield from _patterns_in_words(found)


def _manifest_patterns(manifest: Manifest) -> Iterator[tuple[str, str]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for site in manifest.sites:
        if site.pattern is not None:
            found.setdefault(site.pattern, []).append((site.zeros, site.weights))
    yield from _patterns_in_words(found)


def _patterns_in_words(found: Mapping[str, list[tuple[int, int]]]) -> Iterator[tuple[str, str]]:
    rows: dict[str, list[str]] = {}
    for pattern, counts in found.items():
        share = sum(zeros for zeros, _ in counts) / max(1, sum(size for _, size in counts))
        if share:
            text = f"{_counted(len(counts), 'weight')} of pattern {pattern} at sparsity {share:.4f}"
            rows.setdefault(pattern_row(pattern), []).append(text)
    for row, texts in rows.items():
        yield row, " and ".join(texts)


def _program_formats(program: Program) -> dict[str, str]:
    return {row: f"{_counted(len(names), 'tensor')} in {row}" for row, names in formats_of(program).items()}


def _manifest_formats(manifest: Manifest) -> dict[str, str]:
    found: dict[str, int] = {}
    for site in manifest.sites:
        row = _STORED.get(site.stored, site.stored)
        if row != "float32":
            found[row] = found.get(row, 0) + 1
    return {row: f"{_counted(number, 'weight')} in {row}" for row, number in found.items()}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
