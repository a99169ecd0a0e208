"""Look into an AOTInductor package: the constants that its library holds, which of them are weights, and the CPU it was made for."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import LoweringError

_CPU = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}
"""Instruction sets as Inductor names them, and the function of ``torch.cpu`` that tells whether the CPU has one."""


@dataclass(frozen=True)
class Constant:
    """A constant as the library holds it.

    Attributes:
        values: Dense, whatever layout the library has it in.
        packed: Whether it lies in a layout of oneDNN's own kernels.
    """

    values: Tensor
    packed: bool


@dataclass(frozen=True)
class Place:
    """Where a weight lies.

    Attributes:
        constant: Name of the constant that holds it.
        shape: Its shape in the source model.
        transposed: Whether the constant is its transpose.
        scale: Name of the constant of its scales; None for floats.
        zero_point: Name of the constant of its zero-points; None where nothing reads one.
    """

    constant: str
    shape: tuple[int, ...]
    transposed: bool
    scale: str | None = None
    zero_point: str | None = None

    def weight(self, constants: Mapping[str, Constant]) -> Tensor:
        """The weight in the shape that it has in the source model."""
        values = constants[self.constant].values
        if not self.transposed:
            return values.reshape(self.shape)
        return values.reshape(self.shape[::-1]).t()


def read_constants(path: Path) -> dict[str, Constant]:
    """Load a package's library and copy the constants out of it, those in packed layouts too.

    Args:
        path: The ``.pt2`` file.

    Returns:
        By the names that ``AOTIModelPackageLoader`` knows them by.

    Raises:
        LoweringError: The file is damaged, or was made for another CPU.
    """
    check_package(path)
    aoti: Any = importlib.import_module("torch._C._aoti")
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        with zipfile.ZipFile(path) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            if len(libraries) != 1:
                raise LoweringError(f"{path} holds {len(libraries)} libraries, not one; lower the Program again")
            library = archive.extract(libraries[0], folder)
        try:
            runner = aoti.AOTIModelContainerRunnerCpu(library, 1)
            found = runner.extract_constants_map(False)
            return {
                name: Constant(value.to_dense() if value.is_mkldnn else value.clone(), bool(value.is_mkldnn))
                for name, value in found.items()
            }
        except RuntimeError as error:
            raise LoweringError(f"{path} cannot be loaded: {_first_line(error)}; lower the Program again") from error


def check_package(path: Path) -> None:
    """Check a package before its library is loaded, because a damaged library, or one for another CPU, kills the process.

    Raises:
        LoweringError: It is missing or damaged, or was made for another CPU; says for which.
    """
    if not path.is_file():
        raise LoweringError(f"{path.parent} holds no {path.name}; lower a Program into it first")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            notes = [name for name in archive.namelist() if name.endswith("wrapper_metadata.json")]
            metadata = json.loads(archive.read(notes[0])) if notes else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise LoweringError(f"{path} is damaged: {error}; lower the Program again") from error
    if broken is not None or not isinstance(metadata, dict):
        raise LoweringError(f"{path} is damaged at {broken or 'its metadata'}; lower the Program again")
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
    for key, value in here.items():
        if metadata.get(key, value) != value:
            raise LoweringError(
                f"{path} was compiled for {metadata[key]}, and this is {value}; lower the Program on a machine of this kind"
            )
    lacking = [word for word in metadata.get("AOTI_CPU_ISA", "").split() if not _has(word)]
    if lacking:
        raise LoweringError(
            f"{path} was compiled for a CPU with {', '.join(lacking)}, which this one lacks; lower the Program on a CPU of this kind"
        )


def _has(word: str) -> bool:
    asked = getattr(torch.cpu, _CPU.get(word, ""), None)
    return asked is None or bool(asked())


def find_places(
    constants: Mapping[str, Constant], weights: Mapping[str, Tensor], scales: Mapping[str, tuple[str, str]]
) -> dict[str, Place]:
    """Find weights among constants by their values, because freezing names constants anew.

    Args:
        constants: From ``read_constants``.
        weights: What to find, by name: integers where there is an entry in ``scales``.
        scales: Names of the buffers of scales and zero-points, by name of the weight.

    Returns:
        Places by name; two equal weights get two constants as long as there are two. What cannot be found is absent.
    """
    by_digest: dict[str, list[str]] = {}
    for name, constant in sorted(constants.items(), key=lambda item: (not item[1].packed, item[0])):
        by_digest.setdefault(_digest(constant.values), []).append(name)
    found = {}
    for name, weight in weights.items():
        forms = (False, True) if weight.dim() == 2 else (False,)
        for transposed in forms:
            candidates = by_digest.get(_digest(weight.t() if transposed else weight))
            if candidates:
                scale, zero_point = scales.get(name, (None, None))
                found[name] = Place(
                    candidates.pop(0) if len(candidates) > 1 else candidates[0],
                    tuple(weight.shape),
                    transposed,
                    scale if scale in constants else None,
                    zero_point if zero_point in constants else None,
                )
                break
    return found


def write_places(path: Path, places: Mapping[str, Place], rest: Mapping[str, object]) -> None:
    """Write the note beside a package: what its inputs are and where its weights lie."""
    content = {**rest, "weights": {name: asdict(place) for name, place in places.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_note(path: Path) -> dict[str, Any]:
    """Read what ``write_places`` wrote; places as ``Place`` under ``weights``.

    Raises:
        LoweringError: It is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        content["weights"] = {
            name: Place(**{**place, "shape": tuple(place["shape"])}) for name, place in content["weights"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoweringError(f"{path} cannot be read: {error}; lower the Program again") from error
    return content


def _digest(values: Tensor) -> str:
    """Of dtype and content in row order; shapes differ between layouts."""
    flat = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{values.dtype} {hashlib.sha256(flat.tobytes()).hexdigest()}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
