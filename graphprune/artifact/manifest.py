"""The manifest: what an artifact is said to be, measured when it was written, checked again by ``verify``."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from graphprune.artifact.files import MANIFEST, written
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern

FORMAT = 2
_DIGEST = "sha256"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Entry):
    """One file of the artifact."""

    name: str
    bytes: int
    sha256: str


class InputEntry(_Entry):
    """One input of the model.

    Attributes:
        name: Its name in the source model's ``forward``.
        dtype: Its dtype, such as ``int64``.
        shape: One entry a dimension: a size, or the name of one that is free.
    """

    name: str
    dtype: str
    shape: list[int | str]


class SiteEntry(_Entry):
    """One prunable weight, as measured on the lowered file.

    Attributes:
        name: The source's parameter name.
        layout: ``out_in``, ``in_out`` or ``conv``.
        weights: How many weights it has.
        pattern: The sparsity pattern that it was pruned to, None if it was not.
        sparsity: Fraction of weights in fully pruned units of the pattern (of zeros, where there is no pattern).
        zeros: Number of stored weights that are zero.
        zeros_sha256: SHA-256 of the packed bitmap of zeros, rows of the logical ``[out, in * kernel]`` first.
        pattern_holds: The stored zeros hold every unit that the Program had pruned; None without a pattern.
        zeros_at_zero_point: Every weight that is zero in the Program is stored as zero (as its zero-point, if quantized).
        stored: Number format in the file, such as ``float32`` or ``int8``.
        kernel: Kernel positions of a convolution; with ``groups`` it says where the channels of the logical matrix lie.
        groups: Groups of a convolution.
    """

    name: str
    layout: str
    weights: int
    pattern: str | None
    sparsity: float
    zeros: int
    zeros_sha256: str
    pattern_holds: bool | None
    zeros_at_zero_point: bool
    stored: str
    kernel: int = 1
    groups: int = 1

    @property
    def bound_pattern(self) -> Pattern | None:
        """The pattern for the geometry of this weight, if it was pruned."""
        return (
            None if self.pattern is None else parse_pattern(self.pattern).bound(kernel=self.kernel, groups=self.groups)
        )


class Parity(_Entry):
    """How far the lowered model's outputs are from the Program's, on the stored samples.

    Attributes:
        max_abs: Largest absolute difference.
        tolerance: Largest allowed difference.
        worst_node: The output where the largest difference is.
        steps: For quantized Programs, the largest difference in quantization steps, each the range of an output / 255; else
            None, as in artifacts of older versions.
    """

    max_abs: float
    tolerance: float
    worst_node: str
    steps: float | None = None


class Manifest(_Entry):
    """Everything that is said of an artifact. Its file ends in a digest of all the rest, so that an edit of it is seen.

    All of it is measured, but ``metrics``: what the user measured of the model and stated, by name.
    """

    format: int
    target: str
    options: dict[str, Any]
    recipe: str
    versions: dict[str, str]
    model: str
    inputs: list[InputEntry]
    outputs: list[str]
    files: list[FileEntry]
    sites: list[SiteEntry]
    parity: Parity
    coverage: dict[str, list[str]]
    passes: dict[str, int] = {}
    metrics: dict[str, float] = {}

    def sparsity(self, names: Collection[str] | None = None) -> float:
        """Sparsity over several sites together, each in units of its pattern.

        Args:
            names: Which sites; None takes those that were pruned.

        Returns:
            Fraction in [0, 1]; 0 where there are no such sites.
        """
        chosen = [site for site in self.sites if (site.pattern is not None if names is None else site.name in names)]
        total = sum(site.weights for site in chosen)
        return sum(site.sparsity * site.weights for site in chosen) / total if total else 0.0

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        content = self.model_dump()
        text = json.dumps({**content, _DIGEST: _digest(content)}, indent=2)
        with written(folder / MANIFEST) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            VerifyError: It is missing, damaged, of another version, or was edited.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise VerifyError(f"{folder} is no artifact: it has no {MANIFEST}; graphprune export writes one")
        try:
            content = json.loads(path.read_bytes())
            written, stated = content.get("format"), content.pop(_DIGEST, None)
            if written != FORMAT:
                raise ValueError(f"it has format {written!r}, and this version reads {FORMAT}")
            if stated != _digest(content):
                raise ValueError("it was edited after it was written, so nothing that it says can be trusted")
            manifest = cls.model_validate_json(json.dumps(content))
            manifest._check_paths()
        except (ValidationError, ValueError, AttributeError, OSError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise VerifyError(f"{path} is damaged: {detail}; export the artifact again") from None
        return manifest

    def _check_paths(self) -> None:
        """Raise ValueError where a file would lie outside of the artifact."""
        for entry in self.files:
            path = PurePosixPath(entry.name)
            if path.is_absolute() or ".." in path.parts or "\\" in entry.name or not path.parts:
                raise ValueError(f"it lists {entry.name!r}, which lies outside of the artifact")


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as a manifest holds them.

    Raises:
        GraphPruneError: A name is empty, or a value is no finite number.
    """
    found = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not str(name).strip() or not math.isfinite(number):
            raise GraphPruneError(f"metric {name!r} is {value!r}; give each metric a name and a finite number")
        found[str(name)] = number
    return found


def digest_of_zeros(zeros: np.ndarray) -> str:
    """SHA-256 of a bool matrix, packed eight entries a byte."""
    return hashlib.sha256(np.packbits(np.ascontiguousarray(zeros)).tobytes()).hexdigest()


def versions() -> Mapping[str, str]:
    """Versions of Python and of the libraries that shape an artifact, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("graphprune", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "deepsparse"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
