"""The operators of sparse linear layers: activations go into panels, and panels are multiplied by packed matrices.

A panel holds 64 tokens, feature by feature: ``[features, 64]``; a tensor of tokens is ``[panels, features, 64]``, the last panel padded
with zeros. Panels of bytes have their tokens in the order of ``BYTE_ORDER``, which integer kernels unpack fastest.

What is here computes with torch alone and says what the operators mean. The kernels of target sparse-cpu compute the same, fast,
and are taken where they are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.sparsity.packed import Packed, unpack_matrix

PANEL = 64
"""Tokens of a panel."""
BYTE_ORDER = tuple(16 * (place % 16 // 4) + 4 * (place // 16) + place % 4 for place in range(PANEL))
"""The token at each place of a panel of bytes."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
RESULTS = ("rows", "panels", "bytes")

_torch_library: Any = torch.library  # without types
_library = _torch_library.Library("graphprune", "FRAGMENT")
_library.define("pack(Tensor x) -> Tensor")
_library.define("pack_bytes(Tensor x, float scale, int zero_point) -> Tensor")
_library.define(
    "sparse_linear(Tensor panels, Tensor values, Tensor columns, Tensor starts, Tensor? bias, Tensor? residual, SymInt[] sizes, "
    "int rows, str activation='none', str result='rows', float scale=1.0, int zero_point=0) -> Tensor"
)
_library.define(
    "sparse_linear_int8(Tensor panels, Tensor values, Tensor columns, Tensor starts, Tensor correction, Tensor scales, Tensor? bias, "
    "Tensor? residual, SymInt[] sizes, int rows, str activation='none', str result='rows', float scale=1.0, int zero_point=0) -> Tensor"
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal=False, bool bfloat16=False) -> Tensor"
)
pack = torch.ops.graphprune.pack.default
pack_bytes = torch.ops.graphprune.pack_bytes.default
sparse_linear = torch.ops.graphprune.sparse_linear.default
sparse_linear_int8 = torch.ops.graphprune.sparse_linear_int8.default
attention = torch.ops.graphprune.attention.default
LAYERS = (sparse_linear, sparse_linear_int8)


def read_argument(node: fx.Node, name: str) -> Any:
    """An argument of a sparse linear layer by its name; the default where it is not given."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    at = next(index for index, item in enumerate(arguments) if item.name == name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, arguments[at].default_value)


def write_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of a sparse linear layer by its name."""
    at = next(index for index, item in enumerate(node.target._schema.arguments) if item.name == name)  # type: ignore[union-attr]
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _panels_of(tokens: int) -> int:
    return (tokens + PANEL - 1) // PANEL


def _to_panels(rows: Tensor) -> Tensor:
    """``[tokens, features]`` to panels."""
    tokens, features = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -tokens % PANEL))
    return padded.view(-1, PANEL, features).transpose(1, 2).contiguous()


def _to_rows(panels: Tensor, tokens: int) -> Tensor:
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:tokens]


def _to_bytes(rows: Tensor, scale: float, zero_point: int) -> Tensor:
    """Quantize, ``clamp(round(x / scale) + zero_point, 0, 255)``, and put into panels of bytes."""
    grid = torch.div(_to_panels(rows), torch.tensor(scale)).round_().add_(zero_point).clamp_(0, 255)
    return grid.to(torch.uint8)[..., list(BYTE_ORDER)].contiguous()


def _pack(x: Tensor) -> Tensor:
    """``[..., features]``, float32, to panels."""
    return _to_panels(x.reshape(-1, x.shape[-1]))


def _pack_bytes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """``[..., features]``, float32, to panels of bytes."""
    return _to_bytes(x.reshape(-1, x.shape[-1]), scale, zero_point)


def _finish(
    sums: Tensor, bias: Tensor | None, residual: Tensor | None, sizes: Sequence[int], activation: str, result: str, scale: float,
    zero_point: int,
) -> Tensor:  # fmt: skip
    """Bias, activation and residual of ``[tokens, rows]``, and the form that the result has."""
    y = sums if bias is None else sums + bias
    if activation == "relu":
        y = torch.relu(y)
    elif activation != "none":
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if result == "bytes":
        return _to_bytes(y, scale, zero_point)
    if residual is not None:
        y = y + (residual.reshape(y.shape) if result == "rows" else _to_rows(residual, len(y)))
    return _to_panels(y) if result == "panels" else y.reshape(*sizes, y.shape[-1])


