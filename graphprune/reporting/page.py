"""The page: what was found of an artifact, as one HTML text with style and script inside."""

from __future__ import annotations

import base64
import hashlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from graphprune.artifact.contenders import describe
from graphprune.artifact.manifest import Manifest
from graphprune.artifact.verification import Report
from graphprune.reporting.charts import bar, column_chart
from graphprune.reporting.collect import Findings, Layer
from graphprune.reporting.curves import draw_curves
from graphprune.reporting.latency import headline, latency_groups, model_sizes

_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4}
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Tile:
    """A key figure.

    Attributes:
        key: What it is, for whoever reads the page by program.
        label: What it is, for people.
        value: The number itself.
        shown: The number as text.
        unit: Its unit, or nothing.
        note: A line below it.
    """

    key: str
    label: str
    value: float
    shown: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A labeled bar of a group of bars.

    Attributes:
        key: As for a tile.
        label: What is measured.
        value: The number itself.
        shown: The number as text, with its unit.
        drawn: The bar.
    """

    key: str
    label: str
    value: float
    shown: str
    drawn: Markup


@dataclass(frozen=True)
class Asked:
    """A sparsity pattern, what was asked of it and what was measured.

    Attributes:
        pattern: Its text.
        asked: Sparsities that passes of the recipe name together with it.
        layers: Layers that have it.
        measured: Their sparsity together, in units of the pattern.
        support: What the target does with it, or nothing.
    """

    pattern: str
    asked: tuple[str, ...]
    layers: int
    measured: float
    support: str


def verdict(verification: Report | None) -> str:
    """What the checks come to, in a few words."""
    if verification is None:
        return "not checked"
    failed = sum(not check.passed for check in verification.checks)
    return f"NOT verified: {failed} of {len(verification.checks)} checks failed" if failed else "verified"


def render(findings: Findings) -> str:
    """The page as HTML. Every text of the artifact is escaped."""
    manifest = findings.manifest
    style, script = _resource("style.css"), _resource("script.js")
    return str(
        _environment()
        .get_template("page.html.j2")
        .render(
            findings=findings,
            manifest=manifest,
            title=manifest.model.rpartition(":")[2].rpartition(".")[2] or manifest.model,
            state=_state(findings.verification),
            tiles=_tiles(findings),
            asked=_asked(findings),
            columns=_columns(findings.layers) if findings.layers else None,
            curves=draw_curves(findings.training),
            latencies=latency_groups(findings.measured) if findings.measured else [],
            model_bars=_model_bars(findings),
            weight_bars=_weight_bars(manifest),
            file_bars=_file_bars(manifest),
            parity_share=manifest.parity.max_abs / manifest.parity.tolerance if manifest.parity.tolerance > 0 else 0.0,
            bar=bar,
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        )
    )


@cache
def _resource(name: str) -> str:
    return files("graphprune.reporting").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    jinja = importlib.import_module("jinja2")  # late, since most commands do without
    environment = jinja.Environment(
        loader=jinja.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_size, "breakable": _breakable, "option": _option, "short": _short}
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def format_size(count: float) -> str:
    """Bytes with a decimal unit: ``23.1 MB``."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.{0 if power == 0 else 1}f} {_UNITS[power]}"


def _breakable(name: str) -> Markup:
    """A name that may be broken after its dots and before its capitals."""
    dotted = Markup(".<wbr>").join(escape(part) for part in name.split("."))
    return Markup(_CAPITAL.sub("<wbr>", dotted))


def _short(value: float) -> Markup:
    """Three digits, ``2.38 × 10`` and a raised power where that is shorter than zeros."""
    text, _, power = f"{value:.3g}".partition("e")
    raised = Markup("<sup>{}</sup>").format(f"{int(power)}".replace("-", "\N{MINUS SIGN}")) if power else ""
    return (
        Markup("{}\N{THIN SPACE}\N{MULTIPLICATION SIGN}\N{THIN SPACE}10{}").format(text, raised)
        if power
        else Markup(escape(text))
    )


