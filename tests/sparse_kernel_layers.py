"""Sparse linear layers on random values, as the kernels of target sparse-cpu see them, and what is right of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphprune.ir.sparse_operators import BYTE_ORDER, pack, pack_bytes, sparse_linear, sparse_linear_int8
from graphprune.sparsity.packed import pack_matrix

TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
ROWS = (1, 3, 4, 16, 17, 37)
FEATURES = (1, 3, 4, 21, 70)
DENSITIES = (0.0, 0.1, 0.5, 1.0)
SHAPES = tuple(itertools.product(TOKENS, ROWS, FEATURES))
STEP, ZERO = 0.03, 117
"""Scale and zero-point of activations."""


def weight_of(rows: int, features: int, density: float, block: int) -> Tensor:
    """Blocks of zeros, and between them one block row of nothing else wherever there are several."""
    kept = torch.rand(math.ceil(rows / block), features) < density
    if len(kept) > 1 and density < 1:
        kept[len(kept) // 2] = False
    return torch.randn(rows, features) * kept.repeat_interleave(block, 0)[:rows]


def bytes_of(x: Tensor) -> Tensor:
    """``x`` on the grid of activations, [tokens, features], int64."""
    return (torch.round(x / STEP) + ZERO).clamp(0, 255).to(torch.int64)


def rows_of(panels: Tensor, tokens: int) -> Tensor:
    """Panels back to [tokens, features]; what pads the last one is left out."""
    if panels.dtype is torch.uint8:
        in_order = torch.empty_like(panels)
        in_order[..., list(BYTE_ORDER)] = panels
        panels = in_order
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:tokens]


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    if activation == "none":
        return x
    return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def expect_close(what: str, have: Tensor, want: Tensor, largest: Tensor) -> None:
    """Within 1e-5 of the largest sum before the activation."""
    assert have.shape == want.shape, f"{what}: {have.shape} is not {want.shape}"
    if want.numel():
        error, scale = float((have.double() - want).abs().max()), float(largest.abs().max())
        assert error <= 1e-5 * max(scale, 1e-30), f"{what}: off by {error} of {scale}"


def expect_equal(what: str, have: Tensor, want: Tensor) -> None:
    assert (have.shape, have.dtype) == (want.shape, want.dtype), f"{what}: {have.dtype} {have.shape}"
    assert torch.equal(have, want), f"{what}: {int((have != want).sum())} of {want.numel()} differ"


class Floats:
    """One layer of float32, as the kernels see it and in double precision."""

    def __init__(self, tokens: int, rows: int, features: int, density: float, block: int) -> None:
        self.name = f"tokens={tokens} rows={rows} features={features} density={density} block={block}"
        self.x, self.residual = torch.randn(tokens, features), torch.randn(tokens, rows)
        self.weight, self.bias = weight_of(rows, features, density, block), torch.randn(rows)
        packed = pack_matrix(self.weight, block)
        self.parts = (packed.values, packed.columns, packed.starts)
        self.sums = self.x.double() @ self.weight.double().t()
        self.rows = rows

    def run(self, bias: bool = False, residual: Tensor | None = None, *options: Any) -> Tensor:
        result: Tensor = sparse_linear(
            pack(self.x), *self.parts, self.bias if bias else None, residual, (len(self.x),), self.rows, *options
        )
        return result

    def want(self, bias: bool, residual: bool, activation: str) -> Tensor:
        y = activate(self.sums + self.bias.double() if bias else self.sums, activation)
        return y + self.residual.double() if residual else y


class Integers:
    """One layer of int8, as the kernels see it and in integers of 64 bits."""

    def __init__(self, tokens: int, rows: int, features: int, density: float, block: int) -> None:
        self.name = f"int8 tokens={tokens} rows={rows} features={features} density={density} block={block}"
        self.x, self.residual = torch.randn(tokens, features) * 2, torch.randn(tokens, rows)
        self.weight = (weight_of(rows, features, density, block) * 60).round().clamp(-128, 127).to(torch.int8)
        self.bias, self.scales = torch.randn(rows), torch.rand(rows) * 1e-3 + 1e-4
        self.pack(block)

    def pack(self, block: int) -> None:
        packed = pack_matrix(self.weight, block)
        self.rows = len(self.weight)
        self.correction = (self.weight.long().sum(dim=1) * ZERO).to(torch.int32)
        self.parts = (packed.values, packed.columns, packed.starts, self.correction, self.scales)
        self.sums = bytes_of(self.x) @ self.weight.long().t() - self.correction
        self.floats = self.sums.float() * self.scales

    def run(self, bias: bool = False, residual: Tensor | None = None, *options: Any) -> Tensor:
        result: Tensor = sparse_linear_int8(
            pack_bytes(self.x, STEP, ZERO),
            *self.parts,
            self.bias if bias else None,
            residual,
            (len(self.x),),
            self.rows,
            *options,
        )
        return result

    def want(self, bias: bool, residual: bool, activation: str) -> Tensor:
        y = activate(self.floats + self.bias if bias else self.floats, activation)
        return y + self.residual if residual else y


def layers(kind: type[Floats] | type[Integers]) -> Iterator[Any]:
    """Every shape; densities and blocks take turns."""
    for number, shape in enumerate(SHAPES):
        yield kind(*shape, DENSITIES[number % len(DENSITIES)], (4, 1)[number // 2 % 2])
        yield kind(*shape, 0.25, (1, 4)[number // 2 % 2])