def _sparse_linear(
    panels: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, residual: Tensor | None,
    sizes: Sequence[int], rows: int, activation: str = "none", result: str = "rows", scale: float = 1.0, zero_point: int = 0,
) -> Tensor:  # fmt: skip
    """A linear layer of a packed matrix.

    Args:
        panels: float32 ``[panels, features, 64]``.
        values: float32 or bfloat16 ``[stored, block]``; this and the next two from ``graphprune.sparsity.packed.pack_matrix``.
        columns: int16 ``[stored]``.
        starts: int32 ``[block rows + 1]``.
        bias: float32 ``[rows]``.
        residual: Added to the result at the end; has its shape.
        sizes: Sizes of the tokens: those of the activations in rows, less the last.
        rows: Features of the result.
        activation: One of ``ACTIVATIONS``, applied behind the bias.
        result: ``rows``: float32 ``[*sizes, rows]``; ``panels``: float32 ``[panels, rows, 64]``; ``bytes``: uint8 of that shape.
        scale: Of bytes.
        zero_point: Of bytes.
    """
    dense = unpack_matrix(Packed(values, columns, starts), rows, panels.shape[1])
    sums = _to_rows(panels, math.prod(sizes)) @ dense.float().t()
    return _finish(sums, bias, residual, sizes, activation, result, scale, zero_point)


def _sparse_linear_int8(
    panels: Tensor, values: Tensor, columns: Tensor, starts: Tensor, correction: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, sizes: Sequence[int], rows: int, activation: str = "none", result: str = "rows", scale: float = 1.0,
    zero_point: int = 0,
) -> Tensor:  # fmt: skip
    """A linear layer of a packed matrix of int8 and activations of uint8, with sums of int32.

    Args:
        panels: uint8 ``[panels, features, 64]``, tokens in ``BYTE_ORDER``.
        values: int8 ``[groups, block, 4]``.
        columns: int16 ``[groups, 4]``.
        starts: int32 ``[block rows + 1]``.
        correction: int32 ``[rows]``: zero-point of the activations times the sum of the row.
        scales: float32 ``[rows]``: scale of the activations times that of the row.
        bias: As of ``sparse_linear``, and so on.
        residual: See there.
        sizes: See there.
        rows: See there.
        activation: See there.
        result: See there.
        scale: See there.
        zero_point: See there.
    """
    dense = unpack_matrix(Packed(values, columns, starts), rows, panels.shape[1])
    tokens = torch.empty_like(panels)
    tokens[..., list(BYTE_ORDER)] = panels
    sums = _to_rows(tokens, math.prod(sizes)).int() @ dense.int().t()
    return _finish((sums - correction).float() * scales, bias, residual, sizes, activation, result, scale, zero_point)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False, bfloat16: bool = False
) -> Tensor:
    """Scaled dot-product attention without dropout.

    Args:
        q: float32 ``[batch, heads, queries, features]``; features a multiple of 16, side by side in memory.
        k: ``[batch, heads, keys, features]``.
        v: Shape of ``k``.
        mask: Bool, true = may be seen, or float32 that is added to the scores; broadcast to ``[batch, heads, queries, keys]``.
        scale: Of the scores.
        causal: A query sees keys up to its own place.
        bfloat16: Factors may be rounded to bfloat16, where the CPU multiplies those faster; sums are float32 all the same.

    Returns:
        Shape of ``q``; in memory ``[batch, queries, heads, features]``, so that heads can be joined without a copy.
    """
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    if mask is not None and mask.dtype is torch.bool:
        seen = mask.expand(*q.shape[:3], k.shape[2]).any(-1, keepdim=True)
        y = y.masked_fill(~seen, 0.0)  # versions of torch differ there
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False, bfloat16: bool = False
) -> Tensor:
    batch, heads, queries, features = q.shape
    return q.new_empty((batch, queries, heads, features)).transpose(1, 2)


def _fake_pack(x: Tensor) -> Tensor:
    return x.new_empty((_panels_of(math.prod(x.shape[:-1])), x.shape[-1], PANEL))


def _fake_pack_bytes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return x.new_empty((_panels_of(math.prod(x.shape[:-1])), x.shape[-1], PANEL), dtype=torch.uint8)


def _result(panels: Tensor, sizes: Sequence[int], rows: int, result: str) -> Tensor:
    if result == "rows":
        return panels.new_empty((*sizes, rows), dtype=torch.float32)
    dtype = torch.uint8 if result == "bytes" else torch.float32
    return panels.new_empty((panels.shape[0], rows, PANEL), dtype=dtype)


def _fake_sparse_linear(
    panels: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, residual: Tensor | None,
    sizes: Sequence[int], rows: int, activation: str = "none", result: str = "rows", scale: float = 1.0, zero_point: int = 0,
) -> Tensor:  # fmt: skip
    return _result(panels, sizes, rows, result)


def _fake_sparse_linear_int8(
    panels: Tensor, values: Tensor, columns: Tensor, starts: Tensor, correction: Tensor, scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, sizes: Sequence[int], rows: int, activation: str = "none", result: str = "rows", scale: float = 1.0,
    zero_point: int = 0,
) -> Tensor:  # fmt: skip
    return _result(panels, sizes, rows, result)


for _name, _function, _fake in (
    ("pack", _pack, _fake_pack),
    ("pack_bytes", _pack_bytes, _fake_pack_bytes),
    ("sparse_linear", _sparse_linear, _fake_sparse_linear),
    ("sparse_linear_int8", _sparse_linear_int8, _fake_sparse_linear_int8),
    ("attention", _attention, _fake_attention),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _torch_library.register_fake(f"graphprune::{_name}", _fake)