def _option(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_option(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def _state(verification: Report | None) -> str:
    return "unknown" if verification is None else "good" if verification.passed else "bad"


def _tiles(findings: Findings) -> list[Tile]:
    manifest = findings.manifest
    pruned = [site for site in manifest.sites if site.pattern is not None]
    overall = manifest.sparsity()
    patterns = ", ".join(dict.fromkeys(site.pattern or "" for site in pruned))
    tiles = [
        Tile(
            "sparsity", "Sparsity", overall, f"{overall:.4f}",
            note=f"{patterns} in {len(pruned)} of {len(manifest.sites)} layers" if pruned else "no layer was pruned",
        )
    ]  # fmt: skip
    size = describe(findings.folder, manifest).model_bytes
    shown, _, unit = format_size(size).partition(" ")
    total = sum(item.bytes for item in manifest.files)
    tiles.append(Tile("bytes", "Model files", size, shown, unit, f"{format_size(total)} with samples and companions"))
    tiles += _speed(findings)
    parity = manifest.parity
    tiles.append(
        Tile("parity.max_abs", "Largest difference", parity.max_abs, _short(parity.max_abs),
             note=Markup("to the Program; {} is allowed").format(_short(parity.tolerance)))
    )  # fmt: skip
    tiles += [
        Tile(f"metrics.{name}", name, value, f"{value:.4g}", note="stated") for name, value in manifest.metrics.items()
    ]
    return tiles


def _speed(findings: Findings) -> list[Tile]:
    found = None if findings.measured is None else headline(findings.measured)
    if found is None:
        return []
    ratio, note = found
    return [Tile("throughput_ratio", "Speed", ratio.median, f"{ratio.median:.2f}", "\N{MULTIPLICATION SIGN}", note)]


def _asked(findings: Findings) -> list[Asked]:
    wanted: dict[str, list[str]] = {}
    for step in findings.steps:
        pattern, sparsity = step.value("pattern"), step.value("sparsity")
        if pattern is not None and sparsity is not None:
            wanted.setdefault(str(pattern), []).append(str(sparsity))
    sites = findings.manifest.sites
    found = []
    for pattern in dict.fromkeys(site.pattern for site in sites if site.pattern is not None):
        names = [site.name for site in sites if site.pattern == pattern]
        support = findings.support.get(pattern)
        found.append(
            Asked(
                pattern, tuple(wanted.get(pattern, ())), len(names), findings.manifest.sparsity(names),
                "" if support is None else support.value,
            )
        )  # fmt: skip
    return found


def _columns(layers: Sequence[Layer]) -> Markup:
    values = [layer.entry.sparsity for layer in layers]
    label = f"Sparsity of {len(layers)} layers in the order of the model, from {min(values):.4f} to {max(values):.4f}"
    css = ["pruned" if layer.entry.pattern is not None else "dense" for layer in layers]
    return column_chart(values, [layer.entry.name for layer in layers], css, label)


def _weight_bars(manifest: Manifest) -> list[Bar]:
    """Bytes of the weights of all layers: as float32, as stored, and of the ones that are not zero."""
    sites = manifest.sites
    if not sites or any(site.stored not in _BITS for site in sites):
        return []
    dense = sum(site.weights for site in sites) * 4
    stored = sum(site.weights * _BITS[site.stored] for site in sites) / 8
    kept = sum((site.weights - site.zeros) * _BITS[site.stored] for site in sites) / 8
    formats = ", ".join(dict.fromkeys(site.stored for site in sites))
    rows = (
        ("weights.float32", "dense, as float32", dense, "muted"),
        ("weights.stored", f"as stored ({formats})", stored, ""),
        ("weights.kept", "not zero, as stored", kept, ""),
    )
    return [
        Bar(key, label, value, format_size(value), bar(value / max(dense, 1), css)) for key, label, value, css in rows
    ]


def _model_bars(findings: Findings) -> list[Bar]:
    if findings.measured is None:
        return []
    return [
        Bar(f"models.{name}", name, size, shown, drawn)
        for name, size, shown, drawn in model_sizes(findings.measured, format_size)
    ]


def _file_bars(manifest: Manifest) -> list[Bar]:
    longest = max((item.bytes for item in manifest.files), default=1)
    ordered = sorted(manifest.files, key=lambda item: -item.bytes)
    return [
        Bar(f"files.{item.name}", item.name, item.bytes, format_size(item.bytes), bar(item.bytes / max(longest, 1)))
        for item in ordered
    ]
