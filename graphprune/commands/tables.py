"""Tables of what is installed, for ``graphprune passes`` and ``graphprune targets``; the latter as data too."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphprune.pipeline.registry import known_passes, known_targets
from graphprune.pipeline.target import FORMATS, PATTERNS, Target
from graphprune.pipeline.text import format_pass


def passes_table() -> Table:
    """Passes by name: options with defaults, properties, and what each does."""
    table = _table("pass", "does", "options", "requires", "establishes", "destroys", "forbids")
    for name, cls in known_passes().items():
        properties = (cls.requires, cls.establishes, cls.destroys, cls.forbids)
        shown = [str(item) if item else "-" for item in properties]
        _add(table, name, _first_line(cls), _options(cls), *shown)
    return table


def targets_table() -> Group:
    """What each target makes of every pattern and format, a column a target; remarks; options, and whether libraries are there."""
    targets = known_targets()
    numbers: dict[str, int] = {}  # of remarks, in the order in which a reader meets them
    tables = []
    for title, rows in (("sparsity pattern", PATTERNS), ("number format", FORMATS)):
        table = _table(title, *targets)
        for row in rows:
            cells = []
            for cls in targets.values():
                support = cls.capabilities().get(row)
                remark = cls.remarks.get(row)
                mark = f" ({numbers.setdefault(remark, len(numbers) + 1)})" if remark else ""
                cells.append(("not stated" if support is None else support.value) + mark)
            _add(table, row, *cells)
        tables.append(table)
    remarks = "\n".join(f"({number}) {text}" for text, number in numbers.items())
    about = _table("target", "does", "options", "libraries")
    for name, cls in targets.items():
        _add(about, name, _first_line(cls), _options(cls), _libraries(cls))
    below: tuple[str | Text, ...] = ("", Text(remarks)) if remarks else ()
    return Group(tables[0], "", tables[1], *below, "", about)


def describe_targets() -> dict[str, dict[str, object]]:
    """Each target by name as plain data: what it does, its options, capabilities, remarks and libraries."""
    return {
        name: {
            "does": _first_line(cls),
            "options": {item.name: None if item.default is MISSING else item.default for item in fields(cls)},
            "capabilities": {row: support.value for row, support in cls.capabilities().items()},
            "remarks": dict(cls.remarks),
            "libraries": _libraries(cls),
        }
        for name, cls in known_targets().items()
    }


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in ("pass", "target"))
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # as text, since rich reads N:M as an emoji and [..] as markup


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _options(cls: type[Any]) -> str:
    """``pattern=4x1, sparsity=0.8``; an option without default is shown as its bare name."""
    shown = []
    for item in fields(cls):
        if item.default is not MISSING:
            shown.append(format_pass("", {item.name: item.default})[1:-1])
        elif item.default_factory is not MISSING:
            shown.append(format_pass("", {item.name: item.default_factory()})[1:-1])
        else:
            shown.append(item.name)
    return ", ".join(shown) or "-"


def _libraries(cls: type[Target]) -> str:
    if not cls.extra:
        return "none needed"
    package, needed = _extra_of(cls)
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        return f"missing: {', '.join(missing)}; pip install '{package}[{cls.extra}]'"
    return "installed"


def _extra_of(cls: type[Target]) -> tuple[str, list[str]]:
    """The distribution that offers a target, and the distributions that its extra lists."""
    for point in entry_points(group="graphprune.targets"):
        if point.dist is not None and f"{cls.__module__}.".startswith(f"{point.value}."):
            wanted = re.compile(rf"([\w.-]+).*extra\s*==\s*['\"]{re.escape(cls.extra)}['\"]")
            matches = (wanted.match(text) for text in point.dist.requires or [])
            return point.dist.name, [match[1] for match in matches if match]
    return cls.__module__.partition(".")[0], []


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
