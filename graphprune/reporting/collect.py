"""What a report says, read from an artifact's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np

from graphprune.artifact.advice import pattern_row
from graphprune.artifact.manifest import Manifest, SiteEntry, digest_of_zeros
from graphprune.artifact.training_file import read_training
from graphprune.artifact.verification import Report, examine
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.ir.training_log import LogPoint
from graphprune.pipeline.registry import find_target, known_passes, make_target
from graphprune.pipeline.remote import stored_weights
from graphprune.pipeline.target import Support
from graphprune.pipeline.text import parse_pipeline
from graphprune.reporting.latency import Measured, read_benchmark
from graphprune.reporting.masks import Picture, corner, density

_WORTH = 12  # letters of a prefix that an ellipsis may stand for
_TELLING = ("pattern", "sparsity", "criterion", "schedule", "scheme", "preset")


@dataclass(frozen=True)
class Step:
    """One pass of the recipe, as it was asked for.

    Attributes:
        name: Of the pass.
        options: Names and values that the recipe says.
        defaults: Names and values of its other options; none where the pass is not installed.
    """

    name: str
    options: Mapping[str, object]
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, object]:
        """Options that the recipe says, after those that matter most, said or not."""
        return {name: value for name in _TELLING if (value := self.value(name)) is not None} | dict(self.options)

    @property
    def rest(self) -> dict[str, object]:
        """All other options."""
        return {name: value for name, value in self.defaults.items() if name not in _TELLING}

    def value(self, name: str) -> object | None:
        """Of an option, said or not; None where there is none."""
        return self.options.get(name, self.defaults.get(name))


@dataclass(frozen=True)
class Layer:
    """One prunable weight, as the manifest states it and as the file shows it.

    Attributes:
        entry: What the manifest says.
        label: Its name, with an ellipsis for what most names begin with.
        shape: ``(out, in * kernel)``; None where the file could not be read.
        density: Picture of the whole mask.
        corner: Picture of its first weights.
        differs: The zeros in the file are not those of the manifest.
    """

    entry: SiteEntry
    label: str
    shape: tuple[int, int] | None = None
    density: Picture | None = None
    corner: Picture | None = None
    differs: bool = False


@dataclass(frozen=True)
class Findings:
    """All that a page shows of an artifact.

    Attributes:
        folder: Of the artifact.
        manifest: Its manifest.
        steps: Passes of its recipe; none where the text cannot be read as a pipeline.
        layers: Its prunable weights, in the manifest's order.
        prefix: What the names of most layers begin with.
        unreadable: Why no mask could be read; empty where they could.
        support: What the target does with each sparsity pattern in the artifact.
        training: Points of the training log.
        verification: Every check, repeated; None where that was not wanted.
        measured: A benchmark with this artifact in it.
    """

    folder: Path
    manifest: Manifest
    steps: tuple[Step, ...]
    layers: tuple[Layer, ...]
    prefix: str = ""
    unreadable: str = ""
    support: Mapping[str, Support] = field(default_factory=dict)
    training: tuple[LogPoint, ...] = ()
    verification: Report | None = None
    measured: Measured | None = None


def collect(folder: Path | str, *, bench: Path | str | None = None, verify: bool = True) -> Findings:
    """Read an artifact.

    Args:
        folder: An artifact.
        bench: What ``graphprune bench --out`` wrote.
        verify: Repeat every check.

    Raises:
        VerifyError: There is no artifact, or its manifest is damaged or was edited; without ``verify``, also where its model or
            its training log cannot be read.
        LoweringError: Its target is not installed.
        GraphPruneError: ``bench`` cannot be read, or has not this artifact.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VerifyError(f"{folder} is no folder; give the folder that graphprune export wrote")
    measured = None if bench is None else read_benchmark(bench, folder, Manifest.read(folder))
    verification = examine(folder) if verify else None
    manifest = Manifest.read(folder) if verification is None else verification.manifest
    prefix = _common_prefix([site.name for site in manifest.sites])
    broken = verification is not None and not verification.passed
    zeros, unreadable = _read_zeros(folder, manifest, tolerant=broken)
    try:
        training = read_training(folder)
    except VerifyError:
        if not broken:
            raise
        training = ()
    return Findings(
        folder=folder,
        manifest=manifest,
        steps=_steps(manifest.recipe),
        layers=tuple(_layer(site, prefix, zeros.get(site.name)) for site in manifest.sites),
        prefix=prefix,
        unreadable=unreadable,
        support=_support(manifest),
        training=training,
        verification=verification,
        measured=measured,
    )


def _read_zeros(folder: Path, manifest: Manifest, *, tolerant: bool) -> tuple[dict[str, np.ndarray], str]:
    """Zeros of each site in the lowered file, or why they cannot be read where a failed check has said so already."""
    target = make_target(manifest.target, manifest.options)
    try:
        stored = stored_weights(target, folder, {site.name: site.layout for site in manifest.sites})
    except GraphPruneError as error:
        if not tolerant:
            raise
        return {}, str(error)
    except Exception as error:  # a damaged file makes its reader fail in any way
        if not tolerant:
            raise VerifyError(f"the model in {folder} cannot be read: {error}; export it again") from error
        return {}, str(error)
    return {name: weight.zeros for name, weight in stored.items()}, ""


def _layer(entry: SiteEntry, prefix: str, zeros: np.ndarray | None) -> Layer:
    label = entry.name.removesuffix(".weight")
    if prefix and label.startswith(prefix):
        label = f"…{label.removeprefix(prefix)}"
    if zeros is None:
        return Layer(entry, label)
    rows, columns = zeros.shape
    differs = digest_of_zeros(zeros) != entry.zeros_sha256
    return Layer(entry, label, (rows, columns), density(zeros), corner(zeros), differs)


def _common_prefix(names: list[str]) -> str:
    """The longest row of modules, with its dot, that three quarters of the names begin with and that no number follows."""
    prefix, group = "", [name.split(".")[:-2] for name in names]  # keep the layer's own name and that of its weight
    for depth in range(max(map(len, group), default=0)):
        following = Counter(".".join(parts[: depth + 1]) + "." for parts in group if len(parts) > depth)
        longer, count = following.most_common(1)[0]
        numbered = any(name.startswith(longer) and name[len(longer) :].split(".")[0].isdigit() for name in names)
        if count < max(3, 0.75 * len(names)) or numbered:
            break
        prefix = longer
    return prefix if len(prefix) >= _WORTH else ""


def _steps(recipe: str) -> tuple[Step, ...]:
    try:
        return tuple(Step(name, options, _defaults(name, options)) for name, options in parse_pipeline(recipe))
    except GraphPruneError:  # written by a version with another grammar; the page shows the text as it is
        return ()


def _defaults(name: str, options: Mapping[str, object]) -> dict[str, object]:
    known = known_passes().get(name)
    listed = () if known is None else fields(known)
    return {item.name: item.default for item in listed if item.name not in options and item.default is not MISSING}


def _support(manifest: Manifest) -> dict[str, Support]:
    table = find_target(manifest.target).capabilities()
    found = {}
    for text in dict.fromkeys(site.pattern for site in manifest.sites if site.pattern is not None):
        support = table.get(pattern_row(text))
        if support is not None:
            found[text] = support
    return found
