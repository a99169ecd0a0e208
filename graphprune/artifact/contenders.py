"""Read artifacts to be compared: what each is, whether they are of one model, and what a reader of the comparison must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphprune.artifact.advice import pattern_row
from graphprune.artifact.comparison import CORNERS, Contender
from graphprune.artifact.manifest import Manifest
from graphprune.artifact.nodes import NODES
from graphprune.artifact.samples import INPUTS, OUTPUTS
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.pipeline.registry import known_targets, make_target
from graphprune.pipeline.target import Support, Target

_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_BESIDE = (".json", ".jsonl", ".txt", ".md", ".npz", ".jinja")
"""Endings of files that a runtime does not need, such as those of configurations and tokenizers."""
_HALF = 0.5


@dataclass(frozen=True)
class Entry:
    """An artifact with what it takes to run it."""

    folder: Path
    manifest: Manifest
    target: Target
    contender: Contender


def read_entries(folders: Sequence[Path | str]) -> list[Entry]:
    """Read artifacts that are to be compared.

    Args:
        folders: Artifacts of one model, of any targets; at least one.

    Raises:
        VerifyError: One is no artifact, its manifest is damaged or was edited, or a file is missing or of another size.
        GraphPruneError: None is given, one comes twice, or two are of different models.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise GraphPruneError("no artifact is given; give folders that graphprune export wrote")
    for path in paths:
        if not path.is_dir():
            raise VerifyError(f"{path} is no folder; give folders that graphprune export wrote")
    known: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in known:
            other = known[path.resolve()]
            raise GraphPruneError(f"{path} is given twice" + ("" if other == path else f", also as {other}"))
        known[path.resolve()] = path
    entries = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    for entry in entries[1:]:
        _check_same_model(entries[0], entry)
    return entries


def _read(folder: Path, name: str) -> Entry:
    manifest = Manifest.read(folder)
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            fault = "is missing" if not path.is_file() else f"has {path.stat().st_size:,} bytes, not {file.bytes:,}"
            raise VerifyError(f"{path} {fault}; see graphprune verify {folder}")
    return Entry(folder, manifest, make_target(manifest.target, manifest.options), describe(folder, manifest, name))


def describe(folder: Path, manifest: Manifest, name: str = "") -> Contender:
    """Say what an artifact is.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        name: How to call it; by default as its folder.
    """
    pruned = [site for site in manifest.sites if site.pattern is not None]
    total = sum(site.weights for site in manifest.sites)
    zeros = sum(site.zeros for site in manifest.sites) / total if total else 0.0
    sparse = manifest.sparsity() > 0 if pruned else zeros >= _HALF
    stored = Counter[str]()
    for site in manifest.sites:
        stored[_FORMATS.get(site.stored, site.stored)] += site.weights
    number_format, weights = stored.most_common(1)[0] if stored else ("fp32", 1)
    computed = _FORMATS.get(str(manifest.options.get("precision")), manifest.options.get("precision"))
    if number_format == "fp32" and computed in ("bf16", "fp16"):
        number_format = str(computed)  # numpy has no bfloat16, so weights in it are measured as float32
    if number_format in _FORMATS.values() and manifest.parity.steps is not None:
        number_format = f"quantized {number_format}"  # computed in floats, whose values are those of integers
    beside = [file.bytes for file in manifest.files if _is_beside(file.name)]
    size = sum(file.bytes for file in manifest.files)
    return Contender(
        name=name or folder.name,
        folder=str(folder),
        target=manifest.target,
        options=dict(manifest.options),
        sparse=sparse,
        pattern=",".join(dict.fromkeys(str(site.pattern) for site in pruned)) if sparse else "",
        sparsity=(manifest.sparsity() if pruned else zeros) if sparse else 0.0,
        number_format=number_format,
        share=weights / (total or 1),
        model_bytes=size - sum(beside),
        folder_bytes=size + (folder / "manifest.json").stat().st_size,
    )


def _is_beside(name: str) -> bool:
    return name.split("/")[0] in (INPUTS, OUTPUTS) or name == NODES or name.endswith(_BESIDE)


def _names(paths: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to make them differ."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(item[-count:]) for item in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _check_same_model(first: Entry, other: Entry) -> None:
    a, b = first.manifest, other.manifest
    if a.model != b.model:
        difference = f"the first is of {a.model}, the second of {b.model}"
    elif different := sorted({site.name for site in a.sites} ^ {site.name for site in b.sites}):
        where = first.folder if different[0] in {site.name for site in a.sites} else other.folder
        difference = f"only {where} has {different[0]}"
    elif set(a.outputs) != set(b.outputs):
        difference = f"the first has the outputs {', '.join(a.outputs)}, the second {', '.join(b.outputs)}"
    else:
        return
    raise GraphPruneError(
        f"{first.folder} and {other.folder} are of different models: {difference}; compare artifacts of one model"
    )


def notes_on(entries: Sequence[Entry]) -> tuple[str, ...]:
    """What a reader of the comparison must know: corners that are missing, and what an engine makes no use of."""
    notes = []
    for target in dict.fromkeys(entry.manifest.target for entry in entries):
        mine = [entry for entry in entries if entry.manifest.target == target]
        table = known_targets()[target].capabilities()
        missing = [corner for corner in CORNERS if corner not in {entry.contender.corner for entry in mine}]
        if missing:
            refused = [corner for corner in missing if table.get(corner.split()[1]) is Support.REFUSED]
            more = f" ({', '.join(refused)}: the target refuses the format)" if refused else ""
            notes.append(
                f"{target}: {', '.join(missing)} not measured{more}; without all four corners, do not read one ratio as the gain of "
                f"sparsity, of int8 or of the engine"
            )
        unused = [pattern for pattern in _patterns(mine) if table.get(pattern_row(pattern)) is not Support.EXPLOITED]
        if unused:
            notes.append(f"{target} does not exploit {', '.join(unused)}: zeros are not expected to make it faster")
        notes += [text for entry in mine if (text := _in_float(entry))]
    return tuple(notes)


def _patterns(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(site.pattern for entry in entries for site in entry.manifest.sites if site.pattern))


def _in_float(entry: Entry) -> str:
    """A note on integer weights that are multiplied as floats."""
    names = set(entry.manifest.coverage.get("float kernel", ())) & {
        site.name for site in entry.manifest.sites if site.stored not in _FORMATS
    }
    if not names:
        return ""
    return f"{entry.contender.name}: {len(names)} of {len(entry.manifest.sites)} weights are integers in the file and floats in the kernel"
