"""Weights that are sharded over processes (FSDP2's DTensor), seen whole, and whole masks cut like them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PART = 1 << 20


def first_process() -> bool:
    """Whether this process is alone, or the first of the default group: the one that writes files."""
    return not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor gathered from all processes, any other tensor as it is.

    Every process of the tensor's mesh must call it at the same point.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor cut as ``reference`` is, without communication; ``value`` itself where that is no DTensor.

    Args:
        value: The same on every process, shape of ``reference``.
        reference: A DTensor or an ordinary tensor.
    """
    if not is_sharded(reference):
        return value
    from torch.distributed.tensor import distribute_tensor  # only processes of a distributed run load it

    shards: Any = reference
    return distribute_tensor(value, shards.device_mesh, shards.placements, src_data_rank=None)


@torch.no_grad()
def gather_into(sharded: nn.Module, plain: nn.Module) -> None:
    """Copy all parameters and buffers of a module that FSDP2 shards into an unsharded one of the same names.

    Every process of the mesh must call it.

    Args:
        sharded: Left as it is.
        plain: Mutated; on any device.
    """
    values = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, value in (*sharded.named_parameters(), *sharded.named_buffers()):
        values[name].copy_(whole(value.detach()))


def differing(tensors: dict[str, Tensor]) -> str | None:
    """Compare tensors over all processes of the default group.

    Args:
        tensors: Bool tensors by name, the same names everywhere.

    Returns:
        The name of one that differs, or None. None also where nothing is distributed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    sums = torch.stack([_fingerprint(value) for value in tensors.values()])
    least, most = sums.clone(), sums.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    different = (least != most).flatten().nonzero()
    return list(tensors)[int(different[0])] if len(different) else None


def _fingerprint(mask: Tensor) -> Tensor:
    """An int64 that two masks share only by a rare accident: the sum of pseudo-random numbers of the kept places."""
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    flat = mask.reshape(-1)
    for start in range(0, len(flat), _PART):
        places = flat[start : start + _PART].nonzero().flatten() + start
        total += (places * 0x9E3779B1 % 0x7FFFFFFF).sum()
    return total
