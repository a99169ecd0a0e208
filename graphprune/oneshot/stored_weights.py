"""The weights of a walk through a checkpoint: read when a node needs them, dropped after, written into copies of the shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.ir.masking import MaskedSite
from graphprune.ir.program import Program
from graphprune.oneshot.shards import DTYPES, Stored, patch_tensor, read_tensor
from graphprune.oneshot.weights import Meter
from graphprune.sparsity.layout import from_logical


class StoredWeights:
    """Tensors by their names in a Program, from a checkpoint.

    Args:
        program: The Program, on the meta device, in the dtype to compute in.
        index: Where each tensor of the checkpoint lies.
        source: Folder of the checkpoint.
        work: Folder with copies of its shards that are written to.
        buffers: Values of buffers that are in no checkpoint.
        keys: Names in the checkpoint of each parameter and buffer; see ``match_names``.
        device: Where tensors are needed.
        meter: Counts what is in memory.

    Attributes:
        done: Names of pruned weights; they are read from the copies.
    """

    def __init__(
        self,
        program: Program,
        index: Mapping[str, Stored],
        source: Path,
        work: Path,
        buffers: Mapping[str, Tensor],
        keys: Mapping[str, tuple[str, ...]],
        *,
        device: torch.device,
        meter: Meter,
    ) -> None:
        self.program, self.index, self.source, self.work = program, index, source, work
        self.buffers, self.device, self.meter = buffers, device, meter
        self.done: set[str] = set()
        self._keys = keys
        self._held: dict[str, Tensor] = {}
        self._counted = 0

    def keys(self, name: str) -> tuple[str, ...]:
        """Names in the checkpoint of one parameter or buffer; several where a tied weight is stored several times."""
        return self._keys.get(name, ())

    def checked(self, name: str) -> str:
        """Return the name; GraphPruneError where the checkpoint has no such tensor, or not as the model has it."""
        keys, wanted = self.keys(name), tuple(self.program.tensor(name).shape)
        if not keys:
            raise GraphPruneError(
                f"{self.source} has no tensor for {name}, which is needed; the model is {self.program.name}: check that "
                f"architectures in config.json fits the weights"
            )
        place = self.index[keys[0]]
        if place.shape != wanted or place.dtype not in DTYPES:
            raise GraphPruneError(
                f"{self.source / place.file}: {keys[0]} is {place.dtype} {list(place.shape)}, the model's is {list(wanted)}; only "
                f"unquantized weights of the same shape can be pruned"
            )
        return name

    def size(self, name: str) -> int:
        """Bytes of a tensor in memory; 0 for buffers that are in no checkpoint."""
        if name in self._held or not self.keys(name):
            return 0
        tensor = self.program.tensor(name)
        return tensor.numel() * tensor.element_size()

    def read(self, name: str) -> Tensor:
        """Read a tensor, or return it where it was read since the last ``drop``."""
        if name in self._held:
            return self._held[name]
        if not self.keys(name):
            return self._unstored(name)
        key, size = self.keys(self.checked(name))[0], self.size(name)
        value = read_tensor(self.work if name in self.done else self.source, key, self.index[key])
        dtype = self.program.tensor(name).dtype if value.is_floating_point() else value.dtype
        self._held[name] = value.to(self.device, dtype)
        self._counted += size
        self.meter.add(size)
        return self._held[name]

    def _unstored(self, name: str) -> Tensor:
        value = self.buffers.get(name)
        if value is None:
            value = self.program.tensor(name)
            if value.is_meta:
                self.checked(name)
        return value.to(self.device, self.program.tensor(name).dtype)

    @torch.no_grad()
    def write(self, site: MaskedSite, weight: Tensor, mask: Tensor) -> None:
        """Write a pruned weight into the copies, in the dtype of the checkpoint."""
        pruned = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        stored = from_logical(pruned, site.decision.layout, tuple(site.weight.shape))
        for key in self.keys(site.name):
            place = self.index[key]
            patch_tensor(self.work, place, stored.to(DTYPES[place.dtype]))
        self.done.add(site.name)

    def drop(self) -> None:
        """Free what was read."""
        self._held.clear()
        self.meter.add(-self._counted)
        self._counted = 0
