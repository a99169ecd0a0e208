"""Where the packed weights lie in a package, and how they are read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from graphprune.errors import LoweringError
from graphprune.ir.program import Program
from graphprune.ir.sparse_operators import LAYERS, pack_bytes, read_argument, sparse_linear_int8
from graphprune.pipeline.target import StoredWeight
from graphprune.sparsity.packed import Packed, unpack_matrix
from graphprune.targets.inductor_model.package import Constant, find_places

_PARTS = ("values", "columns", "starts", "scales")


def packed_places(program: Program, constants: Mapping[str, Constant]) -> dict[str, dict[str, Any]]:
    """For each packed weight the constants that hold its parts.

    Args:
        program: That was compiled.
        constants: Of the package.

    Returns:
        By site: names of constants as ``values``, ``columns``, ``starts`` and, of integers, ``scales``; ``rows``, ``features``
        and ``step``, the scale of the activations.

    Raises:
        LoweringError: A part is not in the package.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in program.calls(*LAYERS):
        buffer = str(read_argument(node, "values").target)
        site = buffer.removesuffix("_values")
        parts = _PARTS if node.target is sparse_linear_int8 else _PARTS[:3]
        wanted = {part: program.tensor(str(read_argument(node, part).target)) for part in parts}
        places = find_places(constants, wanted, {})
        lacking = [part for part in parts if part not in places]
        if lacking:
            raise LoweringError(f"{', '.join(lacking)} of {site} are not in the package that was compiled")
        found[site] = {
            **{part: place.constant for part, place in places.items()},
            "rows": read_argument(node, "rows"),
            "features": int(node.args[0].meta["val"].shape[1]),  # type: ignore[union-attr]
        }
        if node.target is sparse_linear_int8:
            found[site]["step"] = _step(node.args[0])
    return found


def _step(panels: Any) -> float:
    """Scale of the bytes in panels, which are made by ``pack_bytes`` or by another layer."""
    return float(panels.args[1] if panels.target is pack_bytes else read_argument(panels, "scale"))


def packed_weights(
    places: Mapping[str, Mapping[str, Any]], constants: Mapping[str, Constant], wanted: Iterable[str]
) -> dict[str, StoredWeight]:
    """Packed weights in logical shape, by site."""
    found = {}
    for name in wanted:
        place = places.get(name)
        if place is None or any(place[part] not in constants for part in _PARTS if part in place):
            continue
        values, columns, starts = (constants[place[part]].values for part in _PARTS[:3])
        matrix = unpack_matrix(Packed(values, columns, starts), int(place["rows"]), int(place["features"]))
        if "scales" not in place:
            found[name] = StoredWeight(matrix.float().numpy())
            continue
        scales = constants[place["scales"]].values.numpy() / float(place["step"])
        found[name] = StoredWeight(matrix.numpy(), np.zeros(len(scales), np.int8), scales)
    return found
